"""Experts as mlx-lm stores them: the factors of all in one tensor, and not transposed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.part import Part
from loratool.errors import UnsupportedError
from loratool.names.switched import stacked_path
from loratool.values.expr import Piled

__all__ = ["stack_experts"]


def stack_experts(parts: Sequence[Part]) -> list[Part]:
    """Return ``parts`` with the projections of all experts of a layer as one.

    Raises:
        UnsupportedError: An expert is missing, or has another rank than the rest.
    """
    groups: dict[str, dict[int, Part]] = defaultdict(dict)
    made: list[Part] = []
    for part in parts:
        place = stacked_path(part.module)
        if place is None:
            made.append(part)
        else:
            groups[place[0]][place[1]] = part
    return [*made, *(_stacked(name, members) for name, members in groups.items())]


def _stacked(name: str, members: dict[int, Part]) -> Part:
    ordered = [members[index] for index in sorted(members)]
    first = ordered[0]
    if sorted(members) != list(range(len(members))):
        missing = next(index for index in range(len(members)) if index not in members)
        raise UnsupportedError(
            name, f"stacks the experts of a layer, and expert {missing} is not adapted"
        )
    shapes = {(part.down.shape, part.up.shape) for part in ordered}
    if len(shapes) > 1 or not all(part.is_plain for part in ordered):
        raise UnsupportedError(name, "stacks experts, which have different shapes or kinds")
    scales = {part.scale for part in ordered}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ups = [part.up if part.scale == scale else part.up.scaled(part.scale) for part in ordered]
    down = Piled(tuple(part.down for part in ordered))
    joint = first.factored(down, Piled(tuple(ups)), scale=scale, note="experts stacked")
    return replace(joint, module=name, rank=first.rank)
