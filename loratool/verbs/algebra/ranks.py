"""From what a user asks for to the rank of every module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, Protocol

from loratool.errors import AdapterError, OptionError
from loratool.math.budget import Item, spend
from loratool.math.ranks import minimal_rank, profile_of
from loratool.plan.adapter import AdapterPlan
from loratool.verbs.algebra.modules import Joint
from loratool.verbs.algebra.sizes import FileSize

__all__ = [
    "Truncation",
    "choose_ranks",
    "full_ranks",
    "parse_size",
    "ruling_notes",
    "within_budget",
]

UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
NOTHING: Final = 1e-4
"""A share of ``‖Δ‖²`` that the rounding of a stored dtype costs."""
TRIED: Final = 32
"""How many modules are looked at to tell how small a file can be."""
ATTEMPTS: Final = 8
"""How often a budget is spent anew where the header turns out longer than expected."""


class PlanFor(Protocol):
    """Plans an output for ranks by group."""

    def __call__(self, ranks: Mapping[str, int], *, keep: bool = True) -> AdapterPlan:
        """Return the plan; without ``keep`` no module is copied as it is."""
        ...


@dataclass(frozen=True, slots=True)
class Truncation:
    """How far to truncate. At most one of all but ``rank``, which may limit any of them.

    Attributes:
        rank: At most this rank in every module.
        energy: The share of ``‖Δ‖_F²`` to keep in every module.
        max_error: The relative Frobenius error to allow in every module.
        max_size: Bytes of the whole file.
        sv_ratio: Keep singular values above ``σ₁ / sv_ratio``.
        sv_fro: The share of ``‖Δ‖_F`` to keep.
        sv_cumulative: The share of ``Σσ`` to keep.
        multiple: Make every rank a multiple of this.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    max_size: int | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        rules = [name for name in _rules() if getattr(self, name) is not None]
        if len(rules) > 1:
            raise OptionError("truncation", f"give one of {' and '.join(map(_flag, rules))}")
        for name in ("energy", "sv_fro", "sv_cumulative"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise OptionError(_flag(name), f"{value:g} is no share between 0 and 1")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise OptionError(_flag("max_error"), f"{self.max_error:g} is not in [0, 1)")
        if self.sv_ratio is not None and not self.sv_ratio >= 1:
            raise OptionError(_flag("sv_ratio"), f"{self.sv_ratio:g} is less than 1")
        if self.rank is not None and self.rank < 1:
            raise OptionError("--rank", f"{self.rank} is less than 1")
        if self.multiple < 1:
            raise OptionError("--rank-multiple", f"{self.multiple} is less than 1")
        if self.rank is not None and self.rank < self.multiple:
            raise OptionError(
                "--rank-multiple",
                f"no multiple of {self.multiple} is at most --rank {self.rank}",
            )

    @property
    def rule(self) -> tuple[str, float] | None:
        """The rule for single modules and its value, if there is one."""
        for name in _rules():
            if name != "max_size" and getattr(self, name) is not None:
                return name, getattr(self, name)
        return None

    @property
    def is_given(self) -> bool:
        """Whether anything was asked for."""
        return self.rank is not None or self.rule is not None or self.max_size is not None

    @property
    def needs_spectra(self) -> bool:
        """Whether the ranks depend on the tensors, not on headers alone."""
        return self.rule is not None or self.max_size is not None

    def is_met(self, lost: float) -> bool:
        """Whether a module that lacks this share of its ``‖Δ‖²`` has what its rule asks for.

        Of rules that no share tells of, and of a budget, it is not known: a rank that is the most
        allowed counts as the limit that ruled.
        """
        allowed = 0.0
        if self.energy is not None:
            allowed = 1 - self.energy
        elif self.max_error is not None:
            allowed = self.max_error**2
        elif self.sv_fro is not None:
            allowed = 1 - self.sv_fro**2
        return lost <= allowed + NOTHING

    @property
    def recorded(self) -> dict[str, int | float | None]:
        """What was asked for, by the names of the options, as the metadata tells it."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "multiple"}
        return {**asked, "rank_multiple": self.multiple if self.multiple > 1 else None}

    def fitted(self, rank: int) -> int:
        """Return ``rank`` as a multiple, rounded up unless the largest allowed is smaller."""
        rank = -(-rank // self.multiple) * self.multiple
        if self.rank is not None:
            rank = min(rank, self.rank // self.multiple * self.multiple)
        return rank


def ruling_notes(
    truncation: Truncation, modules: Iterable[tuple[int, float, float]]
) -> tuple[str, ...]:
    """Return which of two limits ruled in how many modules, and what that keeps.

    Args:
        truncation: What was asked for; with one limit alone there is nothing to say.
        modules: For each its rank, its ``‖Δ‖²`` and the part of that which is lost.
    """
    if truncation.rank is None or not truncation.needs_spectra:
        return ()
    found = list(modules)
    top = truncation.fitted(truncation.rank)
    short = [
        max(0.0, 1 - lost / norm)
        for rank, norm, lost in found
        if norm and rank >= top and not truncation.is_met(lost / norm)
    ]
    total = math.fsum(norm for _, norm, _ in found)
    kept = 1 - math.fsum(lost for _, _, lost in found) / total if total else 1.0
    other = "--max-size" if truncation.rule is None else _flag(truncation.rule[0])
    other = f"{other} {truncation.max_size if truncation.rule is None else truncation.rule[1]:g}"
    words = f"{kept:.1%} of ‖delta‖² is kept in all"
    if not short:
        return (f"{other} ruled in all modules, --rank {truncation.rank} in none; {words}",)
    each = f"{min(short):.1%}" + (f" to {max(short):.1%}" if len(short) > 1 else "")
    others = f"and {other} in the others" if len(short) < len(found) else f"{other} in none"
    return (
        f"--rank {truncation.rank} ruled in {len(short)} of {len(found)} modules, which keep "
        f"{each}, {others}; {words}",
    )


def _rules() -> tuple[str, ...]:
    return tuple(f.name for f in fields(Truncation) if f.name not in ("rank", "multiple"))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_size(text: str | int) -> int:
    """Return bytes: ``8MB``, ``7.5 MiB``, ``500k`` or a plain number; units are decimal but for i.

    Raises:
        OptionError: It is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text).lower())
    if match is None or (match[3] and not match[2]):
        raise OptionError("--max-size", f"{text!r} is no size; expected one such as 8MB")
    unit = UNITS[match[2]]
    if match[3]:
        unit = 1024 ** (list(UNITS).index(match[2]))
    return int(float(match[1]) * unit)


