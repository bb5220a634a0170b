"""From an opened adapter to the plan of the same deltas in another scheme, from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import Adapter, Site
from loratool.adapter.scheme import KeyScheme, ScaleRule, Spelling
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.container import PICKLE_SUFFIXES
from loratool.files.spec import TensorSpec
from loratool.names.pipelines import (
    family_of_encoders,
    sole_component,
)
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.planning import check_place
from loratool.ops.algebra.provenance import history_metadata
from loratool.ops.algebra.sidecars import carried_files
from loratool.ops.conversion.base import Base
from loratool.ops.conversion.choosing import (
    as_in_base,
    is_same_spelling,
    is_written_native,
    of_component,
)
from loratool.ops.conversion.experts import stack_experts
from loratool.ops.conversion.extras import carried_extras, token_names
from loratool.ops.conversion.initial import without_initial
from loratool.ops.conversion.metadata import (
    kept_metadata,
    kohya_metadata,
    module_names,
    positional_metadata,
)
from loratool.ops.conversion.nearest import Approximation
from loratool.ops.conversion.noting import conversion_notes, unknown_notes
from loratool.ops.conversion.parts import Part, part_of
from loratool.ops.conversion.plain import to_plain
from loratool.ops.conversion.plan import ConversionPlan, OutputPart
from loratool.ops.conversion.refusing import (
    Dropping,
    check_config,
    check_names,
    check_nesting,
    check_options,
)
from loratool.ops.conversion.renaming import (
    families_of,
    to_hub,
    to_native,
)
from loratool.ops.conversion.scales import placed_scales
from loratool.ops.conversion.slotting import fitted, padded, slotted
from loratool.ops.conversion.spelling import spelled, with_components, written_order
from loratool.ops.conversion.tensors import (
    alpha_of,
    output_site,
    part_specs,
    written_config,
)
from loratool.ops.conversion.wishes import Wishes
from loratool.ops.plan import Sidecar
from loratool.ops.targets.preparing import prepare, refusals, uniform_rank

__all__ = ["plan_conversion"]

HISTORY: Final = "loratool"


def plan_conversion(adapter: Adapter, scheme: KeyScheme, wishes: Wishes) -> ConversionPlan:
    """Return the plan; raises where the scheme cannot express something, and says what.

    Raises:
        UnsupportedError: The scheme cannot express it.
        AdapterError: The adapter is broken, or its names cannot be told.
    """
    check_place(wishes.output, scheme.name, has_config=scheme.has_config)
    is_renamed = wishes.naming is not None or wishes.component is not None
    check_names(adapter, None if is_renamed else wishes.then or scheme)
    check_options(wishes, scheme)
    check_config(adapter, has_initial=wishes.initial is not None)
    target = wishes.target
    if target is not None:
        refusals(adapter, target, drop=wishes.drop, to_lora=wishes.to_lora)
    dropping = Dropping(wishes.drop)
    sites = [site for site in adapter.sites if not dropping.takes(site.label)]
    check_nesting(sites, adapter, scheme)
    parts = [part_of(site, adapter, _width(site, wishes.base)) for site in sites]
    if wishes.initial is not None:
        parts = without_initial(parts, wishes.initial)
    parts, others = of_component(parts, wishes.component, adapter.components)
    dropping.found += others
    if not parts:
        raise AdapterError(adapter.path, "has no delta that would be written")
    if wishes.base is not None:
        parts = as_in_base(parts, wishes.base, adapter, scheme)
    parts, approximations = _plain(parts, adapter, wishes)
    pad = wishes.pad
    if target is not None:
        parts = prepare(parts, target, wishes.base)
        pad = pad or uniform_rank(parts, target)
    naming = families_of([p.module for p in parts], wishes.family or adapter.family)
    family = wishes.family or adapter.family
    if family is None and len(naming.families) == 1:
        family = naming.families[0].name
    family = family or family_of_encoders([part.module for part in parts])
    known = adapter.components | ({wishes.component} if wishes.component else set())
    if scheme.spelling not in (Spelling.PATH, Spelling.BARE_FLAT):
        backbone = naming.families[0].backbone if naming.families else None
        parts = with_components(parts, backbone, known)
        known |= {backbone} if backbone else set()
    if wishes.base is not None:
        parts = [fitted(part, wishes.base) for part in parts]
    is_kept = is_same_spelling(adapter, scheme, wishes)
    if is_kept:
        pass
    elif is_written_native(scheme, naming, adapter, wishes.naming):
        shapes = {m: w.spec.shape for m, w in wishes.base.weights.items()} if wishes.base else {}
        parts = to_native(parts, naming, shapes)
    else:
        parts = to_hub(parts, naming)
    alone = wishes.component
    if alone is None and not is_kept:
        alone = sole_component([part.module for part in parts], known)
    parts = padded(parts, pad, scheme)
    if scheme.scale is ScaleRule.MULTIPLIER:
        parts = stack_experts(parts)
    is_folded = wishes.fold or (target is not None and target.fold)
    rule = ScaleRule.FOLDED if is_folded else scheme.scale
    parts, multiplier = placed_scales(parts, rule)
    if is_folded and scheme.scale is ScaleRule.MULTIPLIER:
        multiplier = 1.0
    parts = [slotted(part, scheme) for part in parts]
    names = spelled(parts, scheme, family, known=known, alone=alone)
    output_parts, alphas = [], []
    name = wishes.name or adapter.name or "default"
    for spelling in written_order(names):
        part = names[spelling]
        specs = part_specs(spelling.partition("\0")[0], part, scheme, name, wishes.dtype)
        output_parts.append(
            OutputPart(part, specs, approximations.get(id(part.site)), scheme.is_transposed)
        )
        if scheme.scale is ScaleRule.ALPHA:
            alpha = alpha_of(spelling, part, scheme)
            if alpha is not None:
                alphas.append(Carried(TensorSpec(alpha[0], "F32", ()), (), constant=alpha[1]))
    output_sites = [output_site(part, scheme) for part in names.values()]
    extras = carried_extras(adapter, output_sites, scheme, dropping, wishes.dtype)
    if scheme.spelling is Spelling.POSITION:
        extras.notes.append(
            "its modules are numbered in the order that cloneofsimo/lora had when it was written: "
            "attention, feed-forward, cross-attention"
        )
    _check_unique([s for p in output_parts for s in p.specs.values()], alphas, extras.carried)
    written = list(names.values())
    config = written_config(adapter, scheme, output_sites, written, extras, multiplier, alone)
    if config is not None and target is not None:
        config |= target.config
    sidecars, left, file_notes = _files(adapter, wishes.output)
    title = wishes.output.stem
    is_torch = is_torch_file(wishes.output, scheme)
    metadata = {
        **kept_metadata(adapter),
        **(
            kohya_metadata(adapter, written, family, title)
            if scheme.spelling is Spelling.FLAT
            else {}
        ),
        **(positional_metadata(names) if scheme.spelling is Spelling.POSITION else {}),
        **{t: "<embed>" for t in token_names(extras) if scheme.spelling is Spelling.POSITION},
        **module_names(names, scheme),
        **_history(adapter, wishes),
    }
    return ConversionPlan(
        parts=tuple(output_parts),
        carried=(*alphas, *extras.carried),
        metadata={} if is_torch else metadata,
        sidecars=tuple(sidecars),
        config=config,
        weights_name=weights_name(wishes.output, scheme),
        is_torch=is_torch,
        is_hashed=scheme.spelling is Spelling.FLAT and not is_torch,
        stamps=_stamps(adapter, wishes),
        scheme=scheme.name,
        family=family,
        notes=tuple(
            dict.fromkeys(
                [
                    *conversion_notes(adapter, scheme, names),
                    *unknown_notes(parts, naming),
                    *dropping.unused(),
                    *extras.notes,
                    *file_notes,
                ]
            )
        ),
        dropped=(
            *dropping.found,
            *extras.dropped,
            *((key, "skipped as asked") for key in adapter.skipped),
            *left,
        ),
    )


def _width(site: Site, base: Base | None) -> int | None:
    """Return how many inputs a site's module has in the base, where that is not in the file."""
    if base is None or site.variant != "qalora":
        return None
    shape = base.weight(site.module).spec.shape
    return shape[0] if base.is_conv1d(site.module) else shape[-1]


