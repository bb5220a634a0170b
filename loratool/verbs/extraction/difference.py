"""The arithmetic of one module: read the difference, decompose it, write its leading part."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs import numbers
from loratool.errors import BaseModelError, MergeError
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.math.dora import nearest_dora
from loratool.math.extraction import Decomposition, Leading
from loratool.math.namespace import on_host, padded
from loratool.math.randomness import generator_for
from loratool.math.ranks import minimal_rank, numerical_rank, profile_of
from loratool.verbs.algebra.ranks import Truncation
from loratool.verbs.extraction.pairs import Target
from loratool.verbs.extraction.reading import Differences, HostDifferences, read_both

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loratool.values.expr import Array

__all__ = [
    "BUDGET_RANK",
    "Extracted",
    "LeadingPart",
    "Lengths",
    "ModuleResult",
    "Settings",
    "decompose",
    "extracted",
]

FIRST_RANK: Final = 32
"""Where the search for a rank that depends on the spectrum begins."""
BUDGET_RANK: Final = 128
"""How many ranks of a module are computed for a budget before it is known to deserve more."""
MARGIN: Final = 1.05
"""How far over the noise floor a singular value must be; of finite matrices it fluctuates."""
COMPLETE: Final = 1e-12
"""What is left of the energy when all singular values are known."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How modules are decomposed.

    Attributes:
        truncation: What was asked for.
        auto: Whether ranks end where the spectrum meets the rounding noise.
        method: ``auto``, ``exact`` or ``randomised``.
        seed: Of the randomised route.
        differences: Where differences are formed and decomposed.
        variant: ``lora`` or ``dora``.
        dtype: The dtype that is written, as a header calls it; by default the target's.
    """

    truncation: Truncation
    auto: bool = False
    method: str = "auto"
    seed: int = 0
    differences: Differences = field(default_factory=HostDifferences)
    variant: str = "lora"
    dtype: str | None = None


@dataclass(frozen=True)
class Lengths:
    """What makes a DoRA of the factors of a module.

    Attributes:
        magnitude: ``(out,)`` float32.
        squared_norm: ``‖W' - W‖_F²``.
        squared_error: ``‖W' - made‖_F²`` with what is written.
        squared_plain: What the error is without, with plain factors of the same rank.
    """

    magnitude: Any
    squared_norm: float
    squared_error: float
    squared_plain: float


@dataclass(frozen=True)
class Extracted:
    """One module's decomposition.

    Attributes:
        name: Of the module.
        parts: For each expert the leading part of its difference; none for a module that did
            not change.
        floor: The singular value that rounding alone can leave.
        rank: The rank that the rules ask for; all computed for a budget.
        lengths: What a DoRA adds to the factors, if it is one.
    """

    name: str
    parts: tuple[Leading, ...]
    floor: float
    rank: int
    lengths: Lengths | None = None

    @property
    def values(self) -> tuple[tuple[float, ...], ...]:
        """Singular values for each expert, as many as were computed."""
        return tuple(tuple(on_host(part.singular_values).tolist()) for part in self.parts)

    @property
    def squared_norm(self) -> float:
        """``‖Δ‖_F²``, over all experts."""
        return math.fsum(part.squared_norm for part in self.parts)

    @property
    def computed(self) -> int:
        """How many ranks are known."""
        return max((part.up.shape[1] for part in self.parts), default=0)

    @property
    def profile(self) -> list[float]:
        """What each rank gains."""
        return profile_of(self.values)

    def tail(self, rank: int) -> float:
        """Return ``‖Δ - Δ_rank‖²`` before rounding."""
        residual = math.fsum(part.squared_residual for part in self.parts)
        return residual + math.fsum(self.profile[rank:])


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What was written for one module, against the difference that it stands for.

    Attributes:
        module: Its name.
        rank: Rank that was written; 0 for one that the budget leaves out.
        squared_norm: ``‖Δ‖_F²`` of the difference.
        squared_error: ``‖written - Δ‖_F²``, rounding to the dtype included.
        singular_values: Those that were kept, descending.
        computed: All that were computed.
        floor: The singular value that rounding of the finetuned weight alone can leave.
        squared_plain: For a DoRA: the error of plain factors of the same rank.
    """

    module: str
    rank: int
    squared_norm: float
    squared_error: float
    singular_values: tuple[float, ...]
    computed: tuple[float, ...]
    floor: float
    squared_plain: float | None = None

    @property
    def relative_error(self) -> float:
        """``‖written - Δ‖ / ‖Δ‖``."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def decompose(
    target: Target, settings: Settings, files: InputFiles, budget_rank: int = BUDGET_RANK
) -> Extracted:
    """Decompose the difference of one module.

    Args:
        target: The module.
        settings: How.
        files: Where to read.
        budget_rank: How many ranks to compute where a budget will tell how many are kept.

    Raises:
        BaseModelError: It holds NaN or infinity.
    """
    if settings.variant == "dora":
        return _decompose_dora(target, settings, files)
    return settings.differences.run(
        lambda differences: _decompose(
            target, replace(settings, differences=differences), files, budget_rank
        )
    )


def _decompose(
    target: Target, settings: Settings, files: InputFiles, budget_rank: int
) -> Extracted:
    truncation = settings.truncation
    most = min(truncation.rank or target.smallest_side, target.smallest_side)
    if truncation.max_size is not None and truncation.rank is None:
        most = min(most, budget_rank)
    is_searched = settings.auto or truncation.rule is not None
    rank = min(most, FIRST_RANK) if is_searched else most
    parts: list[Leading] = []
    floors: list[float] = []
    for expert in range(target.experts):
        found, floor = _decomposition(target, expert, settings, files)
        floors.append(floor)
        part = found.leading(rank)
        while is_searched and rank < most and not _is_enough([*parts, part], floors, settings):
            rank = min(most, 2 * rank)
            part = found.leading(rank)
        parts.append(_on_host(part))
    for expert, part in enumerate(parts):
        if part.singular_values.shape[0] < min(rank, target.smallest_side):
            # Others needed more: all experts share one rank.
            found, _ = _decomposition(target, expert, settings, files)
            parts[expert] = _on_host(found.leading(rank))
    return extracted(target.name, parts, max(floors), settings)


def _decompose_dora(target: Target, settings: Settings, files: InputFiles) -> Extracted:
    """Decompose the change of a module as a DoRA of a given rank."""
    assert settings.truncation.rank is not None
    rank = min(settings.truncation.rank, target.smallest_side)
    dtype = settings.dtype or target.dtype
    found, floor = _decomposition(target, 0, settings, files)
    plain = found.leading(rank)
    if not plain.squared_norm:
        return Extracted(target.name, (), floor, 0)
    written = [_rounded(factor, dtype) for factor in (plain.up, plain.down)]
    lost = plain.squared_residual + _squared_distance(plain.up, plain.down, *written)
    before, after = read_both(target, files)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise BaseModelError(
            target.name,
            "holds NaN or infinity, whose rows have no length for a DoRA",
            hint=f"leave it out: --exclude {shlex.quote(re.escape(target.module))}",
            code="LT017",
        )

    def lead(delta: NDArray[Any]) -> Leading:
        generator = generator_for(settings.seed, target.name, 0)
        return Decomposition(delta, generator, method=settings.method).leading(rank)

    kind = np.float64 if dtype == "F64" else np.float32
    made = nearest_dora(before, after, plain, lead, lambda one: _rounded(one, dtype), kind)
    part = replace(made.leading, up=made.up, down=made.down)
    lengths = Lengths(made.magnitude, plain.squared_norm, made.squared_error, lost)
    return Extracted(target.name, (part,), floor, rank, lengths)


def _decomposition(
    target: Target, expert: int, settings: Settings, files: InputFiles
) -> tuple[Decomposition, float]:
    """Return what decomposes the change of a module or of one of its experts, and its floor."""
    change = settings.differences.read(target, expert, files)
    generator = generator_for(settings.seed, target.name, expert)
    try:
        found = Decomposition(
            change.delta, generator, method=settings.method, squares=change.squared_norm
        )
    except ValueError:
        raise BaseModelError(
            target.name,
            "its difference is not finite: one of the two holds NaN or infinity",
            code="LT017",
        ) from None
    return found, change.floor


def _on_host(part: Leading) -> Leading:
    return replace(
        part,
        up=on_host(part.up),
        down=on_host(part.down),
        singular_values=on_host(part.singular_values),
    )


def extracted(name: str, parts: Sequence[Leading], floor: float, settings: Settings) -> Extracted:
    """Return what was decomposed, with the rank that the rules ask for."""
    if not any(part.squared_norm for part in parts):
        return Extracted(name, (), floor, 0)
    described = [_Spectrum.of(part) for part in parts]
    most = max(len(one.values) for one in described)
    rank = most
    if settings.auto or settings.truncation.rule is not None:
        wanted = _wanted(described, floor, settings)
        rank = most if wanted is None else min(wanted, most)
    elif settings.truncation.max_size is None:
        rank = max(1, min(most, numerical_rank(profile_of([one.values for one in described]))))
    return Extracted(name, tuple(parts), floor, rank)


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """The singular values of one difference that are known, and the energy of all."""

    values: list[float]
    squared_norm: float
    is_complete: bool

    @classmethod
    def of(cls, part: Leading) -> _Spectrum:
        side = min(part.up.shape[0], part.down.shape[1])
        values = on_host(part.singular_values).tolist()
        return cls(values, part.squared_norm, len(values) == side)


def _wanted(parts: Sequence[_Spectrum], floor: float, settings: Settings) -> int | None:
    """Return the rank that the rule asks for, or ``None`` where more values are needed.

    ``parts`` are the experts.
    """
    profile = profile_of([one.values for one in parts])
    total = math.fsum(one.squared_norm for one in parts)
    rest = max(0.0, total - math.fsum(profile))
    if all(one.is_complete for one in parts):
        rest = 0.0
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
    described = [_Spectrum.of(part) for part in parts]
    return _wanted(described, max(floors), settings) is not None


@dataclass(frozen=True, eq=False)
class LeadingPart:
    """The factors of an extracted module at a rank: A and B.

    Attributes:
        modules: All decompositions by name, this one too once it is computed.
        name: The module's name.
        rank: The rank that is written.
        dtype: The dtype that is written.
        clamp: The quantile to clamp the factors at, if any.
    """

    modules: Mapping[str, Extracted]
    name: str
    rank: int
    dtype: str
    clamp: float | None = None

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Nothing is read any more."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(part.up.nbytes + part.down.nbytes for part in self.modules[self.name].parts)

    @np.errstate(over="ignore", invalid="ignore")
    def compute(self) -> tuple[tuple[Array, ...], ModuleResult]:
        """Return A and B as they are after rounding, experts stacked, and what that costs.

        Raises:
            MergeError: The dtype cannot hold the factors.
        """
        module = self.modules[self.name]
        ups, downs = [], []
        lost = 0.0
        for part in module.parts:
            rows, columns = part.up.shape[0], part.down.shape[1]
            exact_up = padded(part.up[:, : self.rank], rows, self.rank)
            exact_down = padded(part.down[: self.rank], self.rank, columns)
            up, down = exact_up, exact_down
            if self.clamp is not None:
                exact_up, exact_down = _as_kohya(up, down, part.singular_values)
                up, down = _clamped(exact_up, exact_down, self.clamp)
            up, down = (_rounded(array, self.dtype) for array in (up, down))
            if not (np.isfinite(up).all() and np.isfinite(down).all()):
                raise MergeError(
                    self.name,
                    f"its factors overflow in {self.dtype}",
                    hint="write it with --dtype float32 (or bfloat16)",
                )
            lost += _squared_distance(exact_up, exact_down, up, down)
            ups.append(up)
            downs.append(down)
        down = np.concatenate(downs) if len(downs) > 1 else downs[0]
        up = np.stack(ups, axis=2).reshape(ups[0].shape[0], -1) if len(ups) > 1 else ups[0]
        values = module.values
        result = ModuleResult(
            self.name,
            self.rank,
            module.squared_norm,
            module.tail(self.rank) + lost,
            _descending(one[: self.rank] for one in values),
            _descending(values),
            module.floor,
        )
        lengths = module.lengths
        if lengths is None:
            return (down, up), result
        return (down, up, lengths.magnitude), replace(
            result,
            squared_norm=lengths.squared_norm,
            squared_error=lengths.squared_error,
            squared_plain=lengths.squared_plain,
        )


def _rounded(values: Any, dtype: str) -> Any:
    """Return values rounded to a dtype, in their own."""
    return numbers.decode(numbers.encode(values, dtype), dtype, values.shape, values.dtype)


def _squared_distance(up: Any, down: Any, new_up: Any, new_down: Any) -> float:
    """Return ``‖new_up @ new_down - up @ down‖_F²``, however close the two are.

    It is ``‖e D' + U f‖²`` with the changes ``e = U' - U`` and ``f = D' - D`` of the factors:
    nothing large cancels.
    """
    e, f = new_up - up, new_down - down
    total = _inner(e, e, new_down, new_down) + _inner(up, up, f, f)
    return max(0.0, total + 2 * _inner(e, up, new_down, f))


def _inner(up: Any, other_up: Any, down: Any, other_down: Any) -> float:
    """Return ``⟨up @ down, other_up @ other_down⟩`` from small matrices."""
    left, right = up.T @ other_up, down @ other_down.T
    return float(np.einsum("ij,ij->", left, right, dtype=np.float64))


def _descending(values: Any) -> tuple[float, ...]:
    return tuple(sorted((value for one in values for value in one), reverse=True))


def _as_kohya(up: Any, down: Any, values: Any) -> tuple[Any, Any]:
    """Return ``U S`` and ``Vᵀ`` in float64, which are what kohya's extraction clamps."""
    root = np.zeros(up.shape[1])
    known = np.sqrt(on_host(values))[: up.shape[1]]
    root[: known.shape[0]] = known
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return up * root, down * inverse[:, None]


def _clamped(left: Any, right: Any, quantile: float) -> tuple[Any, Any]:
    """Clamp as kohya's extraction does: at ± one quantile of both factors together."""
    limit = float(np.quantile(np.concatenate([left.ravel(), right.ravel()]), quantile))
    return np.clip(left, -limit, limit), np.clip(right, -limit, limit)