def full_ranks(joints: Sequence[Joint], truncation: Truncation | None = None) -> dict[str, int]:
    """Return the rank of each module that ``--rank`` alone allows, by rank group."""
    ranks: dict[str, int] = {}
    for joint in joints:
        group = joint.rank_group
        ranks[group] = max(ranks.get(group, 1), joint.full_rank)
    if truncation is None:
        return ranks
    limit = truncation.rank
    return {
        group: truncation.fitted(rank if limit is None else min(rank, limit))
        for group, rank in ranks.items()
    }


def choose_ranks(
    joints: Sequence[Joint],
    truncation: Truncation,
    spectra: Mapping[str, Sequence[Sequence[float]]],
    *,
    plan_for: PlanFor,
    is_whole: bool = False,
    base_norms: Mapping[str, float] | None = None,
    is_met: Callable[[Joint, int], bool] | None = None,
    rests: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Return the rank of each module, by rank group (see :attr:`Joint.rank_group`).

    Args:
        joints: The modules.
        truncation: What was asked for; its ``rank`` limits all.
        spectra: Singular values by name of the module, for each expert.
        plan_for: Returns the plan for given ranks, whose size is what counts for a budget.
        is_whole: Whether no module can be left out.
        base_norms: ``‖W‖_F`` by name, to weigh errors relative to the base.
        is_met: Whether a rank keeps the promise of ``max_error`` with its rounding.
        rests: What a module lacks already of the ``‖Δ‖²`` that it stands for, by name.

    Raises:
        AdapterError: Nothing fits into the budget.
    """
    limits = full_ranks(joints, truncation)
    profiles = {name: profile_of(values) for name, values in spectra.items()}
    if truncation.max_size is not None:
        return within_budget(
            joints,
            truncation,
            profiles,
            limits,
            plan_for=plan_for,
            is_whole=is_whole,
            base_norms=base_norms,
        )
    assert truncation.rule is not None
    rule, value = truncation.rule
    ranks: dict[str, int] = {}
    for joint in joints:
        rest = (rests or {}).get(joint.name, 0.0)
        rank = minimal_rank(profiles[joint.name], rule, value, rest=rest)
        group = joint.rank_group
        most = min(limits[group], joint.full_rank)
        while is_met is not None and rank < most and not is_met(joint, rank):
            rank += 1
        ranks[group] = max(ranks.get(group, 1), rank)
    return {group: min(truncation.fitted(rank), limits[group]) for group, rank in ranks.items()}


def within_budget(
    joints: Sequence[Joint],
    truncation: Truncation,
    profiles: Mapping[str, Sequence[float]],
    limits: Mapping[str, int],
    *,
    plan_for: PlanFor,
    is_whole: bool = False,
    base_norms: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Spend one budget on all modules, for the smallest total squared error.

    Args:
        joints: The modules.
        truncation: Its ``max_size`` is the budget, its ``multiple`` the step.
        profiles: What each rank gains, by name of the module.
        limits: The most that each rank group may get.
        plan_for: Returns the plan for given ranks; its size is what counts.
        is_whole: Whether no module can be left out.
        base_norms: ``‖W‖_F`` by name, to weigh gains relative to the base.

    Raises:
        AdapterError: Nothing fits.
    """
    budget = truncation.max_size
    assert budget is not None
    step = truncation.multiple
    groups = list(dict.fromkeys(joint.rank_group for joint in joints))
    gains: dict[str, list[float]] = {group: [] for group in groups}
    for joint in joints:
        weight = _importance(joint, base_norms)
        profile = [square * weight for square in profiles[joint.name]]
        gains[joint.rank_group] = _added(gains[joint.rank_group], profile)
    size_of = FileSize(
        lambda ranks: plan_for(ranks, keep=False),
        groups,
        {joint.name: joint.rank_group for joint in joints},
    )
    # A bias beside B is exact and belongs to its module: such modules keep a rank.
    forced = {joint.rank_group for joint in joints if joint.shape.has_bias or is_whole}
    items = [
        Item(gains[group], cost, limits[group], is_forced=group in forced)
        for group, cost in zip(groups, size_of.costs(), strict=True)
    ]
    room = budget
    for _ in range(ATTEMPTS):
        ranks = spend(items, room, size_of=size_of, multiple=step)
        if not any(ranks):
            break
        chosen = dict(zip(groups, ranks, strict=True))
        excess = plan_for(chosen, keep=True).nbytes - budget
        if excess <= 0:
            return chosen
        # What the metadata says of these ranks is longer, or the header's padding.
        room = min(room, size_of(ranks)) - excess
    tried = range(min(len(groups), TRIED)) if not is_whole else ()
    least = min(
        (size_of([step if place == one else 0 for place in range(len(groups))]) for one in tried),
        default=size_of([step] * len(groups)),
    )
    raise AdapterError(
        "--max-size",
        f"{budget} bytes do not hold a single rank",
        hint=f"a file with rank {step} in {'every' if is_whole else 'one'} module takes {least} "
        "bytes or so",
    )


def _importance(joint: Joint, base_norms: Mapping[str, float] | None) -> float:
    norm = base_norms.get(joint.name, 0.0) if base_norms is not None else 0.0
    return 1 / norm**2 if norm else 1.0


def _added(one: Sequence[float], other: Sequence[float]) -> list[float]:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    tail = longer[len(shorter) :]
    return [a + b for a, b in zip(longer, shorter, strict=False)] + list(tail)
