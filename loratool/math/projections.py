"""Random matrices that adapters store the seed of, and the deltas that are made with them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from loratool.math.namespace import Array, array_namespace, beside
from loratool.math.torch_random import TorchGenerator, to_bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = [
    "drawn_place",
    "fourier_factors",
    "fourier_places",
    "randlora_factors",
    "randlora_projections",
    "tinylora_projections",
    "vera_projections",
]

Pair: TypeAlias = "tuple[Floats, Floats]"
ROUNDED: Final = 0.02
"""What projections differ in at most that were rounded when they were saved, by the largest."""


@lru_cache(maxsize=2)
def vera_projections(seed: int, ranks: tuple[int, int], out: int, into: int) -> Pair:
    """Return A ``(r, in)`` and B ``(out, r)`` as PEFT's VeRA draws them.

    Args:
        seed: The seed.
        ranks: Rows of A and columns of B.
        out: The most outputs of any layer.
        into: The most inputs of any layer.
    """
    generator = TorchGenerator(seed)
    shapes = (ranks[0], into), (out, ranks[1])
    one, other = (
        generator.uniform(shape, -bound, bound).astype(np.float64)
        for shape in shapes
        for bound in (math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1])),)
    )
    return one, other


@lru_cache(maxsize=2)
def randlora_projections(seed: int, rank: int, out: int, into: int, sparsity: float) -> Pair:
    """Return A ``(r, 1, min)`` and B ``(max, n, r)`` as PEFT's RandLoRA draws them.

    Args:
        seed: The seed.
        rank: r.
        out: The most outputs of any layer.
        into: The most inputs of any layer.
        sparsity: 0 for uniform numbers; else of so many one is not zero.
    """
    generator = TorchGenerator(seed)
    small, large = min(out, into), max(out, into)
    bases = -(-small // rank)
    if sparsity:
        one, other = (
            _signs(generator.uniform(shape, 0.0, 1.0), sparsity)
            for shape in ((rank, 1, small), (large, bases, rank))
        )
        return one, other
    first = _kaiming(generator, (rank, 1, small))
    parts = [_kaiming(generator, (large, 1, rank)) for _ in range(bases)]
    whole = np.concatenate(parts, axis=1)
    return _standardised(first), _standardised(whole)


def _kaiming(generator: TorchGenerator, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return numbers of bfloat16, uniform between bounds that fit the inputs of a layer."""
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    bound = math.sqrt(3.0) * (gain / math.sqrt(shape[1] * shape[2]))
    return generator.uniform(shape, -bound, bound, "bfloat16")


def _standardised(values: NDArray[np.float32]) -> Floats:
    """Divide by the standard deviation, both of bfloat16, and round to that."""
    deviation = to_bfloat16(np.std(values, ddof=1, dtype=np.float64).astype(np.float32))
    return to_bfloat16(values / deviation).astype(np.float64)


def _signs(values: NDArray[np.float32], sparsity: float) -> Floats:
    """Return -1, 0 or 1 for each number, divided by their standard deviation in float32."""
    edge = 1 / (2 * sparsity)
    low, high = np.float32(edge), np.float32(1 - edge)
    signs = (values > high).astype(np.float32) - (values < low).astype(np.float32)
    deviation = np.std(signs, ddof=1, dtype=np.float64).astype(np.float32)
    return (signs / deviation).astype(np.float64)


def randlora_factors(
    a: Array, b: Array, weights: Array, scales: Array, out: int, into: int
) -> tuple[Array, Array]:
    """Return B ``(out, r · n)`` and A ``(r · n, in)`` of a RandLoRA, without its scale.

    PEFT lays the rows of A out rank by rank, the columns of B basis by basis, and multiplies them
    by their places all the same.

    Args:
        a: ``(r, 1, at least min)``.
        b: ``(at least max, at least n, r)``.
        weights: λ, ``(r, n)``.
        scales: γ, ``(n, min)``.
        out: Rows of the weight.
        into: Columns of the weight.
    """
    small, large, bases = min(out, into), max(out, into), weights.shape[1]
    rows = a[:, :, :small] * weights[:, :, None] * scales[None, :, :]
    down = rows.reshape((-1, small))
    up = b[:large, :bases, :].reshape((large, -1))
    return (up, down) if small == into else (down.mT, up.mT)


@lru_cache(maxsize=1024)
def tinylora_projections(seed: int, count: int, rank: int) -> NDArray[np.float32]:
    """Return the projections ``(count, r, r)`` as PEFT's TinyLoRA draws them."""
    return TorchGenerator(seed).normal((count, rank, rank), 1.0 / math.sqrt(rank))


def drawn_place(projections: Floats, seed: int, count: int) -> int | None:
    """Return which of so many seeds, one after the other, drew some projections of TinyLoRA."""
    numbers, rank, _ = projections.shape
    limit = ROUNDED * float(np.abs(projections).max(initial=0.0))
    for place in range(count):
        drawn = tinylora_projections(seed + place, numbers, rank)
        if np.abs(drawn - projections).max(initial=0.0) <= limit:
            return place
    return None


@lru_cache(maxsize=64)
def fourier_places(seed: int, count: int, out: int, into: int) -> tuple[NDArray[np.int64], ...]:
    """Return rows and columns of the entries of a spectrum that are not zero."""
    places = TorchGenerator(seed).first_of_permutation(out * into, count)
    return places // into, places % into


def fourier_factors(
    values: Array, places: tuple[NDArray[np.int64], ...], out: int, into: int
) -> tuple[Array, Array]:
    """Return B and A of the real part of the inverse Fourier transform of a sparse spectrum.

    ``cos(a + b) = cos a cos b - sin a sin b``: each entry adds two outer products.

    Args:
        values: ``(n,)``.
        places: Rows and columns of the entries, ``(n,)`` each.
        out: Rows of the transform.
        into: Columns of the transform.
    """
    xp = array_namespace(values)
    angles = [
        # Whole turns are taken out before anything is rounded.
        beside(2 * np.pi * ((np.arange(size)[:, None] * which) % size) / size, values)
        for size, which in zip((out, into), places, strict=True)
    ]
    scaled = values / (out * into)
    rows, columns = angles
    up = xp.concat([xp.cos(rows) * scaled, -xp.sin(rows) * scaled], axis=1)
    return up, xp.concat([xp.cos(columns), xp.sin(columns)], axis=1).mT
