"""Open an adapter: find its files, detect its scheme, sort its tensors. Headers only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from loratool.adapter.build import build_sites
from loratool.adapter.config import CONFIG_NAME, LoraConfig, parse_config
from loratool.adapter.fields import is_number
from loratool.adapter.model import Adapter, ExtraKind, Site, without
from loratool.adapter.recognise import PEFT_TYPES
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import RANKS, Scheme, Told
from loratool.adapter.selectors import PartlyMeantError, Selector, Spellings, selector
from loratool.adapter.slots import Slot
from loratool.errors import OptionError, UnsupportedError
from loratool.files.containers import open_weights
from loratool.files.json import read_json_object
from loratool.files.places import located
from loratool.names.spellings import spellings_of, spellings_of_extra
from loratool.schemes import claimed, claims, scheme_named, scheme_names
from loratool.schemes.detection import detect_scheme, find_weights, naming, selected, unnamed
from loratool.schemes.groups import one_group
from loratool.schemes.ranks import joined, ranks_around
from loratool.schemes.spelled_out import spell_out
from loratool.variants import evident_slots, peft_types, variant_of

__all__ = ["open_adapter", "open_as_spelled"]


def open_adapter(
    path: str | PathLike[str],
    *,
    adapter_name: str | None = None,
    alpha: float | None = None,
    skip: Sequence[str] = (),
    scheme: str | None = None,
    base_modules: Collection[str] = (),
    base: Told | None = None,
    enabled: Sequence[bool] = (),
) -> Adapter:
    """Open the adapter at ``path``: headers only, no tensor data.

    Args:
        path: The weights file, or the folder that holds it and its sidecars.
        adapter_name: Which adapter, where a folder or a file holds several.
        alpha: Alpha for all modules, where nothing records it.
        skip: Regular expressions; keys that match anywhere are left out. With ``re:`` or
            ``glob:`` before them patterns for modules too, as those of ``weights``.
        scheme: The key scheme to read it in; by default the one that recognises most of it.
        base_modules: Module paths of the base, from which flattened names are restored.
        base: What the base says of itself, for schemes whose names or rows depend on it.
        enabled: Which parts of a merged projection stacked factors are for (``enable_lora``),
            where no configuration says so.

    Raises:
        FileFormatError: A file breaks the rules of its format.
        AdapterError: There is no adapter, or it contradicts itself.
        UnsupportedError: It is of a kind that is not read.
        OptionError: There is no such scheme.
    """
    if scheme is not None and scheme not in scheme_names():
        raise OptionError.none_of("--from", scheme, scheme_names())
    opened = open_as_spelled(
        located(path),
        (scheme_named(scheme),) if scheme is not None else (),
        adapter_name=adapter_name,
        alpha=alpha,
        skip=skip,
        enabled=enabled,
    )
    told = replace(base or Told(), metadata=opened.metadata, folder=opened.folder)
    found = spell_out(opened, scheme_named(opened.scheme).of(told), base_modules)
    found = _without_meant(found, [each for each in _selectors(skip) if each.is_marked])
    mixed = tuple(_foreign_factors(found))
    scheme_named(opened.scheme).keys.forget()
    return replace(found, mixed=mixed, told=told)


def _foreign_factors(adapter: Adapter) -> Iterator[str]:
    """Yield the keys that mean nothing in the adapter's scheme, and are factors in another."""
    foreign = evident_slots()
    whole = [extra.key for extra in adapter.extras if extra.kind is ExtraKind.FULL]
    others = [scheme for scheme in claimed(whole) if scheme.name != adapter.scheme]
    for name in whole:
        meanings = (scheme.keys.parse(name) for scheme in others)
        if any(key is not None and key.slot in foreign for key in meanings):
            yield name


