"""Variants of LoRA that are low-rank matrices in disguise, as plain factors, exactly.

All functions return ``(up, down)`` of shapes ``(out, R)`` and ``(R, in)``, with the kernel of a
convolution flattened into the columns, ``(R, in · kh · kw)``, in the order in which its weight is
stored. Nothing is decomposed and no scale is applied: ``Δ = scale · up @ down`` with the scale of
the file that the tensors came from. Results have the dtype of the inputs.
"""

from __future__ import annotations

import math
from typing import TypeAlias, TypeGuard, cast

from loratool.math.namespace import Array, array_namespace

__all__ = [
    "flat",
    "fold_mid",
    "hadamard_factors",
    "hadamard_halves",
    "hadamard_rank",
    "kronecker_factors",
    "kronecker_halves",
    "kronecker_part",
    "kronecker_rank",
    "repeated_block",
    "shortest",
    "vera_factors",
]

Factors: TypeAlias = tuple[Array, Array]
Shape: TypeAlias = tuple[int, ...]


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
        return _split((up1 @ down1) * (up2 @ down2))
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
    files of LyCORIS and PEFT agree but for PEFT's full ``w2`` of a one-dimensional convolution.

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


def _split(matrix: Array) -> Factors:
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
        return _split(flat(half))
    a, b = half
    up, down = _half(a, b, core)
    if up.shape[1] > min(up.shape[0], down.shape[1]):
        return _split(up @ down)
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
    return (up, down) if up.shape[1] <= min(up.shape[0], down.shape[1]) else _split(up @ down)


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
