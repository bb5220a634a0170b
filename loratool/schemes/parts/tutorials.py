"""What layers of tutorials and research code call the factors that they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from loratool.adapter.keys import Template
from loratool.adapter.slots import Slot

__all__ = ["TEMPLATES", "has_letters", "may_be_torchtunes"]

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
    "weight_lora_{side}",
    "w_lora_{side}",
    "lora_{word}",
)
"""Parameters of the layer itself; the first is the one that is written."""
HOLDERS: Final = ("lora", "lora_layer", "lora_adapter", "lora_module")
"""Modules inside the layer that hold nothing else."""
HELD: Final = ("{side}", "lora_{side}", "{side}.weight", "{place}.weight")
PARAMETRISED: Final = ("parametrizations.weight.0.{side}", "parametrizations.weight.0.lora_{side}")
LETTERS: Final = (
    ".A",
    ".B",
    *(f".lora_{letter}{end}" for letter in "ab" for end in ("", ".weight")),
)
"""Parameters under names that others have too: they are factors where all of them fit as such."""


WORDS: Final = {"A": "down", "B": "up"}
PLACES: Final = {"A": "0", "B": "1"}
"""In an ``nn.Sequential`` of two layers."""
IN_ORDER: Final = re.compile(rf".*\.({'|'.join(HOLDERS)})\.[01]\.weight", re.DOTALL)
TORCHTUNE: Final = re.compile(
    r"(.*\.)?(layers\.\d+\.(attn\.\w+_proj|mlp\.(.+\.)?w[123])|output)\.lora_[ab]\.weight",
    re.DOTALL,
)
"""Some of its models have the rows of queries and keys in an order of their own."""


def _templates(side: str, slot: Slot) -> list[Template]:
    held = [f"{holder}.{name}" for holder in HOLDERS for name in HELD]
    written = {"side": side, "word": WORDS[side], "place": PLACES[side]}
    names = [name.format(**written) for name in (*BESIDE, *held, *PARAMETRISED)]
    lower = f"lora_{side.lower()}"
    return [
        Template(f"{{module}}.{name}", slot) for name in (*names, side, lower, f"{lower}.weight")
    ]


def has_letters(keys: Iterable[str]) -> bool:
    """Whether there are factors under names that are not theirs alone."""
    return any(
        (key.endswith(LETTERS) and not key.endswith(INSIDE)) or IN_ORDER.fullmatch(key)
        for key in keys
    )


def may_be_torchtunes(keys: Iterable[str]) -> bool:
    """Whether there are factors under names of torchtune's modules, whose rows may be in pairs."""
    return any(TORCHTUNE.fullmatch(key) for key in keys if key.endswith(".weight"))


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
