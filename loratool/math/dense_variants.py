"""Variants of LoRA whose delta depends on the weight that they change.

All functions take the weight ``W`` as it is stored, ``(out, in)`` or ``(out, in, kh, kw)``, and
return ``W' - W`` in its shape and dtype, for a strength of one: other strengths mean different
things to different tools. Compute in float32 or float64. A bias has its own function where one
changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratool.math.exact_variants import flat, fold_mid
from loratool.math.namespace import Array, array_namespace, double, squared_norm

__all__ = [
    "boft_delta",
    "circulant",
    "diag_oft_delta",
    "dora_delta",
    "glora_delta",
    "ia3_delta",
    "is_old_glora",
    "projector",
    "rotation_delta",
    "rotations",
]

TINY = 1e-8
"""What LyCORIS and kohya add to the norm of Q, so that it can be divided by."""


def ia3_delta(weight: Array, scale: Array, on_input: bool) -> Array:
    """Return ``W ∘ scale`` along the rows or columns: LyCORIS' IA³ (arXiv 2205.05638).

    LyCORIS stores how far the scale is from one, so that zeros change nothing.

    Args:
        weight: W.
        scale: ``(d,)``, ``(1, d, 1, 1)``, or any other shape with d elements.
        on_input: Whether d is the number of columns, not that of rows.
    """
    return weight * _along(scale, weight, axis=1 if on_input else 0)


def is_old_glora(
    weight: Sequence[int],
    a1: Sequence[int],
    a2: Sequence[int],
    b1: Sequence[int],
    b2: Sequence[int],
) -> bool:
    """Tell the layout of LyCORIS before 2.0 from today's by shapes; today's wins a tie."""
    new = a1[0] == a2[1] == weight[1] and b1[0] == weight[0]
    new = new and a1[1] == a2[0] == b1[1] == b2[0]
    old = a1[0] == a2[1] == b1[0] == b2[1] and b2[0] == weight[0]
    return old and not new


def glora_delta(
    weight: Array,
    a1: Array,
    a2: Array,
    b1: Array,
    b2: Array,
    bm: Array | None = None,
    *,
    is_old: bool | None = None,
) -> Array:
    """Return ``W·a1·a2 + b1·b2``, unscaled: LyCORIS' GLoRA (arXiv 2306.07967).

    ``a1·a2`` acts on W's input channels, the same at each place of a kernel. The layout of
    LyCORIS before 2.0 is ``W·a2·a1 + b2·b1``, on flattened kernels; ComfyUI reads both.

    Args:
        weight: W.
        a1: ``(in, r)``, with trailing ones for convolutions, as the others; formerly ``(r, in)``.
        a2: ``(r, in)``; formerly ``(in, r)``.
        b1: ``(out, r)``; formerly ``(r, in, kh, kw)``.
        b2: ``(r, in, kh, kw)``; formerly ``(out, r)``.
        bm: ``(r, r, kh, kw)``, the core between ``b1`` and ``b2``.
        is_old: Whether it is the former layout, where the shapes are not to tell.
    """
    if is_old is None:
        is_old = is_old_glora(weight.shape, a1.shape, a2.shape, b1.shape, b2.shape)
    if is_old:
        moved = flat(weight) @ flat(a2) @ flat(a1)
        return (moved + flat(b2) @ flat(b1)).reshape(weight.shape)
    xp = array_namespace(weight, a1, a2, b1, b2, bm)
    inputs = xp.moveaxis(weight, 1, -1)
    moved = xp.moveaxis(inputs @ flat(a1) @ flat(a2), -1, 1)
    up, down = (flat(b1), flat(b2)) if bm is None else fold_mid(b1, b2, bm)
    return moved + (up @ down).reshape(weight.shape)


def diag_oft_delta(
    weight: Array, oft_blocks: Array, alpha: float = 0.0, rescale: Array | None = None
) -> Array:
    """Return the delta of blocks of rows that are rotated: ``rescale · Rᵀ W - W``.

    ``R = (I + Q)(I - Q)⁻¹`` with ``Q = blocks - blocksᵀ`` (arXiv 2306.07280). LyCORIS' Diag-OFT
    and kohya's OFT agree. ComfyUI does not multiply alpha by the number of rows.

    Args:
        weight: W.
        oft_blocks: ``(n, b, b)`` with ``n · b`` rows of W.
        alpha: The norm of all of Q is at most alpha times the number of rows; 0 is no limit.
        rescale: ``(out, 1)`` or ``(out, 1, 1, 1)``.
    """
    return rotation_delta(weight, rotations(oft_blocks, alpha * weight.shape[0]), rescale)


def rotations(oft_blocks: Array, limit: float = 0.0) -> Array:
    """Return ``(I + Q)(I - Q)⁻¹`` of each block, ``(…, b, b)``; see :func:`diag_oft_delta`.

    Args:
        oft_blocks: ``(…, b, b)``.
        limit: The norm of all of Q is at most this; 0 is no limit.
    """
    return _cayley(_skew(oft_blocks, limit))


def rotation_delta(weight: Array, blocks: Array, rescale: Array | None = None) -> Array:
    """Return ``rescale · Rᵀ W - W`` of blocks of rows.

    Args:
        weight: W, or whole blocks of its rows.
        blocks: R of each, ``(n, b, b)``.
        rescale: A factor for each row.
    """
    count, size, _ = blocks.shape
    rotated = blocks.mT @ weight.reshape((count, size, -1))
    return _rescaled(rotated.reshape(weight.shape), rescale) - weight


def boft_delta(
    weight: Array, oft_blocks: Array, alpha: float = 0.0, rescale: Array | None = None
) -> Array:
    """Return the delta of rows rotated by a butterfly of blocks: ``rescale · R_m … R_1 W - W``.

    Stage i rotates rows that are ``2ⁱ · b / 2`` apart (LyCORIS; arXiv 2311.06243).

    Args:
        weight: W.
        oft_blocks: ``(m, n, b, b)``, m stages, with ``n · b`` rows of W.
        alpha: See :func:`diag_oft_delta`.
        rescale: ``(out, 1)`` or ``(out, 1, 1, 1)``.
    """
    xp = array_namespace(weight, oft_blocks, rescale)
    stages, count, size, _ = oft_blocks.shape
    turns = rotations(oft_blocks, alpha * weight.shape[0])
    rotated = flat(weight)
    columns = rotated.shape[1]
    for stage in range(stages):
        distance = 2**stage * size // 2
        rows = xp.moveaxis(rotated.reshape((-1, 2, distance, columns)), 1, 2)
        turned = turns[stage, ...] @ rows.reshape((count, size, columns))
        rows = xp.moveaxis(turned.reshape((-1, distance, 2, columns)), 1, 2)
        rotated = rows.reshape((-1, columns))
    return _rescaled(rotated.reshape(weight.shape), rescale) - weight


def dora_delta(weight: Array, delta: Array, magnitude: Array, out_axis: bool) -> Array:
    """Return ``magnitude / ‖W + Δ‖ · (W + Δ) - W`` (DoRA, arXiv 2402.09353).

    Rows or columns that are all zero stay so. LyCORIS adds a rounding unit to the norm; PEFT does
    not, nor does this.

    Args:
        weight: W.
        delta: Δ with its scale, of as many elements as W.
        magnitude: ``(d,)``, ``(d, 1)``, ``(1, d)``, or any other shape with d elements.
        out_axis: Whether norms are those of rows, ``d = out``, as everywhere today; not those of
            input channels, ``d = in``, as in older files of LyCORIS.
    """
    xp = array_namespace(weight, delta, magnitude)
    axis = 0 if out_axis else 1
    moved = weight + delta.reshape(weight.shape)
    others = tuple(index for index in range(weight.ndim) if index != axis)
    norms = xp.sqrt(xp.sum(double(moved) ** 2, axis=others, keepdims=True))
    factor = _along(double(magnitude), weight, axis) / xp.where(norms > 0, norms, 1.0)
    factor = xp.where(norms > 0, factor, 0.0)
    return moved * xp.astype(factor, weight.dtype) - weight


def _along(values: Array, weight: Array, axis: int) -> Array:
    """Return ``values`` in a shape that broadcasts along one axis of ``weight``."""
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    return values.reshape(tuple(shape))


def _skew(blocks: Array, limit: float) -> Array:
    """Return ``blocks - blocksᵀ``, scaled down where their norm together is beyond a limit."""
    skew = blocks - blocks.mT
    norm = math.sqrt(squared_norm(skew)) + TINY
    return skew * (limit / norm) if 0 < limit < norm else skew


def _cayley(skew: Array) -> Array:
    """Return the rotations ``(I + Q)(I - Q)⁻¹``, ``(…, b, b)``."""
    xp = array_namespace(skew)
    identity = xp.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return xp.linalg.solve(identity - skew, identity + skew)  # the two commute


def _rescaled(rotated: Array, rescale: Array | None) -> Array:
    return rotated if rescale is None else rotated * _along(rescale, rotated, axis=0)


def circulant(kernel: Array) -> Array:
    """Return blocks whose rows are one, each moved on by a place: ``(p · b, q · b)``.

    Args:
        kernel: The first row of each block, ``(p, q, b)``.
    """
    xp = array_namespace(kernel)
    rows, columns, size = kernel.shape
    shifted = [xp.roll(kernel, shift, axis=2) for shift in range(size)]
    return xp.stack(shifted, axis=1).reshape((rows * size, columns * size))


def projector(directions: Array, is_orthogonal: bool) -> tuple[Array, Array]:
    """Return Q and P of ``Q Pᵀ``: an orthonormal basis twice, or the columns and what is above 0.

    Args:
        directions: ``(out, r)``.
        is_orthogonal: Whether an orthonormal basis is made of them.
    """
    xp = array_namespace(directions)
    if is_orthogonal:
        basis = xp.linalg.qr(directions)[0]
        return basis, basis
    return directions, xp.where(directions > 0, directions, 0.0)
