"""Named ways to combine deltas of one weight other than their sum, in small joint spaces.

The published methods work on every element of dense deltas. Here they work on the deltas' joint
core (Core Space, arXiv 2509.17786): with orthonormal bases U of all their columns and V of all
their rows, ``Δᵢ = U Mᵢ Vᵀ`` loses nothing, and the ``Mᵢ`` are as small as the sum of the ranks.
The bases are the singular vectors of ``[Δ₁ … Δ_T]`` and of ``[Δ₁; …; Δ_T]``, so that the result
depends on the deltas alone, not on how somebody factored them nor on their order. Methods that
look at single elements depend on the basis: they are not the same as on dense weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loratool.math.factored import Factored, factor, from_core
from loratool.math.lowrank import LowRank

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
    generator: torch.Generator,
) -> Factored:
    """Combine ``deltas``, all ``(m, n)``, with one weight each.

    Args:
        method: ``ties`` (arXiv 2306.01708), ``dare`` and ``dare-ties`` (2311.03099), ``della``
            (2406.11617), ``knots`` (2410.19735, with TIES).
        deltas: The deltas.
        weights: A number for each.
        settings: Density and so on.
        generator: Of the processor; the random methods draw from it.
    """
    if method == "knots":
        return _knots(deltas, weights, settings.density)
    left, right, cores = _joint(deltas)
    if not cores.numel():
        return from_core(left, cores.sum(dim=0), right)
    match method:
        case "ties":
            merged = _ties(_trimmed(cores, settings.density), weights)
        case "dare":
            kept = _dropped(cores, settings.density, generator)
            merged = (kept * _column(weights, kept)).sum(dim=0)
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
    up = sum(delta.up.double() * root for delta, root in zip(deltas, roots, strict=True))
    down = sum(
        delta.down.double() * math.copysign(root, amount)
        for delta, root, amount in zip(deltas, roots, amounts, strict=True)
    )
    assert isinstance(up, Tensor) and isinstance(down, Tensor)
    return LowRank(up, down)


def _joint(deltas: Sequence[LowRank]) -> tuple[Tensor, Tensor, Tensor]:
    """Return U ``(m, p)``, V ``(n, q)`` and the cores ``(T, p, q)``."""
    left, upper = torch.linalg.qr(torch.cat([delta.up.double() for delta in deltas], dim=1))
    right, lower = torch.linalg.qr(torch.cat([delta.down.double().mT for delta in deltas], dim=1))
    cores = []
    start = 0
    for delta in deltas:
        part = slice(start, start + delta.rank)
        cores.append(upper[:, part] @ lower[:, part].mT * delta.scale)
        start += delta.rank
    U = _leading(torch.cat(cores, dim=1))
    V = _leading(torch.cat(cores, dim=0).mT)
    return left @ U, right @ V, torch.stack([U.mT @ core @ V for core in cores])


def _leading(matrix: Tensor) -> Tensor:
    """Return the left singular vectors that matter."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept: Tensor = U[:, : int((S[:1] * NEGLIGIBLE < S).sum())]
    return kept


def _knots(deltas: Sequence[LowRank], weights: Sequence[float], density: float) -> Factored:
    """TIES on the ``Vᵢ`` of ``[Δ₁ … Δ_T] = U S [V₁ᵀ … V_Tᵀ]``."""
    left, upper = torch.linalg.qr(torch.cat([delta.up.double() for delta in deltas], dim=1))
    rows = []
    start = 0
    for delta in deltas:
        part = upper[:, start : start + delta.rank]
        rows.append(part @ delta.down.double() * delta.scale)
        start += delta.rank
    U, S, Vh = torch.linalg.svd(torch.cat(rows, dim=1), full_matrices=False)
    count = int((S[:1] * NEGLIGIBLE < S).sum())
    if not count:
        return from_core(left, torch.zeros_like(rows[0][:, :1]), rows[0][:1].mT * 0)
    parts = torch.stack(list(Vh[:count].chunk(len(deltas), dim=1)))
    merged = _ties(_trimmed(parts, density), weights)
    return factor(LowRank(left @ (U[:, :count] * S[:count]), merged))


def _column(weights: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(list(weights), dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _trimmed(parts: Tensor, density: float) -> Tensor:
    """Keep the ``density`` largest elements of each part."""
    flat = parts.flatten(1)
    count = max(1, int(density * flat.shape[1]))
    kept = torch.zeros_like(flat)
    largest = flat.abs().topk(count, dim=1).indices
    return kept.scatter(1, largest, flat.gather(1, largest)).view_as(parts)


def _dropped(parts: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each element with probability ``density``, and make up for the others."""
    return torch.where(_chance(parts, generator) < density, parts / density, 0.0)


def _magnitude_dropped(parts: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Drop small elements of a row more often than large ones, and make up for each (MAGPRUNE)."""
    columns = parts.shape[2]
    places = parts.abs().argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    step = settings.epsilon / max(1, columns - 1)
    drop = 1 - settings.density - settings.epsilon / 2 + places.double() * step
    if columns == 1:
        drop = torch.full_like(drop, 1 - settings.density)
    drop = drop.clamp(0.0, 1.0)
    return torch.where(_chance(parts, generator) >= drop, parts / (1 - drop), 0.0)


def _chance(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw on the processor whatever the device, so that a seed means the same everywhere."""
    return torch.rand(like.shape, dtype=like.dtype, generator=generator).to(like.device)


def _ties(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """Elect a sign for each element, and average the weighted elements that have it."""
    elected = torch.where(parts.sum(dim=0) >= 0, 1.0, -1.0)
    agree = parts.sign() == elected
    total = (parts * _column(weights, parts) * agree).sum(dim=0)
    return total / agree.sum(dim=0).clamp(min=1)