def _history(adapter: Adapter, wishes: Wishes) -> dict[str, str]:
    if wishes.history is not None:
        return {k: v for k, v in wishes.history.items() if k in ("format", HISTORY)}
    if wishes.options is None:
        return {k: adapter.metadata[k] for k in ("format", HISTORY) if k in adapter.metadata}
    inputs = [(adapter.path.resolve().name, wishes.digest)]
    return history_metadata("convert", inputs, wishes.options)


def _plain(
    parts: Sequence[Part], adapter: Adapter, wishes: Wishes
) -> tuple[list[Part], dict[int, Approximation]]:
    """Return plain parts where that was asked for, and how good the approximations are."""
    made, found = [], {}
    for part in parts:
        if not wishes.to_lora:
            made.append(part)
            continue
        plain, approximation = to_plain(part, adapter, wishes.base, wishes.rank)
        made.append(plain)
        if approximation is not None:
            found[id(plain.site)] = approximation
    return made, found


def _check_unique(
    specs: Sequence[TensorSpec], alphas: Sequence[Carried], carried: Sequence[Carried]
) -> None:
    names = Counter([*(s.name for s in specs), *(c.spec.name for c in (*alphas, *carried))])
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UnsupportedError(name, "would be the name of two tensors")


def _files(
    adapter: Adapter, output: Path
) -> tuple[list[Sidecar], list[tuple[str, str]], list[str]]:
    sidecars, left, notes = carried_files([adapter])
    if output.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        left = [*left, *((s.name, "the output is a single file") for s in sidecars)]
        return [], left, notes
    return sidecars, left, notes


def is_torch_file(output: Path, scheme: KeyScheme) -> bool:
    suffix = output.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        return True
    return suffix != ".safetensors" and scheme.written_suffix in PICKLE_SUFFIXES


def weights_name(output: Path, scheme: KeyScheme) -> str:
    if output.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        return ""
    return scheme.weights_name or f"{output.name}{scheme.written_suffix}"


def _stamps(adapter: Adapter, wishes: Wishes) -> dict[Path, Any]:
    initial = wishes.initial
    more = {initial.weights: initial.stamp} if initial is not None else {}
    return {adapter.weights: adapter.stamp, **more}
