"""Named ways to combine deltas of one weight other than their sum, in small joint spaces.

The published methods work on every element of dense deltas. Here they work on the deltas' joint
core (Core Space, arXiv 2509.17786): with orthonormal bases U of all their columns and V of all
their rows, ``Δᵢ = U Mᵢ Vᵀ`` loses nothing, and the ``Mᵢ`` are as small as the sum of the ranks.
The bases are the singular vectors of ``[Δ₁ … Δ_T]`` and of ``[Δ₁; …; Δ_T]``, so that the result
depends on the deltas alone, not on how somebody factored them nor on their order. Methods that
look at single elements depend on the basis: they are not the same as on dense weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.math.factored import Factored, factor, from_core
from loratool.math.lowrank import LowRank
from loratool.math.namespace import Array, array_namespace, beside, double
from loratool.math.small import svd

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Settings", "combine", "peft_linear"]

NEGLIGIBLE: Final = 1e-13
"""Of the largest singular value: below it a direction is the rounding of float64."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the methods can be told.

    Attributes:
        density: The share of elements to keep.
        epsilon: DELLA's window: drop probabilities differ by this much from the largest to the
            smallest element of a row.
    """

    density: float = 0.5
    epsilon: float = 0.1


def combine(
    method: str,
    deltas: Sequence[LowRank],
    weights: Sequence[float],
    settings: Settings,
    generator: np.random.Generator,
) -> Factored:
    """Combine ``deltas``, all ``(m, n)``, with one weight each.

    Args:
        method: ``ties`` (arXiv 2306.01708), ``dare`` and ``dare-ties`` (2311.03099), ``della``
            (2406.11617), ``knots`` (2410.19735, with TIES).
        deltas: The deltas.
        weights: A number for each.
        settings: Density and so on.
        generator: The random methods draw from it.
    """
    if method == "knots":
        return _knots(deltas, weights, settings.density)
    left, right, cores = _joint(deltas)
    xp = array_namespace(cores)
    if 0 in cores.shape:
        return from_core(left, xp.sum(cores, axis=0), right)
    match method:
        case "ties":
            merged = _ties(_trimmed(cores, settings.density), weights)
        case "dare":
            kept = _dropped(cores, settings.density, generator)
            merged = xp.sum(kept * _column(weights, kept), axis=0)
        case "dare-ties":
            merged = _ties(_dropped(cores, settings.density, generator), weights)
        case "della":
            merged = _ties(_magnitude_dropped(cores, settings, generator), weights)
        case _:
            raise ValueError(method)
    return from_core(left, merged, right)


def peft_linear(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Combine factor by factor as PEFT's ``combination_type="linear"`` does (0.19 and later).

    ``A = Σ sign(wᵢsᵢ) √|wᵢsᵢ| Aᵢ`` and ``B = Σ √|wᵢsᵢ| Bᵢ``: their product has cross terms that
    no adapter was trained for. All must have one rank.
    """
    amounts = [weight * delta.scale for weight, delta in zip(weights, deltas, strict=True)]
    roots = [math.sqrt(abs(amount)) for amount in amounts]
    pairs = list(zip(deltas, roots, strict=True))
    up = sum(double(delta.up) * root for delta, root in pairs)
    down = sum(
        double(delta.down) * math.copysign(root, amount)
        for (delta, root), amount in zip(pairs, amounts, strict=True)
    )
    return LowRank(up, down)


def _joint(deltas: Sequence[LowRank]) -> tuple[Array, Array, Array]:
    """Return U ``(m, p)``, V ``(n, q)`` and the cores ``(T, p, q)``."""
    xp = array_namespace(*(delta.up for delta in deltas))
    left, upper = xp.linalg.qr(xp.concat([double(delta.up) for delta in deltas], axis=1))
    right, lower = xp.linalg.qr(xp.concat([double(delta.down).mT for delta in deltas], axis=1))
    cores = []
    for delta, part in zip(deltas, _parts(deltas), strict=True):
        cores.append(upper[:, part] @ lower[:, part].mT * delta.scale)
    U = _leading(xp.concat(cores, axis=1))
    V = _leading(xp.concat(cores, axis=0).mT)
    return left @ U, right @ V, xp.stack([U.mT @ core @ V for core in cores])


