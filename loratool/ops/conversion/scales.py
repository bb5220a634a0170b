"""Where the scale of each module goes: recorded, or folded into B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.scheme import ScaleRule
from loratool.adapter.slots import Slot
from loratool.ops.conversion.parts import Part
from loratool.ops.conversion.views import scaled

__all__ = ["common_scale", "folded", "placed_scales"]


def placed_scales(parts: Sequence[Part], rule: ScaleRule) -> tuple[list[Part], float | None]:
    """Return ``parts`` as a scheme with this rule stores them, and mlx's one multiplier."""
    if rule is ScaleRule.FOLDED:
        return [folded(part) for part in parts], None
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
    values[up] = scaled(values[up], part.scale)
    if Slot.UP_BIAS in values:
        values[Slot.UP_BIAS] = scaled(values[Slot.UP_BIAS], part.scale)
    note = f"its scale {part.scale:g} was multiplied into B"
    return replace(part, values=values, scale=1.0, alpha=None, notes=(*part.notes, note))
