"""What layers of tutorials and research code call the factors that they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from loratool.adapter.keys import Template
from loratool.adapter.slots import Slot

__all__ = ["TEMPLATES", "has_letters"]

BESIDE: Final = (
    "lora_{side}",
    "lora_{side}_weight",
    "lora_matrix_{side}",
    "lora_mat_{side}",
    "lora_weight_{side}",
    "lora{side}",
    "lora{side}.weight",
    "LoRA_{side}",
    "LoRA_{side}.weight",
)
"""Parameters of the layer itself; the first is the one that is written."""
HOLDERS: Final = ("lora", "lora_layer", "lora_adapter", "lora_module")
"""Modules inside the layer that hold nothing else."""
HELD: Final = ("{side}", "lora_{side}", "{side}.weight")
PARAMETRISED: Final = ("parametrizations.weight.0.{side}", "parametrizations.weight.0.lora_{side}")
LETTERS: Final = (".A", ".B", ".lora_a", ".lora_b")
"""Parameters under names that others have too: they are factors where all of them fit as such."""


def _templates(side: str, slot: Slot) -> list[Template]:
    held = [f"{holder}.{name}" for holder in HOLDERS for name in HELD]
    names = [name.format(side=side) for name in (*BESIDE, *held, *PARAMETRISED)]
    return [Template(f"{{module}}.{name}", slot) for name in (*names, side, f"lora_{side.lower()}")]


def has_letters(keys: Iterable[str]) -> bool:
    """Whether there are factors under names that are not theirs alone."""
    return any(key.endswith(LETTERS) and not key.endswith(INSIDE) for key in keys)


TEMPLATES: Final = (
    *_templates("A", Slot.DOWN),
    *_templates("B", Slot.UP),
    Template("{module}.alpha", Slot.ALPHA),
)
"""loralib's bare parameters first; any of them may be transposed, which their shapes tell."""
INSIDE: Final = tuple(
    f".{holder}.{letter}"
    for holder in (*HOLDERS, "parametrizations.weight.0")
    for letter in ("A", "B")
)
