"""The arithmetic of one module: read the difference, decompose it, keep the factors on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool.errors import BaseModelError
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.math.extraction import (
    Leading,
    leading_part,
    noise_floor,
    spacing_squares,
)
from loratool.math.randomness import generator_for
from loratool.math.ranks import minimal_rank, numerical_rank, profile_of
from loratool.ops.algebra.ranks import Truncation
from loratool.ops.extraction.pairing import Target
from loratool.ops.tensors import RowReader

__all__ = ["BUDGET_RANK", "Extracted", "Settings", "change_of", "decompose", "load_extracted"]

FIRST_RANK: Final = 32
"""Where the search for a rank that depends on the spectrum begins."""
BUDGET_RANK: Final = 128
"""How many ranks of a module are computed for a budget before it is known to deserve more."""
MARGIN: Final = 1.05
"""How far over the noise floor a singular value must be; of finite matrices it fluctuates."""
COMPLETE: Final = 1e-12
"""What is left of the energy when all singular values are known."""
BLOCK_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Settings:
    """How modules are decomposed.

    Attributes:
        truncation: What was asked for.
        auto: Whether ranks end where the spectrum meets the rounding noise.
        method: ``auto``, ``exact`` or ``randomised``.
        seed: Of the randomised route.
        device: Where to compute.
    """

    truncation: Truncation
    auto: bool = False
    method: str = "auto"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Extracted:
    """One module's decomposition, its factors on disk.

    Attributes:
        name: Of the module.
        values: Singular values for each expert, as many as were computed.
        squared_norm: ``‖Δ‖_F²``, over all experts.
        squared_residual: What the computed factors miss of it.
        floor: The singular value that rounding alone can leave.
        rank: The rank that the rules ask for; all computed for a budget.
        path: The file with the factors; ``None`` for a module that did not change.
    """

    name: str
    values: tuple[tuple[float, ...], ...]
    squared_norm: float
    squared_residual: float
    floor: float
    rank: int
    path: Path | None

    @property
    def computed(self) -> int:
        """How many ranks are known."""
        return max((len(one) for one in self.values), default=0)

    @property
    def profile(self) -> list[float]:
        """What each rank gains."""
        return profile_of(self.values)

    def tail(self, rank: int) -> float:
        """Return ``‖Δ - Δ_rank‖²`` before rounding."""
        return self.squared_residual + math.fsum(self.profile[rank:])


def read_difference(
    target: Target, expert: int, files: InputFiles, device: torch.device
) -> tuple[Tensor, float]:
    """Return the delta ``(out, in)`` of a module or of one expert, and its noise floor.

    Float32, or float64 where one of the two is.
    """
    shape = target.tuned.spec.shape
    rows = shape[1] if target.is_parameter else shape[0]
    width = target.tuned.spec.elements // (rows * target.experts)
    first = expert * rows
    is_double = "F64" in (target.base.spec.dtype, target.tuned.spec.dtype)
    kind = torch.float64 if is_double else torch.float32
    base, tuned = (RowReader(stored, width, files) for stored in (target.base, target.tuned))
    delta = torch.empty(rows, width, dtype=kind)
    spacings = []
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        after = tuned.rows(first + start, count)
        before = base.rows(first + start, count)
        block = delta[start : start + count]
        torch.sub(after.to(kind), before.to(kind), out=block)
        _without_conversions(block, before, after)
        spacings.append(spacing_squares(after))
    floor = noise_floor(math.fsum(spacings), (rows, width))
    delta = delta.to(device)
    return delta.mT if target.is_transposed else delta, floor


def _without_conversions(lost: Tensor, before: Tensor, after: Tensor) -> None:
    """Set to zero what is the same, or only converted to another dtype: infinities too."""
    if before.dtype != after.dtype or not bool(lost.isfinite().all()):
        same = before.to(after.dtype)
        lost[(same == after) | (same.isnan() & after.isnan())] = 0


def change_of(base: StoredTensor, tuned: StoredTensor, files: InputFiles) -> float:
    """Return ``‖tuned - base‖²`` of two tensors of one shape."""
    width = max(1, base.spec.shape[-1] if base.spec.shape else 1)
    rows = base.spec.elements // width
    one, other = RowReader(base, width, files), RowReader(tuned, width, files)
    parts = []
    step = max(1, (1 << 20) // width)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        before, after = one.rows(start, count), other.rows(start, count)
        lost = after.double() - before.double()
        _without_conversions(lost, before, after)
        parts.append(float(lost.square().sum()))
    return math.fsum(parts)


def decompose(
    target: Target,
    settings: Settings,
    files: InputFiles,
    spool: Path,
    number: int,
    budget_rank: int = BUDGET_RANK,
) -> Extracted:
    """Decompose the difference of one module and keep its factors in ``spool``.

    Args:
        target: The module.
        settings: How.
        files: Where to read.
        spool: The folder to keep factors in.
        number: What its file there is called.
        budget_rank: How many ranks to compute where a budget will tell how many are kept.

    Raises:
        BaseModelError: It holds NaN or infinity.
    """
    truncation = settings.truncation
    most = min(truncation.rank or target.smallest_side, target.smallest_side)
    if truncation.max_size is not None and truncation.rank is None:
        most = min(most, budget_rank)
    is_searched = settings.auto or truncation.rule is not None
    rank = min(most, FIRST_RANK) if is_searched else most
    parts: list[Leading] = []
    floors: list[float] = []
    for expert in range(target.experts):
        delta, floor = read_difference(target, expert, files, settings.device)
        floors.append(floor)
        part = _leading(target, expert, delta, rank, settings)
        while is_searched and rank < most and not _is_enough([*parts, part], floors, settings):
            rank = min(most, 2 * rank)
            part = _leading(target, expert, delta, rank, settings)
        parts.append(part)
    for expert, part in enumerate(parts):
        if part.singular_values.shape[0] < min(rank, target.smallest_side):
            # Others needed more: all experts share one rank.
            delta, _ = read_difference(target, expert, files, settings.device)
            parts[expert] = _leading(target, expert, delta, rank, settings)
    norm = math.fsum(part.squared_norm for part in parts)
    if norm == 0:
        return Extracted(target.name, (), 0.0, 0.0, max(floors), 0, None)
    path = spool / f"{number}.safetensors"
    _save(path, parts, norm, max(floors))
    return load_extracted(target.name, path, settings)


def _leading(target: Target, expert: int, delta: Tensor, rank: int, settings: Settings) -> Leading:
    def on(device: torch.device) -> Leading:
        generator = generator_for(settings.seed, target.name, expert)
        return leading_part(delta.to(device), rank, generator, method=settings.method)

    try:
        try:
            return on(delta.device)
        except torch.OutOfMemoryError:
            return on(torch.device("cpu"))
    except ValueError:
        raise BaseModelError(
            target.name, "its difference is not finite: one of the two holds NaN or infinity"
        ) from None


def _wanted(
    parts: Sequence[tuple[Sequence[float], float]], floor: float, settings: Settings
) -> int | None:
    """Return the rank that the rule asks for, or ``None`` where more values are needed.

    ``parts`` are singular values and the whole squared norm, for each expert.
    """
    profile = profile_of([values for values, _ in parts])
    total = math.fsum(norm for _, norm in parts)
    rest = max(0.0, total - math.fsum(profile))
    if settings.auto:
        limit = len(parts) * (MARGIN * floor) ** 2
        count = sum(1 for square in profile if square > limit)
        return max(1, count) if count < len(profile) else None
    rule = settings.truncation.rule
    assert rule is not None
    name, value = rule
    if name == "sv_ratio":
        found = minimal_rank(profile, name, value)
        return found if found < len(profile) else None
    if name == "sv_cumulative":
        # Without all values the sum is unknown.
        return minimal_rank(profile, name, value) if rest <= COMPLETE * total else None
    allowed = {"energy": 1 - value, "max_error": value**2, "sv_fro": 1 - value**2}[name] * total
    tail = rest
    if tail > allowed * (1 + 1e-9) + 1e-13 * total:
        return None
    rank = min(len(profile), max(1, numerical_rank(profile)))
    while rank > 1 and tail + profile[rank - 1] <= allowed * (1 + 1e-12):
        rank -= 1
        tail += profile[rank]
    return rank


def _is_enough(parts: Sequence[Leading], floors: Sequence[float], settings: Settings) -> bool:
    described = [(part.singular_values.tolist(), part.squared_norm) for part in parts]
    return _wanted(described, max(floors), settings) is not None


def _save(path: Path, parts: Sequence[Leading], norm: float, floor: float) -> None:
    tensors: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        tensors[f"up.{index}"] = part.up.cpu().contiguous()
        tensors[f"down.{index}"] = part.down.cpu().contiguous()
        tensors[f"values.{index}"] = part.singular_values.cpu().contiguous()
        tensors[f"norm.{index}"] = torch.tensor(part.squared_norm, dtype=torch.float64)
    residual = math.fsum(part.squared_residual for part in parts)
    tensors["summary"] = torch.tensor([norm, residual, floor], dtype=torch.float64)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def load_extracted(name: str, path: Path, settings: Settings) -> Extracted:
    """Read what was kept of a module."""
    tensors = load_file(path)
    norm, residual, floor = tensors["summary"].tolist()
    count = sum(key.startswith("up.") for key in tensors)
    values = tuple(tuple(tensors[f"values.{index}"].tolist()) for index in range(count))
    computed = max(len(one) for one in values)
    rank = computed
    if settings.auto or settings.truncation.rule is not None:
        norms = [float(tensors[f"norm.{index}"]) for index in range(count)]
        wanted = _wanted(list(zip(values, norms, strict=True)), floor, settings)
        rank = computed if wanted is None else min(computed, wanted)
    elif settings.truncation.max_size is None:
        rank = max(1, min(computed, numerical_rank(profile_of(values))))
    return Extracted(name, values, norm, residual, floor, rank, path)