def _parts(deltas: Sequence[LowRank]) -> list[slice]:
    """Return which columns of all of them side by side are those of each."""
    ends = list(itertools.accumulate(delta.rank for delta in deltas))
    return [slice(end - delta.rank, end) for delta, end in zip(deltas, ends, strict=True)]


def _leading(matrix: Array) -> Array:
    """Return the left singular vectors that matter."""
    U, S, _ = svd(matrix)
    return U[:, : _significant(S)]


def _significant(values: Array) -> int:
    """Return how many of the descending singular values are more than rounding."""
    xp = array_namespace(values)
    return int(xp.count_nonzero(values > values[:1] * NEGLIGIBLE))


def _knots(deltas: Sequence[LowRank], weights: Sequence[float], density: float) -> Factored:
    """TIES on the ``Vᵢ`` of ``[Δ₁ … Δ_T] = U S [V₁ᵀ … V_Tᵀ]``."""
    xp = array_namespace(*(delta.up for delta in deltas))
    left, upper = xp.linalg.qr(xp.concat([double(delta.up) for delta in deltas], axis=1))
    rows = [
        upper[:, part] @ double(delta.down) * delta.scale
        for delta, part in zip(deltas, _parts(deltas), strict=True)
    ]
    U, S, Vh = svd(xp.concat(rows, axis=1))
    count = _significant(S)
    if not count:
        return from_core(left, rows[0][:, :1] * 0.0, rows[0][:1, :].mT * 0.0)
    width = rows[0].shape[1]
    starts = range(0, width * len(deltas), width)
    parts = xp.stack([Vh[:count, start : start + width] for start in starts])
    merged = _ties(_trimmed(parts, density), weights)
    return factor(LowRank(left @ (U[:, :count] * S[:count]), merged))


def _column(weights: Sequence[float], like: Array) -> Array:
    xp = array_namespace(like)
    return xp.asarray(list(weights), dtype=like.dtype, device=like.device)[:, None, None]


def _trimmed(parts: Array, density: float) -> Array:
    """Keep the ``density`` largest elements of each part; of equal ones, those that come first."""
    xp = array_namespace(parts)
    flat = xp.abs(xp.reshape(parts, (parts.shape[0], -1)))
    count = max(1, int(density * flat.shape[1]))
    least = xp.sort(flat, axis=1)[:, -count][:, None]
    larger, equal = flat > least, flat == least
    room = count - xp.count_nonzero(larger, axis=1)[:, None]
    kept = larger | (equal & (xp.cumulative_sum(xp.astype(equal, xp.int64), axis=1) <= room))
    return xp.where(xp.reshape(kept, parts.shape), parts, 0.0)


def _dropped(parts: Array, density: float, generator: np.random.Generator) -> Array:
    """Keep each element with probability ``density``, and make up for the others."""
    xp = array_namespace(parts)
    return xp.where(_chance(parts, generator) < density, parts / density, 0.0)


def _magnitude_dropped(parts: Array, settings: Settings, generator: np.random.Generator) -> Array:
    """Drop small elements of a row more often than large ones, and make up for each (MAGPRUNE).

    Of equal elements, those that come first count as larger.
    """
    xp = array_namespace(parts)
    columns = parts.shape[2]
    order = xp.argsort(-xp.abs(parts), axis=2, stable=True)
    places = xp.astype(xp.argsort(order, axis=2), parts.dtype)
    step = settings.epsilon / max(1, columns - 1)
    drop = 1 - settings.density - settings.epsilon / 2 + places * step
    if columns == 1:
        drop = xp.full_like(drop, 1 - settings.density)
    drop = xp.clip(drop, min=0.0, max=1.0)
    is_kept = _chance(parts, generator) >= drop  # never where it is dropped for certain
    return xp.where(is_kept, parts / xp.where(is_kept, 1 - drop, 1.0), 0.0)


def _chance(like: Array, generator: np.random.Generator) -> Array:
    """Draw a number in [0, 1) for each element, the same whatever library and device."""
    return beside(generator.random(like.shape), like)


def _ties(parts: Array, weights: Sequence[float]) -> Array:
    """Elect a sign for each element, and average the weighted elements that have it."""
    xp = array_namespace(parts)
    elected = xp.where(xp.sum(parts, axis=0) >= 0, 1.0, -1.0)
    agree = xp.sign(parts) == elected
    total = xp.sum(xp.where(agree, parts * _column(weights, parts), 0.0), axis=0)
    return total / xp.clip(xp.count_nonzero(agree, axis=0), min=1)
