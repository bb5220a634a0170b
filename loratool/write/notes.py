"""What a user should know about a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from loratool.adapter.part import Part
from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.files.dtypes import DTYPES
from loratool.names.pipelines import BACKBONES, component_of
from loratool.values.expr import Scaled
from loratool.write.renaming import Naming

__all__ = ["output_notes", "unknown_notes"]

WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")


def output_notes(parts: Sequence[Part], scheme: KeyScheme, *, is_configured: bool) -> Iterator[str]:
    """Yield what is worth knowing about what is written.

    Args:
        parts: The modules.
        scheme: The scheme.
        is_configured: Whether the input has a configuration of PEFT.
    """
    components = {component_of(part.module)[0] for part in parts}
    if scheme.name == "peft" and len(components) > 1:
        listed = ", ".join(sorted(c or "no component" for c in components))
        yield (
            f"holds modules of {listed}; PEFT loads it on a module that has all of them, or one "
            "of them alone with --component"
        )
    folded_alphas = any(isinstance(part.values.get(part.slots[1]), Scaled) for part in parts)
    if scheme.name == "loralib" and (folded_alphas or is_configured):
        yield "loralib keeps its scale in the code: make the layers with lora_alpha = r"
    if scheme.spelling is Spelling.POSITION:
        yield (
            "its modules are numbered in the order that cloneofsimo/lora had when it was written: "
            "attention, feed-forward, cross-attention"
        )
    dtypes = {value.dtype for part in parts for value in part.values.values()}
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
