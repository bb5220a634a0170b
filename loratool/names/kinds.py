"""Where in a model a module is: its part, which layer, and what kind of module of that layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from loratool.names.pipelines import component_of
from loratool.names.sections import section_of

__all__ = ["Position", "positions_of"]

LIST_OF_LAYERS: Final = re.compile(
    r"(?x) .*(layer|block|attention|resnet|sampler|stage|transformer)s? | h | \d+"
)
"""What the number of a layer follows: ``layers.0``, ``transformer_blocks.3``, ``blocks.4.1``."""
NUMBER: Final = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a module is.

    Attributes:
        section: The part of the model: ``unet down``, ``te1``, ``double_blocks``; empty where
            all of it is one.
        kind: What it is in its layer: ``self_attn.q_proj``, ``attn1.to_q``.
        numbers: Of its layer, from the outermost list on; empty outside of layers.
        experts: Which expert of the layer it belongs to, where it has a number.
    """

    section: str
    kind: str
    numbers: tuple[int, ...]
    experts: tuple[int, ...] = ()

    @property
    def row(self) -> str:
        """Section and kind, in one text."""
        return f"{self.section} {self.kind}" if self.section else self.kind

    @property
    def component(self) -> str:
        """The section, with all stretches of a U-Net as one."""
        return self.section.partition(" ")[0]

    @property
    def layer(self) -> str:
        """The numbers with dots between them; ``-`` where there are none."""
        return ".".join(map(str, self.numbers)) or "-"


def positions_of(
    modules: Sequence[str], components: frozenset[str] = frozenset(), family: str | None = None
) -> tuple[Position, ...]:
    """Return where each of the modules of one model is.

    Experts of a layer are one kind, whatever their number.

    Args:
        modules: Dotted paths.
        components: What is a component of a pipeline for certain.
        family: The pipeline, where known.
    """
    found = [_position(module, components, family) for module in modules]
    sections = {position.section for position in found if position.section}
    if len(sections) > 1 or any(" " in section for section in sections):
        return tuple(found)
    return tuple(replace(position, section="") for position in found)


def _position(module: str, components: frozenset[str], family: str | None) -> Position:
    component, local = component_of(module, components)
    words = local.split(".")
    numbered = [i for i in range(1, len(words) - 1) if NUMBER.fullmatch(words[i])]
    layered = [i for i in numbered if LIST_OF_LAYERS.fullmatch(words[i - 1])]
    places = layered or [i for i in numbered if not _is_expert(words, i)][:1]
    experts = [i for i in numbered if i not in places and _is_expert(words, i)]
    last = places[-1] if places else -1
    kind = [word for i, word in enumerate(words) if i > last and i not in experts]
    section = section_of(module, components, family)
    if places and component is None:
        section = ".".join(words[: places[0]])
    elif places and section == component:  # a backbone of several lists of blocks
        section = words[places[0] - 1]
    return Position(
        section,
        ".".join(kind) or local,
        tuple(int(words[i]) for i in places),
        tuple(int(words[i]) for i in experts),
    )


def _is_expert(words: Sequence[str], place: int) -> bool:
    return "expert" in words[place - 1]
