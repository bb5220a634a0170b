"""What a user should know about a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from loratool.adapter.model import Adapter, unknown_scale
from loratool.adapter.scheme import KeyScheme
from loratool.files.dtypes import DTYPES
from loratool.names.pipelines import BACKBONES, component_of
from loratool.ops.conversion.parts import Part
from loratool.ops.conversion.renaming import Naming
from loratool.ops.conversion.values import Scaled

__all__ = ["conversion_notes", "unknown_notes"]

WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")


def conversion_notes(
    adapter: Adapter, scheme: KeyScheme, names: Mapping[str, Part]
) -> Iterator[str]:
    """Yield what is worth knowing about the input and about what is written."""
    yield from adapter.notes
    if unknown := unknown_scale(adapter):
        yield f"{unknown} (--alpha says otherwise)"
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


def unknown_notes(parts: Sequence[Part], naming: Naming) -> Iterator[str]:
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
