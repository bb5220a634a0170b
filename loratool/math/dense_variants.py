"""Variants of LoRA whose delta depends on the weight that they change.

All functions take the weight ``W`` as it is stored, ``(out, in)`` or ``(out, in, kh, kw)``, and
return ``W' - W`` in its shape and dtype, for a strength of one: other strengths mean different
things to different tools. Compute in float32 or float64. A bias has its own function where one
changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.math.exact_variants import fold_mid

__all__ = [
    "boft_delta",
    "diag_oft_delta",
    "dora_delta",
    "glora_delta",
    "ia3_delta",
    "is_old_glora",
]

TINY = 1e-8
"""What LyCORIS and kohya add to the norm of Q, so that it can be divided by."""


def ia3_delta(weight: Tensor, scale: Tensor, on_input: bool) -> Tensor:
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
    weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, bm: Tensor | None = None
) -> Tensor:
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
    """
    shapes = (weight.shape, a1.shape, a2.shape, b1.shape, b2.shape)
    if is_old_glora(*shapes):
        moved = weight.flatten(1) @ a2.flatten(1) @ a1.flatten(1)
        return (moved + b2.flatten(1) @ b1.flatten(1)).reshape(weight.shape)
    moved = torch.einsum("oi...,ir->or...", weight, a1.flatten(1))
    moved = torch.einsum("or...,ri->oi...", moved, a2.flatten(1))
    up, down = (b1.flatten(1), b2.flatten(1)) if bm is None else fold_mid(b1, b2, bm)
    return moved + (up @ down).reshape(weight.shape)


def diag_oft_delta(
    weight: Tensor, oft_blocks: Tensor, alpha: float = 0.0, rescale: Tensor | None = None
) -> Tensor:
    """Return the delta of blocks of rows that are rotated: ``rescale · Rᵀ W - W``.

    ``R = (I + Q)(I - Q)⁻¹`` with ``Q = blocks - blocksᵀ`` (arXiv 2306.07280). LyCORIS' Diag-OFT
    and kohya's OFT agree. ComfyUI does not multiply alpha by the number of rows.

    Args:
        weight: W.
        oft_blocks: ``(n, b, b)`` with ``n · b`` rows of W.
        alpha: The norm of all of Q is at most alpha times the number of rows; 0 is no limit.
        rescale: ``(out, 1)`` or ``(out, 1, 1, 1)``.
    """
    count, size, _ = oft_blocks.shape
    rotation = _cayley(_skew(oft_blocks, alpha * weight.shape[0]))
    blocks = weight.reshape(count, size, *weight.shape[1:])
    rotated = torch.einsum("knm,kn...->km...", rotation, blocks)
    return _rescaled(rotated.flatten(0, 1), rescale) - weight


def boft_delta(
    weight: Tensor, oft_blocks: Tensor, alpha: float = 0.0, rescale: Tensor | None = None
) -> Tensor:
    """Return the delta of rows rotated by a butterfly of blocks: ``rescale · R_m … R_1 W - W``.

    Stage i rotates rows that are ``2ⁱ · b / 2`` apart (LyCORIS; arXiv 2311.06243).

    Args:
        weight: W.
        oft_blocks: ``(m, n, b, b)``, m stages, with ``n · b`` rows of W.
        alpha: See :func:`diag_oft_delta`.
        rescale: ``(out, 1)`` or ``(out, 1, 1, 1)``.
    """
    _, count, size, _ = oft_blocks.shape
    rotated = weight.flatten(1)
    for stage, rotation in enumerate(_cayley(_skew(oft_blocks, alpha * weight.shape[0]))):
        distance = 2**stage * size // 2
        rows = rotated.reshape(-1, 2, distance, rotated.shape[1]).transpose(1, 2)
        turned = rotation @ rows.reshape(count, size, -1)
        rotated = turned.reshape(-1, distance, 2, rotated.shape[1]).transpose(1, 2).flatten(0, 2)
    return _rescaled(rotated.reshape(weight.shape), rescale) - weight


def dora_delta(weight: Tensor, delta: Tensor, magnitude: Tensor, out_axis: bool) -> Tensor:
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
    axis = 0 if out_axis else 1
    moved = weight + delta.reshape(weight.shape)
    others = [index for index in range(weight.ndim) if index != axis]
    norms = torch.linalg.vector_norm(moved, dim=others, keepdim=True, dtype=torch.float64)
    factor = _along(magnitude.double(), weight, axis) / norms
    factor = factor.where(norms > 0, 0.0).to(weight.dtype)
    return moved.mul_(factor).sub_(weight)


def _along(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``values`` in a shape that broadcasts along one axis of ``weight``."""
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    return values.reshape(shape)


def _skew(blocks: Tensor, limit: float) -> Tensor:
    """Return ``blocks - blocksᵀ``, scaled down where their norm together is beyond a limit."""
    skew = blocks - blocks.mT
    norm = float(skew.norm()) + TINY
    return skew * (limit / norm) if 0 < limit < norm else skew


def _cayley(skew: Tensor) -> Tensor:
    """Return the rotations ``(I + Q)(I - Q)⁻¹``, ``(…, b, b)``."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return rotation


def _rescaled(rotated: Tensor, rescale: Tensor | None) -> Tensor:
    return rotated if rescale is None else rotated * _along(rescale, rotated, axis=0)
