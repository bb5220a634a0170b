"""Modules as the one projection that an original checkpoint makes of them.

Parts that share A stack their rows; others get ranks of their own, and what is absent is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapter.model import Kind
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.files.container import read_bytes
from loratool.names.family import Fusion
from loratool.values.expr import (
    Constant,
    Expr,
    Placed,
    Stored,
    block_diagonal,
    concatenated,
    widest,
)
from loratool.write.fused_projections import (
    ROW_SLOTS,
    check_magnitude,
    check_splittable,
    swapped,
)

__all__ = ["fused"]


def fused(
    name: str,
    fusion: Fusion,
    members: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
) -> Part:
    """Return the native module ``name`` that ``members`` are parts of.

    Args:
        name: Its path.
        fusion: What it is made of.
        members: The parts that are adapted, by their local paths.
        shapes: Shapes of the base's weights by module path, where it is at hand.

    Raises:
        UnsupportedError: They cannot be fused.
    """
    first = next(iter(members.values()))
    if len(fusion.modules) == 1:
        if not fusion.swapped:
            return replace(first, module=name)
        return replace(swapped(first), module=name)
    for part in members.values():
        check_splittable(part, "fused")
        check_magnitude(part, "fused")
        if part.kind is not Kind.LINEAR:
            raise UnsupportedError(part.module, f"is a {part.kind.value} layer, and is not fused")
    heights = _heights(name, fusion, members, shapes)
    ordered = [members.get(module) for module in fusion.modules]
    present = [part for part in ordered if part is not None]
    if _share_down(present):
        up = _stacked_rows(ordered, heights)
        joint = first.factored(
            first.down, up, alpha=first.alpha, note="fused; its parts shared one A"
        )
    else:
        scales = {part.scale for part in present}
        scale = scales.pop() if len(scales) == 1 else None
        ups = [
            (part.up if scale is not None else part.up.scaled(part.scale)) if part else None
            for part in ordered
        ]
        joint = first.factored(
            concatenated([part.down for part in present]),
            block_diagonal(ups, heights),
            scale=1.0 if scale is None else scale,
            note="fused; every part has ranks of its own",
        )
    others = _fused_rows(name, ordered, heights)
    return replace(joint, module=name, values={**joint.values, **others})


def _stacked_rows(ordered: Sequence[Part | None], heights: Sequence[int]) -> Expr:
    """Return the Bs of parts one below the other, with zeros for those that are absent."""
    present = [part.up for part in ordered if part is not None]
    if len(present) == len(ordered):
        return concatenated(present)
    pieces, row = [], 0
    for part, height in zip(ordered, heights, strict=True):
        if part is not None:
            pieces.append((part.up, row, 0))
        row += height
    dtype = widest([value.dtype for value in present])
    return Placed(tuple(pieces), (row, *present[0].shape[1:]), dtype)


def _heights(
    name: str,
    fusion: Fusion,
    members: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, ...]:
    """Return how many rows each part of a fused module has, absent ones included."""
    known = {module: part.up.shape[0] for module, part in members.items()}
    into = next(iter(members.values())).down.shape[1]
    total = shapes.get(name, (None,))[0]
    heights = fusion.heights(into, total, known)
    if heights is None and total is not None:
        raise UnsupportedError(
            name,
            f"has {total} outputs in the base, which are not those of {', '.join(known)}",
            hint="is this the base that the adapter was trained on?",
        )
    if heights is None:
        raise UnsupportedError(
            name, "fuses a projection whose size the adapter does not tell", hint="give --base"
        )
    return heights


def _share_down(parts: Sequence[Part]) -> bool:
    """Whether all parts have the same A, and the same scale."""
    first = parts[0]
    if any(part.scale != first.scale or part.down.shape != first.down.shape for part in parts[1:]):
        return False
    tensors = [part.down.tensor for part in parts if isinstance(part.down, Stored)]
    if len(tensors) < len(parts) or len({tensor.spec.dtype for tensor in tensors}) > 1:
        return False
    places = {
        (tensor.path, tensor.offset, tensor.strides, tensor.steps, tensor.whole)
        for tensor in tensors
    }
    return len(places) == 1 or len({read_bytes(tensor) for tensor in tensors}) == 1


def _fused_rows(
    name: str, ordered: Sequence[Part | None], heights: Sequence[int]
) -> dict[Slot, Expr]:
    """Return biases and magnitudes of a fused module; absent biases are zero."""
    found: dict[Slot, Expr] = {}
    for slot in ROW_SLOTS:
        values = [part.values.get(slot) if part else None for part in ordered]
        present = [value for value in values if value is not None]
        if not present:
            continue
        if slot is Slot.MAGNITUDE and len(present) < len(ordered):
            raise UnsupportedError(
                name, "fuses projections of which only some have magnitudes (DoRA)"
            )
        scales = {part.scale for part in ordered if part is not None}
        if slot is Slot.UP_BIAS and len(scales) > 1:
            raise UnsupportedError(name, "fuses projections with biases and different scales")
        dtype = widest([value.dtype for value in present])
        pieces, row = [], 0
        for value, height in zip(values, heights, strict=True):
            pieces.append((value if value is not None else Constant(0.0, (height,), dtype), row, 0))
            row += height
        found[slot] = Placed(tuple(pieces), (row, *present[0].shape[1:]), dtype)
    return found
