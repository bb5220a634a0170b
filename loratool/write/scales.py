"""Where the scale of each module goes: recorded, or folded into B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.part import Part
from loratool.adapter.scheme import ScaleRule
from loratool.adapter.slots import Slot

__all__ = ["common_scale", "folded", "placed_scales"]


def placed_scales(
    parts: Sequence[Part], rule: ScaleRule, *, fold: bool
) -> tuple[list[Part], float | None]:
    """Return ``parts`` as a scheme with this rule stores them, and mlx's one multiplier.

    Args:
        parts: The modules.
        rule: Where the scheme keeps the scale.
        fold: Put it into the factors in any case.
    """
    if fold or rule is ScaleRule.FOLDED:
        return [folded(part) for part in parts], 1.0 if rule is ScaleRule.MULTIPLIER else None
    if rule is ScaleRule.MULTIPLIER:
        scale = common_scale(parts)
        if scale is not None:
            return list(parts), scale
        return [folded(part) for part in parts], 1.0
    return list(parts), None


def common_scale(parts: Sequence[Part]) -> float | None:
    """Return the scale that all parts have, or ``None`` if they differ."""
    scales = {part.scale for part in parts}
    return scales.pop() if len(scales) == 1 else None


def folded(part: Part) -> Part:
    """Return a part whose factors hold its scale."""
    if part.scale == 1 or not part.is_plain:
        return part
    values = dict(part.values)
    up = part.slots[1]
    values[up] = values[up].scaled(part.scale)
    if Slot.UP_BIAS in values:
        values[Slot.UP_BIAS] = values[Slot.UP_BIAS].scaled(part.scale)
    note = f"its scale {part.scale:g} was multiplied into B"
    return replace(part, values=values, scale=1.0, alpha=None, notes=(*part.notes, note))
