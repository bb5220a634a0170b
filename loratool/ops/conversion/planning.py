"""From an opened adapter to the plan of the same deltas in another scheme, from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import Adapter
from loratool.adapter.scheme import KeyScheme, ScaleRule, Spelling
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.files.container import PICKLE_SUFFIXES
from loratool.files.dtypes import DTYPES
from loratool.files.spec import TensorSpec
from loratool.names.pipelines import (
    BACKBONES,
    component_of,
    family_of_encoders,
    sole_component,
)
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.planning import check_place
from loratool.ops.algebra.provenance import history_metadata
from loratool.ops.algebra.sidecars import carried_files
from loratool.ops.conversion.base import Base
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
    Naming,
    families_of,
    names_native,
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
from loratool.ops.conversion.values import Scaled
from loratool.ops.conversion.wishes import Wishes
from loratool.ops.plan import Sidecar
from loratool.ops.targets.preparing import prepare, refusals, uniform_rank
from loratool.schemes import scheme_named

__all__ = ["plan_conversion"]

WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")
HISTORY: Final = "loratool"
TEXT_MODEL: Final = "text_model."


def plan_conversion(adapter: Adapter, scheme: KeyScheme, wishes: Wishes) -> ConversionPlan:
    """Return the plan; raises where the scheme cannot express something, and says what.

    Raises:
        UnsupportedError: The scheme cannot express it.
        AdapterError: The adapter is broken, or its names cannot be told.
    """
    check_place(wishes.output, scheme.name, has_config=scheme.has_config)
    check_names(adapter)
    check_options(wishes)
    check_config(adapter, has_initial=wishes.initial is not None)
    target = wishes.target
    if target is not None:
        refusals(adapter, target, drop=wishes.drop, to_lora=wishes.to_lora)
    dropping = Dropping(wishes.drop)
    sites = [site for site in adapter.sites if not dropping.takes(site.label)]
    check_nesting(sites, adapter, scheme)
    parts = [part_of(site, adapter) for site in sites]
    if wishes.initial is not None:
        parts = without_initial(parts, wishes.initial)
    parts, others = _of_component(parts, wishes.component, adapter.components)
    dropping.found += others
    if not parts:
        raise AdapterError(adapter.path, "has no delta that would be written")
    if wishes.base is not None:
        parts = _as_in_base(parts, wishes.base, adapter, scheme)
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
    known = adapter.components
    if scheme.spelling not in (Spelling.PATH, Spelling.BARE_FLAT):
        backbone = naming.families[0].backbone if naming.families else None
        parts = with_components(parts, backbone, known)
        known |= {backbone} if backbone else set()
    if wishes.base is not None:
        parts = [fitted(part, wishes.base) for part in parts]
    is_kept = _is_same_spelling(adapter, scheme, wishes)
    if is_kept:
        pass
    elif _is_native(scheme, naming, adapter, wishes.naming):
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
    output_parts, constants, alphas = [], {}, []
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
                constants[alpha[0]] = alpha[1]
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
        constants=constants,
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
                    *_notes(adapter, scheme, names),
                    *_unknown(parts, naming),
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


def _history(adapter: Adapter, wishes: Wishes) -> dict[str, str]:
    if wishes.history is not None:
        return {k: v for k, v in wishes.history.items() if k in ("format", HISTORY)}
    if wishes.options is None:
        return {k: adapter.metadata[k] for k in ("format", HISTORY) if k in adapter.metadata}
    inputs = [(adapter.path.resolve().name, wishes.digest)]
    return history_metadata("convert", inputs, wishes.options)


def _of_component(
    parts: Sequence[Part], component: str | None, known: frozenset[str]
) -> tuple[list[Part], list[tuple[str, str]]]:
    if component is None:
        return list(parts), []
    kept, others = [], []
    for part in parts:
        if component_of(part.module, known | {component})[0] in (component, None):
            kept.append(part)
        else:
            others.append((part.module, f"not in --component {component}"))
    return kept, others


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


def _as_in_base(
    parts: Sequence[Part], base: Base, adapter: Adapter, scheme: KeyScheme
) -> list[Part]:
    """Return ``parts`` with the paths that the base has for text encoders.

    Since transformers 5 they have no ``text_model.`` any more.

    Raises:
        AdapterError: The base has none of the modules.
    """
    found = [base.find(part.module) for part in parts]
    if not any(weight is not None for weight in found):
        raise AdapterError(
            base.path,
            f"has none of the adapter's modules, such as {parts[0].module!r}",
            hint="is this the base that it was trained on?",
        )
    if scheme.spelling not in (Spelling.PATH, Spelling.BARE_FLAT, Spelling.PIPELINE):
        return list(parts)
    made = []
    for part in parts:
        component, local = component_of(part.module, adapter.components)
        short = local.removeprefix(TEXT_MODEL)
        for path in (f"{component}.{short}" if component else short, short):
            if local != short and path in base.weights and base.path_of(part.module) == path:
                part = replace(part, module=f"{component}.{short}" if component else short)
        made.append(part)
    return made


def _is_same_spelling(adapter: Adapter, scheme: KeyScheme, wishes: Wishes) -> bool:
    """Whether paths stay what they are: both schemes have those of one model."""
    is_path = scheme_named(adapter.scheme).spelling is Spelling.PATH
    is_asked = wishes.component is not None or wishes.naming is not None
    return is_path and scheme.spelling is Spelling.PATH and not is_asked


def _is_native(scheme: KeyScheme, naming: Naming, adapter: Adapter, wish: str | None) -> bool:
    """Whether the scheme is written with the names of original checkpoints."""
    if scheme.spelling not in (Spelling.FLAT, Spelling.NATIVE):
        if wish == "native":
            raise OptionError("--naming", f"the scheme {scheme.name!r} has diffusers' names only")
        return False
    if wish is not None:
        return wish == "native"
    if scheme.spelling is Spelling.NATIVE:
        return True
    usual = {names_native(family.name) for family in naming.families}
    if len(usual) == 1:
        return usual.pop()
    # Stable Diffusion 1 or XL: what was read is what is written.
    return bool(usual) and adapter.is_native


def _unknown(parts: Sequence[Part], naming: Naming) -> Iterator[str]:
    """Yield a note on modules of a backbone that its family does not have."""
    if not naming.families:
        return
    places = [component_of(part.module) for part in parts]
    foreign = [
        local
        for component, local in places
        if component in (None, *BACKBONES)
        and not any(family.has(local) for family in naming.families)
    ]
    if foreign:
        names = " or ".join(family.name for family in naming.families)
        yield (
            f"{len(foreign)} modules are none of {names} and keep their names, such as "
            f"{foreign[0]!r}"
        )


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


def _notes(adapter: Adapter, scheme: KeyScheme, names: Mapping[str, Part]) -> Iterator[str]:
    yield from adapter.notes
    missing = [s for s in adapter.sites if s.scaling.alpha is None and s.is_plain]
    if missing:
        some = "" if len(missing) == len(adapter.sites) else f" for {len(missing)} modules"
        yield f"alpha is not recorded{some}; the scale is taken as 1 (--alpha says otherwise)"
    zero = [s for s in adapter.sites if s.scaling.alpha == 0]
    if zero:
        yield (
            f"alpha is 0 in {len(zero)} modules, so that their delta is zero; trainers of kohya's "
            "kind may mean alpha = rank by it (--alpha says so)"
        )
    components = {component_of(part.module)[0] for part in names.values()}
    if scheme.name == "peft" and len(components) > 1:
        listed = ", ".join(sorted(c or "no component" for c in components))
        yield (
            f"holds modules of {listed}; PEFT loads it on a module that has all of them, or one "
            "of them alone with --component"
        )
    folded_alphas = any(isinstance(p.values.get(p.slots[1]), Scaled) for p in names.values())
    if scheme.name == "loralib" and (folded_alphas or adapter.config is not None):
        yield "loralib keeps its scale in the code: make the layers with lora_alpha = r"
    arguments = adapter.metadata.get("ss_network_args", "")
    if "split_qkv" in arguments:
        yield (
            "was trained with split_qkv and stored fused: by its alpha every loader applies a "
            "third or a quarter of the strength of training, and so does this conversion"
        )
    dtypes = {v.dtype for p in names.values() for v in p.values.values()}
    strange = {d for d in dtypes if d not in WEIGHT_DTYPES and DTYPES[d].is_float}
    if strange:
        yield f"has factors of {', '.join(sorted(strange))}; few loaders read them (--dtype)"
