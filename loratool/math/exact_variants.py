"""Variants of LoRA that are low-rank matrices in disguise, as plain factors, exactly.

All functions return ``(up, down)`` of shapes ``(out, R)`` and ``(R, in)``, with the kernel of a
convolution flattened into the columns, ``(R, in · kh · kw)``, in the order in which its weight is
stored. Nothing is decomposed and no scale is applied: ``Δ = scale · up @ down`` with the scale of
the file that the tensors came from. Results have the dtype of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeAlias, TypeGuard, cast

import numpy as np

from loratool.math.namespace import Array, array_namespace

__all__ = [
    "bank_numbers",
    "bank_pieces",
    "block_factors",
    "exchanged_factors",
    "exchanged_part",
    "flat",
    "fold_mid",
    "hadamard_factors",
    "hadamard_halves",
    "hadamard_rank",
    "kronecker_factors",
    "kronecker_halves",
    "kronecker_part",
    "kronecker_rank",
    "leading_shares",
    "repeated_block",
    "shortest",
    "split_matrix",
    "summed",
    "unit_ranks",
    "vera_factors",
    "weighted_sum",
    "whole_shares",
]

Factors: TypeAlias = tuple[Array, Array]
Shape: TypeAlias = tuple[int, ...]

CHUNK: Final = 1024
"""Terms that are added at once."""


def fold_mid(up: Array, down: Array, mid: Array) -> Factors:
    """Fold the core of a CP or Tucker LoCon into its down projection; the rank stays.

    ``Δ[o, i, …] = Σ up[o, m] · mid[m, n, …] · down[n, i]`` (LyCORIS, ``lora_mid``).

    Args:
        up: ``(out, r)``, or ``(out, r, 1, 1)``.
        down: ``(r, in)``, or ``(r, in, 1, 1)``.
        mid: ``(r, r, kh, kw)``, or any other kernel.
    """
    xp = array_namespace(up, down, mid)
    folded = xp.tensordot(mid, flat(down), axes=((1,), (0,)))
    return flat(up), flat(xp.moveaxis(folded, -1, 1))


def hadamard_factors(
    w1_a: Array,
    w1_b: Array,
    w2_a: Array,
    w2_b: Array,
    t1: Array | None = None,
    t2: Array | None = None,
) -> Factors:
    """Return the factors of a LoHa, ``Δ = (w1_a @ w1_b) ∘ (w2_a @ w2_b)``.

    The product of two sums of outer products is the sum of the products of all pairs:
    ``up[:, pq] = w1_a[:, p] ∘ w2_a[:, q]``, ``down[pq] = w1_b[p] ∘ w2_b[q]``. Where that makes
    more columns than the smaller side of the matrix has, the matrix itself is a factor, and the
    other is the identity. The files of LyCORIS and PEFT (arXiv 2108.06098, FedPara) agree.

    Args:
        w1_a: ``(out, r1)``; with ``t1``, ``(r1, out)``.
        w1_b: ``(r1, in)``, kernels flattened or not; with ``t1``, ``(r1, in)``.
        w2_a: Like ``w1_a``.
        w2_b: Like ``w1_b``.
        t1: ``(r1, r1, kh, kw)`` of a convolution in Tucker form, where each half is
            ``Σ t[i, j, …] · w_a[i, o] · w_b[j, n]``.
        t2: ``(r2, r2, kh, kw)``; with ``t1`` or not at all.

    Raises:
        ValueError: Only one half has a core.
    """
    (up1, down1), (up2, down2) = hadamard_halves(w1_a, w1_b, w2_a, w2_b, t1, t2)
    if up1.shape[1] * up2.shape[1] > min(up1.shape[0], down1.shape[1]):
        return split_matrix((up1 @ down1) * (up2 @ down2))
    up = flat(up1[:, :, None] * up2[:, None, :])
    down = down1[:, None, :] * down2[None, :, :]
    return up, down.reshape((-1, down.shape[2]))


def hadamard_halves(
    w1_a: Array,
    w1_b: Array,
    w2_a: Array,
    w2_b: Array,
    t1: Array | None = None,
    t2: Array | None = None,
) -> tuple[Factors, Factors]:
    """Return the two matrices whose elements a LoHa multiplies, each as its factors.

    The arguments are those of :func:`hadamard_factors`.

    Raises:
        ValueError: Only one half has a core.
    """
    if (t1 is None) != (t2 is None):
        raise ValueError("only one half has a core")
    return _half(w1_a, w1_b, t1), _half(w2_a, w2_b, t2)


def hadamard_rank(
    w1_a: Shape,
    w1_b: Shape,
    w2_a: Shape,
    w2_b: Shape,
    t1: Shape | None = None,
    t2: Shape | None = None,
) -> int:
    """Return the rank of :func:`hadamard_factors` from shapes: ``min(r1 · r2, out, in · k)``."""
    out, columns = _half_shape(w1_a, w1_b, t1)
    return min(w1_b[0] * w2_b[0], out, columns)


def kronecker_factors(w1: Array | Factors, w2: Array | Factors, t2: Array | None = None) -> Factors:
    """Return the factors of a LoKr, ``Δ = w1 ⊗ w2``, of the smallest rank that shapes allow.

    ``(u1 @ v1) ⊗ (u2 @ v2) = (u1 ⊗ u2) @ (v1 ⊗ v2)``, for whatever factors the halves have: the
    stored ones, or the half itself and the identity on its smaller side, if that is smaller. The
    files of LyCORIS and PEFT agree but for PEFT's full ``w2`` of a one-dimensional convolution,
    which :func:`exchanged_factors` is for.

    Args:
        w1: ``(a, c)``, or ``w1_a`` ``(a, r1)`` and ``w1_b`` ``(r1, c)``.
        w2: ``(b, d)`` or ``(b, d, kh, kw)``; or ``w2_a`` ``(b, r2)`` and ``w2_b``
            ``(r2, d · kh · kw)``; with ``t2``, ``w2_a`` ``(r2, b)`` and ``w2_b`` ``(r2, d)``.
        t2: ``(r2, r2, kh, kw)`` of a convolution in Tucker form.

    Returns:
        ``(a · b, R)`` and ``(R, c · d · kh · kw)``.

    Raises:
        ValueError: A core with a full ``w2``.
    """
    up1, down1 = _smallest(w1, None)
    up2, down2 = _smallest(w2, t2)
    return _kron(up1, up2), _kron(down1, down2)


def kronecker_halves(
    w1: Array | Factors, w2: Array | Factors, t2: Array | None = None
) -> tuple[Array, Array]:
    """Return the two matrices of a LoKr, written out, kernels flattened.

    The arguments are those of :func:`kronecker_factors`.
    """
    return _written_out(w1, None), _written_out(w2, t2)


def kronecker_part(
    left: Array, right: Array, rows: range, columns: range, kernel: int = 1
) -> Array:
    """Return some rows and columns of ``left ⊗ right``, ``(rows, columns, kernel)``.

    Args:
        left: ``(a, c)``.
        right: ``(b, d · kernel)``.
        rows: Of the product, which has ``a · b``.
        columns: Of the product, which has ``c · d``.
        kernel: Places of a convolution's kernel.
    """
    xp = array_namespace(left, right)
    height, width = right.shape[0], right.shape[1] // kernel
    which = xp.arange(rows.start, rows.stop, device=left.device)
    first, last = columns.start // width, -(-columns.stop // width)
    outer = xp.take(left, which // height, axis=0)[:, first:last, None, None]
    inner = xp.take(right, which % height, axis=0).reshape((len(rows), 1, width, kernel))
    whole = (outer * inner).reshape((len(rows), -1, kernel))
    begin = columns.start - first * width
    return whole[:, begin : begin + len(columns), :]


def kronecker_rank(
    w1: Shape | tuple[Shape, Shape],
    w2: Shape | tuple[Shape, Shape],
    t2: Shape | None = None,
) -> int:
    """Return the rank of :func:`kronecker_factors` from shapes."""
    return _smallest_rank(w1, None) * _smallest_rank(w2, t2)


def exchanged_factors(w1: Array | Factors, w2: Array, t2: None = None) -> Factors:
    """Return the factors of ``Δ[…, k] = w2[…, k] ⊗ w1``, of a convolution of one dimension.

    Args:
        w1: ``(a, c)``, or ``w1_a`` ``(a, r1)`` and ``w1_b`` ``(r1, c)``.
        w2: ``(b, d, kernel)``.
        t2: None; there is no core beside a full ``w2``.

    Returns:
        ``(b · a, R)`` and ``(R, d · c · kernel)``.
    """
    up, down = kronecker_factors(w1, w2, t2)
    xp = array_namespace(up)
    rank, (height, width, kernel) = up.shape[1], w2.shape
    up = xp.permute_dims(up.reshape((-1, height, rank)), (1, 0, 2))
    down = xp.permute_dims(down.reshape((rank, -1, width, kernel)), (0, 2, 1, 3))
    return up.reshape((-1, rank)), down.reshape((rank, -1))


def exchanged_part(left: Array, right: Array, rows: range, columns: range, kernel: int) -> Array:
    """Return some rows and columns of ``right[…, k] ⊗ left``, ``(rows, columns, kernel)``.

    Args:
        left: ``(a, c)``.
        right: ``(b, d · kernel)``.
        rows: Of the product, which has ``b · a``.
        columns: Of the product, which has ``d · c``.
        kernel: Places of a convolution's kernel.
    """
    xp = array_namespace(left, right)
    down = xp.arange(rows.start, rows.stop, device=left.device)
    along = xp.arange(columns.start, columns.stop, device=left.device)
    whole = right.reshape((right.shape[0], -1, kernel))
    inner = xp.take(xp.take(left, down % left.shape[0], axis=0), along % left.shape[1], axis=1)
    outer = xp.take(xp.take(whole, down // left.shape[0], axis=0), along // left.shape[1], axis=1)
    return outer * inner[:, :, None]


def vera_factors(
    lambda_b: Array, lambda_d: Array, vera_a: Array, vera_b: Array, out: int, in_: int
) -> Factors:
    """Return the factors of a VeRA: ``diag(lambda_b) B[:out]``, ``diag(lambda_d) A[:, :in]``.

    PEFT's layout of arXiv 2310.11454: all layers share the largest A and B. It has no scale.

    Args:
        lambda_b: ``(out,)``.
        lambda_d: ``(r,)``.
        vera_a: A, ``(r, at least in)``.
        vera_b: B, ``(at least out, r)``.
        out: Rows of the weight.
        in_: Columns of the weight.

    Raises:
        ValueError: The shared matrices are smaller than the weight.
    """
    rows, columns = vera_b.shape[0], vera_a.shape[1]
    if rows < out or columns < in_:
        raise ValueError(f"{rows} × {columns} is too small to share with {out} × {in_}")
    return lambda_b[:, None] * vera_b[:out, :], lambda_d[:, None] * vera_a[:, :in_]


def weighted_sum(weights: Array, matrices: Array) -> Array:
    """Return ``Σ weights[i] · matrices[i]``, of ``(n,)`` and ``(n, rows, columns)``."""
    return array_namespace(weights, matrices).sum(weights[:, None, None] * matrices, axis=0)


def flat(array: Array) -> Array:
    """Return a matrix ``(d, all the rest)``."""
    return array.reshape((array.shape[0], math.prod(array.shape[1:])))


def _kron(one: Array, other: Array) -> Array:
    """Return ``one ⊗ other`` of two matrices."""
    blocks = one[:, None, :, None] * other[None, :, None, :]
    rows, columns = one.shape[0] * other.shape[0], one.shape[1] * other.shape[1]
    return blocks.reshape((rows, columns))


def _half(a: Array, b: Array, core: Array | None) -> Factors:
    """Return ``(out, r)`` and ``(r, in · kernel)``; with a core, ``a`` is stored transposed."""
    if core is None:
        return flat(a), flat(b)
    return fold_mid(a.mT, b, core)


def _written_out(half: Array | Factors, core: Array | None) -> Array:
    """Return one side of a Kronecker product as a matrix."""
    if not isinstance(half, tuple):
        return flat(half)
    a, b = half
    up, down = _half(a, b, core)
    return up @ down


def _half_shape(a: Shape, b: Shape, core: Shape | None) -> tuple[int, int]:
    """Return the shape of the product of :func:`_half`."""
    if core is None:
        return a[0], math.prod(b[1:])
    return a[1], math.prod((*b[1:], *core[2:]))


def split_matrix(matrix: Array) -> Factors:
    """Return factors of any matrix: itself, and the identity on its smaller side."""
    rows, columns = matrix.shape
    identity = array_namespace(matrix).eye(
        min(rows, columns), dtype=matrix.dtype, device=matrix.device
    )
    return (identity, matrix) if rows < columns else (matrix, identity)


def _smallest(half: Array | Factors, core: Array | None) -> Factors:
    """Return the factors of one side of a Kronecker product with the fewest columns."""
    if not isinstance(half, tuple):
        if core is not None:
            raise ValueError("a core belongs to a factored half")
        return split_matrix(flat(half))
    a, b = half
    up, down = _half(a, b, core)
    if up.shape[1] > min(up.shape[0], down.shape[1]):
        return split_matrix(up @ down)
    return up, down


def _smallest_rank(half: Shape | tuple[Shape, Shape], core: Shape | None) -> int:
    if _is_pair(half):
        return min(half[1][0], *_half_shape(*half, core))
    rows, *columns = cast("Shape", half)
    return min(rows, math.prod(columns))


def _is_pair(half: Shape | tuple[Shape, Shape]) -> TypeGuard[tuple[Shape, Shape]]:
    return isinstance(half[0], tuple)


def shortest(up: Array, down: Array) -> Factors:
    """Return factors of no more columns than the smaller side of their product has."""
    return (up, down) if up.shape[1] <= min(up.shape[0], down.shape[1]) else split_matrix(up @ down)


def summed(made: Callable[[slice], Factors], count: int, smallest: int, each: int) -> Factors:
    """Return the factors of a sum of many terms, or their sum itself where that is smaller.

    Args:
        made: Returns the factors of some of the terms.
        count: How many terms there are.
        smallest: The smaller side of the matrix.
        each: Ranks of a term.
    """
    if count * each <= smallest:
        return made(slice(None))
    whole: Array = 0.0
    for start in range(0, count, CHUNK):
        up, down = made(slice(start, start + CHUNK))
        whole = whole + up @ down
    return split_matrix(whole)


def repeated_block(block: Array, out: int, into: int) -> Factors:
    """Return the factors of ``Δ[o, i] = block[i mod r, o mod c]``.

    Args:
        block: ``(r, c)``.
        out: Rows, a multiple of c.
        into: Columns; the last repetition may be cut.
    """
    xp = array_namespace(block)
    rank, columns = block.shape
    up = xp.concat([block.mT] * (out // columns), axis=0)
    eye = xp.eye(rank, dtype=block.dtype, device=block.device)
    return up, xp.concat([eye] * -(-into // rank), axis=1)[:, :into]


def unit_ranks(down: Array, up: Array, strength: Array, norms: Array) -> Factors:
    """Return the factors of ``B diag(λ / r / (‖aᵢ‖ ‖bᵢ‖)) A diag(n)``; lengths are 1e-4 at least.

    Args:
        down: A, ``(r, in)``.
        up: B, ``(out, r)``.
        strength: λ, one number.
        norms: n, ``(in,)``.
    """
    xp = array_namespace(down, up, strength, norms)
    rows = xp.sqrt(xp.sum(down * down, axis=1))
    columns = xp.sqrt(xp.sum(up * up, axis=0))
    lengths = xp.where(rows > 1e-4, rows, 1e-4) * xp.where(columns > 1e-4, columns, 1e-4)
    factors = strength.reshape(-1) / down.shape[0] / lengths
    return up, factors[:, None] * down * norms.reshape((1, -1))


def block_factors(down: Array, up: Array, general: Factors | None) -> Factors:
    """Return the factors of a weight whose blocks have factors of their own.

    The block of inputs i and outputs o is the product of the o-th part of the ranks of i's A and
    of the i-th part of those of o's B.

    Args:
        down: A of each block of inputs, ``(k, in / k, r)``.
        up: B of each block of outputs, ``(k, r, out / k)``.
        general: Further A ``(h, in)`` and B ``(out, h)`` of the whole weight.
    """
    xp = array_namespace(down, up)
    count, width, rank = down.shape
    height, part = up.shape[2], rank // count
    rows, columns = [], []
    for into in range(count):
        for out in range(count):
            a = down[into, :, out * part : (out + 1) * part].mT
            b = up[out, into * part : (into + 1) * part, :].mT
            rows.append(_inside(a, 1, into * width, count * width))
            columns.append(_inside(b, 0, out * height, count * height))
    if general is not None:
        rows.append(general[0])
        columns.append(general[1])
    return xp.concat(columns, axis=1), xp.concat(rows, axis=0)


def _inside(matrix: Array, axis: int, first: int, size: int) -> Array:
    """Return a matrix with zeros before and behind it, so that one side is as long as asked."""
    xp = array_namespace(matrix)
    shape = list(matrix.shape)
    parts = []
    for length in (first, size - first - matrix.shape[axis]):
        shape[axis] = length
        parts.append(xp.zeros(tuple(shape), dtype=matrix.dtype, device=matrix.device))
    return xp.concat([parts[0], matrix, parts[1]], axis=axis)


def leading_shares(logits: Array, count: int) -> tuple[Array, Array]:
    """Return which of the last axis are the largest, and their softmax among each other.

    Args:
        logits: ``(…, n)``.
        count: How many.
    """
    xp = array_namespace(logits)
    order = xp.argsort(logits, axis=-1, descending=True) if xp is not np else _descending(logits)
    chosen = order[..., :count]
    values = xp.take_along_axis(logits, chosen, axis=-1)
    powers = xp.exp(values - xp.max(values, axis=-1, keepdims=True))
    return chosen, powers / xp.sum(powers, axis=-1, keepdims=True)


def _descending(values: Array) -> Array:
    return np.argsort(-values, axis=-1, kind="stable")


def whole_shares(shares: Array) -> Array:
    """Return shares with the last one, which was left out: all add up to one."""
    xp = array_namespace(shares)
    return xp.concat([shares, 1 - xp.sum(shares, axis=-1, keepdims=True)], axis=-1)


def bank_numbers(bank: Array, chosen: Array) -> Array:
    """Return numbers of a vector in the shape of what tells their places."""
    xp = array_namespace(bank, chosen)
    return xp.take(bank, xp.astype(chosen, xp.int64).reshape(-1)).reshape(chosen.shape)


def bank_pieces(bank: Array, chosen: Array, shares: Array) -> Array:
    """Return sums of vectors of a bank, ``(…, length)``.

    Args:
        bank: ``(n, length)``.
        chosen: Which vectors, ``(…, k)``.
        shares: How much of each, ``(…, k)``.
    """
    xp = array_namespace(bank, shares)
    places = xp.astype(chosen, xp.int64).reshape(-1)
    vectors = xp.take(bank, places, axis=0).reshape((*chosen.shape, bank.shape[1]))
    return xp.sum(vectors * shares[..., None], axis=-2)