def open_as_spelled(
    path: Path,
    schemes: Sequence[Scheme] = (),
    *,
    adapter_name: str | None = None,
    alpha: float | None = None,
    skip: Sequence[str] = (),
    enabled: Sequence[bool] = (),
) -> Adapter:
    """Open the adapter at ``path``, with modules as the file spells them.

    Args:
        path: The weights file, or the folder that holds it.
        schemes: The key schemes to try; by default all whose claim matches.
        adapter_name: Which of several adapters in the folder or in the file.
        alpha: Alpha for all sites where the file and its sidecars record none.
        skip: Regular expressions; keys that match anywhere are left out.
        enabled: Which parts of merged projections stacked factors are for (``enable_lora``),
            where no configuration says so.

    Raises:
        FileFormatError: A file breaks the rules of its format.
        AdapterError: There is no adapter, or it contradicts itself.
        UnsupportedError: It is of a kind that has no delta or is not read yet.
    """
    if alpha is not None and not is_number(alpha):
        raise OptionError("--alpha", f"{alpha:g} is no number that an alpha may be")
    weights, notes = find_weights(path, adapter_name)
    config_path = weights.parent / CONFIG_NAME
    raw = read_json_object(config_path) if config_path.is_file() else None
    is_foreign = raw is not None and _is_anothers(raw)
    config = None
    if raw is not None and not is_foreign:
        config = parse_config(raw, where=config_path)
        _check_type(config, config_path)
    file, group = one_group(open_weights(weights), adapter_name, weights)
    asked = adapter_name
    adapter_name = None if group is not None else adapter_name
    scheme = naming(file, detect_scheme(file, schemes), adapter_name if not schemes else None)
    ranks = ranks_around(weights)
    if ranks is not None:
        file = joined(ranks, scheme, file)
    tensors, name, more = selected(file, scheme, adapter_name, weights)
    if asked is not None and name is None and group is None:
        more = (*more, *unnamed(path, weights, asked))
    skipped = _matching(tensors, _selectors(skip))
    tensors = {key: tensor for key, tensor in tensors.items() if key not in skipped}
    parts = build_sites(tensors, scheme, config, variant_of, _enabled(config, enabled))
    beside = {key: tensors[key] for key in tensors if key in parts.of_base}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in beside}
    sites = parts.sites
    if ranks is not None:
        sites = tuple(
            replace(site, settings={**site.settings, RANKS: len(ranks.files)}) for site in sites
        )
    sidecar, sidecar_path = (raw if is_foreign else None), config_path
    if scheme.settings.file not in ("", CONFIG_NAME):
        sidecar_path = weights.parent / scheme.settings.file
        sidecar = scheme.settings.load(sidecar_path) if sidecar_path.is_file() else None
    if sidecar is None and (model := scheme.settings.base_model(file.metadata)) is not None:
        sidecar = {"model": model}
    sites = scheme.settings.read(sites, file.metadata, sidecar, sidecar_path)
    more = (*more, *scheme.settings.remarks(sites, sidecar))
    if alpha is not None:
        more = (*more, *_alpha_notes(sites, alpha))
        sites = tuple(_with_alpha(site, alpha) for site in sites)
    return Adapter(
        path=path,
        weights=file.path,
        scheme=scheme.name,
        sites=sites,
        extras=parts.extras,
        config=config,
        metadata=file.metadata,
        tensors=tensors,
        stamp=file.stamp,
        others=file.others,
        name=group or name,
        skipped=tuple(skipped),
        notes=(*notes, *parts.notes, *more, *file.notes),
        sidecar=sidecar,
        beside=beside,
    )


def _is_anothers(raw: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is of another tool than PEFT."""
    named = (claim.name for claim in claims() if claim.sidecar == CONFIG_NAME)
    return any(scheme_named(name).settings.claims(raw) for name in named)


def _with_alpha(site: Site, alpha: float) -> Site:
    """Return ``site`` with ``alpha`` where it records none, or 0, which trainers read as none."""
    own = site.scaling.alpha
    is_missing = own is None or (own == 0 and Slot.ALPHA in site.slots)
    if not is_missing or not site.variant.is_scaled:
        return site
    return replace(site, scaling=Scaling(alpha, site.scaling.rank or site.rank))


def _alpha_notes(sites: Sequence[Site], alpha: float) -> Iterator[str]:
    """Yield for how many sites ``alpha`` has no effect, if for any, and why."""
    scaled = [site for site in sites if site.variant.is_scaled]
    recorded = [
        site for site in scaled if _with_alpha(site, alpha) is site and site.scaling.alpha != alpha
    ]
    if recorded:
        some = (
            "" if len(recorded) == len(scaled) else f" in {len(recorded)} of {len(scaled)} modules"
        )
        yield (
            f"--alpha {alpha:g} has no effect{some}: another one is recorded, which "
            "loratool rescale changes"
        )
    elif sites and not scaled:
        yield f"--alpha {alpha:g} has no effect: no scale multiplies what it adds"


def _enabled(config: LoraConfig | None, given: Sequence[bool]) -> tuple[bool, ...]:
    if given:
        return tuple(given)
    stacked = config.raw.get("enable_lora") if config is not None else None
    if isinstance(stacked, list) and any(stacked):
        return tuple(bool(item) for item in stacked)
    return ()


def _check_type(config: LoraConfig, path: Path) -> None:
    if config.peft_type in peft_types():
        return
    words = PEFT_TYPES.get(config.peft_type, "a PEFT type that is not read yet")
    raise UnsupportedError(
        path,
        f"peft_type is {config.peft_type}: {words}",
        hint="if it has a merge of its own, do that with peft and save the model",
    )


def _selectors(skip: Sequence[str]) -> list[Selector]:
    return [selector(text, "--skip", bare_is_expression=True) for text in skip]


def _matching(keys: Iterable[str], skip: Sequence[Selector]) -> list[str]:
    return [key for key in keys if any(pattern.matches(key) for pattern in skip)]


def _without_meant(adapter: Adapter, skip: Sequence[Selector]) -> Adapter:
    """Return an adapter without the modules and extras that patterns mean by other names."""
    if not skip:
        return adapter

    def is_meant(module: Spellings) -> bool:
        for pattern in skip:
            try:
                if pattern.means(module):
                    return True
            except PartlyMeantError as error:
                raise error.refusal(pattern, adapter.path, "leave out") from None
        return False

    return without(
        adapter,
        [site.label for site in adapter.sites if is_meant(spellings_of(site, adapter))],
        [e.key for e in adapter.extras if is_meant(spellings_of_extra(e, adapter))],
    )
