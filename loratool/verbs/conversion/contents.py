"""From an opened adapter to the one that a conversion writes, in no scheme yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter.model import UNTOLD, Adapter, ExtraKind, Site, unknown_scale
from loratool.adapter.scheme import Scheme
from loratool.base.model import Model
from loratool.base.placing import with_places
from loratool.errors import AdapterError
from loratool.loaders.loader import Loader
from loratool.loaders.preparation import prepare, refusals, uniform_rank
from loratool.plan.history import History
from loratool.schemes import scheme_named
from loratool.verbs.algebra.extras import gather_extras
from loratool.verbs.conversion.components import as_in_base, of_component
from loratool.verbs.conversion.initial import without_initial
from loratool.verbs.conversion.plain import to_plain
from loratool.verbs.conversion.refusals import Dropping, check_config, check_nesting
from loratool.write.adapter import NewAdapter
from loratool.write.extras import Extras
from loratool.write.metadata import kept_metadata
from loratool.write.options import WriteOptions
from loratool.write.refusals import check_names
from loratool.write.sidecars import carried_files
from loratool.write.stored import part_of

__all__ = ["Conversion", "converted"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to become of the deltas, whatever the scheme.

    Attributes:
        initial: The adapter as it was before training, where its initialisation changed the base.
        drop: Regular expressions of what may be left out.
        to_lora: Whether to write plain LoRA whatever the variant.
        rank: Rank of what has to be approximated for that.
        loader: The loader that it is for, where one was named.
    """

    initial: Adapter | None = None
    drop: tuple[str, ...] = ()
    to_lora: bool = False
    rank: int | None = None
    loader: Loader | None = None


def converted(
    adapter: Adapter,
    scheme: Scheme,
    conversion: Conversion,
    options: WriteOptions,
    history: History,
) -> tuple[NewAdapter, WriteOptions]:
    """Return what is written, and how: the loader that it is for may ask for more.

    Raises:
        UnsupportedError: The scheme or the loader cannot express it.
        AdapterError: The adapter is broken, or its names cannot be told.
    """
    if options.base is not None:
        adapter = with_places(adapter, options.base)
    is_renamed = options.naming is not None or options.component is not None
    check_names(adapter, None if is_renamed else scheme)
    check_config(adapter, scheme, has_initial=conversion.initial is not None)
    loader = conversion.loader
    if loader is not None:
        refusals(adapter, loader, drop=conversion.drop, to_lora=conversion.to_lora)
    dropping = Dropping(conversion.drop)
    sites = [
        _without_untold(site, dropping) for site in adapter.sites if not dropping.takes(site.label)
    ]
    check_nesting(sites, adapter, scheme)
    base = options.base
    parts = [part_of(site, adapter, _width(site, base)) for site in sites]
    if conversion.initial is not None:
        parts = without_initial(parts, conversion.initial)
    parts, others = of_component(parts, options.component, adapter.components)
    dropping.found += others
    if not parts:
        raise AdapterError(adapter.path, "has no delta that would be written")
    if base is not None:
        parts = as_in_base(parts, base, adapter, scheme)
    if conversion.to_lora:
        parts = [to_plain(part, adapter, base, conversion.rank) for part in parts]
    if loader is not None:
        parts = prepare(parts, loader, base)
        pad = options.pad or uniform_rank(parts, loader)
        fold = options.fold or loader.fold
        options = replace(options, pad=pad, fold=fold, config=loader.config)
    extras = _extras(adapter, dropping)
    sidecars, left, file_notes = carried_files([adapter])
    notes = [*adapter.notes, *_alpha_notes(adapter), *file_notes, *dropping.unused()]
    new = NewAdapter(
        parts=tuple(parts),
        extras=extras,
        scheme=adapter.scheme,
        config=_config(adapter),
        keeps_targets=not adapter.skipped,
        sidecar=adapter.sidecar,
        family=adapter.family,
        components=adapter.components,
        is_native=adapter.is_native,
        name=adapter.name,
        stem=adapter.weights.stem,
        told=adapter.told,
        metadata=kept_metadata(adapter, scheme.name),
        history=history,
        sidecars=tuple(sidecars),
        stamps=_stamps(adapter, conversion),
        notes=tuple(notes),
        dropped=(
            *dropping.found,
            *((key, "skipped as asked") for key in adapter.skipped),
        ),
        left_behind=tuple(left),
    )
    return new, options


def _without_untold(site: Site, dropping: Dropping) -> Site:
    """Return a site without what lies beside its factors and may be left out."""
    untold = site.settings.get(UNTOLD, ())
    patterns = dropping.patterns  # what is dropped is noted with the other tensors
    kept = tuple(s for s in untold if not any(each.search(s.name) for each in patterns))
    if len(kept) == len(untold):
        return site
    return replace(site, settings={**site.settings, UNTOLD: kept})


def _width(site: Site, base: Model | None) -> int | None:
    """Return how many inputs a site's module has in the base, where that is not in the file."""
    if base is None or not (site.is_plain and site.variant.needs_shape):
        return None
    return base.place(site.module).shape[-1]


def _extras(adapter: Adapter, dropping: Dropping) -> Extras:
    kept = tuple(
        extra
        for extra in adapter.extras
        if not dropping.takes(extra.key) and extra.kind is not ExtraKind.SHARED
    )
    config = adapter.config if scheme_named(adapter.scheme).settings.names_saved else None
    return gather_extras([replace(adapter, extras=kept, config=config)])


def _config(adapter: Adapter) -> dict[str, Any] | None:
    """Return PEFT's fields, where they are those of A and B."""
    if adapter.config is None or adapter.config.peft_type not in ("LORA", "ADALORA"):
        return None
    return dict(adapter.config.raw)


def _stamps(adapter: Adapter, conversion: Conversion) -> dict[Path, Any]:
    initial = conversion.initial
    return adapter.stamps | (initial.stamps if initial is not None else {})


def _alpha_notes(adapter: Adapter) -> Iterator[str]:
    if unknown := unknown_scale(adapter):
        yield f"{unknown} (--alpha says otherwise)"
    zero = [s for s in adapter.sites if s.scaling.alpha == 0]
    if zero:
        yield (
            f"alpha is 0 in {len(zero)} modules, so that their delta is zero; trainers of kohya's "
            "kind may mean alpha = rank by it (--alpha says so)"
        )
    if "split_qkv" in adapter.metadata.get("ss_network_args", ""):
        yield (
            "was trained with split_qkv and stored fused: by its alpha every loader applies a "
            "third or a quarter of the strength of training, and so does this conversion"
        )
