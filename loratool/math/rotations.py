"""What turns the inputs or the outputs of a weight: Cayley transforms, butterflies, mirrors.

All functions take the weight flattened to ``(rows, columns)``, kernels in the columns, and return
as many rows of the turned one. Compute in float64.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.math.namespace import Array, array_namespace, beside

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "bounded",
    "butterfly_inputs",
    "cayley",
    "mirrored",
    "neumann",
    "orthonormal",
    "pair_factors",
    "skew_from_triangle",
    "turned_inputs",
    "turned_pairs",
]


def skew_from_triangle(values: Array, size: int) -> Array:
    """Return skew-symmetric matrices ``(n, b, b)`` from what is above their diagonals, by rows.

    Args:
        values: ``(n, b · (b - 1) / 2)``.
        size: b.
    """
    xp = array_namespace(values)
    rows, columns = np.triu_indices(size, 1)
    places = np.full((size, size), len(rows))
    places[rows, columns] = np.arange(len(rows))
    zero = xp.zeros((values.shape[0], 1), dtype=values.dtype, device=values.device)
    padded = xp.concat([values, zero], axis=1)
    order = beside(places.reshape(-1), values)
    upper = xp.take(padded, order, axis=1).reshape((values.shape[0], size, size))
    return upper - upper.mT


def bounded(values: Array, limit: float) -> Array:
    """Return triangles of skew-symmetric matrices none of which is longer than a limit."""
    xp = array_namespace(values)
    lengths = xp.sqrt(2 * xp.sum(values * values, axis=1, keepdims=True))
    limit /= math.sqrt(values.shape[0])
    return values * xp.where(lengths > limit, limit / xp.where(lengths > 0, lengths, 1.0), 1.0)


def cayley(skew: Array) -> Array:
    """Return the rotations ``(I - Q)(I + Q)⁻¹``, ``(…, b, b)``."""
    xp = array_namespace(skew)
    identity = xp.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return xp.linalg.solve(identity + skew, identity - skew)  # the two commute


def neumann(skew: Array, terms: int) -> Array:
    """Return the first terms of the series of the inverse transform, as PEFT has them.

    ``I + 2Q + 2Q² + … + Qⁿ⁻¹``, the last one once; but of three terms it has four.
    """
    xp = array_namespace(skew)
    total = xp.zeros_like(skew) + xp.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if terms < 2:
        return total
    total = total + 2 * skew
    if terms < 3:
        return total
    power = skew @ skew
    total = total + 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def turned_inputs(weight: Array, blocks: Array) -> Array:
    """Return ``W · diag(R)ᵀ``.

    Args:
        weight: ``(rows, n · b)``.
        blocks: R of each block of columns, ``(n, b, b)``; one is that of all.
    """
    xp = array_namespace(weight, blocks)
    size = blocks.shape[1]
    apart = xp.permute_dims(weight.reshape((weight.shape[0], -1, size)), (1, 0, 2))
    return xp.permute_dims(apart @ blocks.mT, (1, 0, 2)).reshape(weight.shape)


def butterfly_inputs(weight: Array, blocks: Array) -> Array:
    """Return ``W · R₁ᵀ … Rₘᵀ``, a butterfly of blocks that turn inputs.

    Args:
        weight: ``(rows, n · b)``.
        blocks: Of each stage, ``(m, n, b, b)``; stage i mixes ``2ⁱ`` blocks.
    """
    xp = array_namespace(weight, blocks)
    count, size = blocks.shape[1:3]
    for stage in range(blocks.shape[0]):
        order = _butterfly_order(count, size, stage)
        back = beside(order, weight)
        there = beside(np.argsort(order), weight)
        turned = turned_inputs(xp.take(weight, there, axis=1), blocks[stage, ...])
        weight = xp.take(turned, back, axis=1)
    return weight


@cache
def _butterfly_order(count: int, size: int, stage: int) -> NDArray[Any]:
    """Return the order of the inputs in one stage of PEFT's butterfly.

    In each group of ``2**stage`` blocks the halves of even places come first.
    """
    if stage == 0:
        return np.arange(count * size)
    halves = np.arange(size << stage).reshape((-1, size // 2))
    order = np.concatenate((halves[0::2], halves[1::2])).reshape(-1)
    starts = np.arange(0, count * size, size << stage)
    return (starts[:, None] + order).reshape(-1)


def mirrored(weight: Array, planes: Array) -> Array:
    """Return ``W (1 - 2 u₁ u₁ᵀ) (1 - 2 u₂ u₂ᵀ) …``, the columns of ``planes`` made unit ones."""
    xp = array_namespace(weight, planes)
    planes = planes / xp.sqrt(xp.sum(planes * planes, axis=0, keepdims=True))
    for index in range(planes.shape[1]):
        normal = planes[:, index : index + 1]
        weight = weight - 2 * (weight @ normal) @ normal.mT
    return weight


def orthonormal(vectors: Array) -> Array:
    """Return the columns of a matrix made orthonormal, each against those before it."""
    xp = array_namespace(vectors)
    found: list[Array] = []
    for index in range(vectors.shape[1]):
        vector = vectors[:, index : index + 1]
        for other in found:
            vector = vector - (other.mT @ vector) * other
        found.append(vector / xp.sqrt(xp.sum(vector * vector)))
    return xp.concat(found, axis=1)


def turned_pairs(rows: Array, cosines: Array, sines: Array, group: int) -> Array:
    """Return rows that turn in pairs: ``c ∘ W + s ∘ (W turned by a right angle)``.

    Args:
        rows: ``(n · group, columns)``; the first half of a group is paired with its second.
        cosines: ``(n · group,)``.
        sines: ``(n · group,)``.
        group: Rows of a group.
    """
    xp = array_namespace(rows, cosines, sines)
    halves = rows.reshape((-1, 2, group // 2, rows.shape[1]))
    turned = xp.stack([-halves[:, 1, ...], halves[:, 0, ...]], axis=1).reshape(rows.shape)
    return rows * cosines[:, None] + turned * sines[:, None]


def pair_factors(angles: Array, lengths: Array, group: int, halves: int) -> tuple[Array, Array]:
    """Return what rows are multiplied by, and what their turned ones are, ``(rows,)`` each.

    Args:
        angles: Of each pair of rows one, two or four, group by group.
        lengths: Of the same shape.
        group: Rows of a group.
        halves: How many a pair has.
    """
    xp = array_namespace(angles, lengths)
    width = group // 2 * min(halves, 2)
    shape = (-1, 2 if halves == 4 else 1, width)
    angles, lengths = angles.reshape(shape), lengths.reshape(shape)
    first = lengths[:, 0, :] * xp.cos(angles[:, 0, :])
    second = lengths[:, -1, :] * xp.sin(angles[:, -1, :])
    if halves == 1:  # both halves of a group have the same
        first, second = (xp.concat([each, each], axis=1) for each in (first, second))
    return first.reshape(-1), second.reshape(-1)
