"""Which rank would be enough for an adapter, and what ``truncate`` would save."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import Adapter
from loratool.errors import LoratoolError
from loratool.math.similarity import energy_rank
from loratool.names.kinds import positions_of
from loratool.schemes import scheme_named
from loratool.verbs.algebra.combination import Combination, output_scheme
from loratool.verbs.algebra.modules import Joint, check_computable, join
from loratool.verbs.algebra.ranks import Truncation, choose_ranks, full_ranks
from loratool.verbs.algebra.result import expected_report
from loratool.verbs.spectrum import ENERGIES, Spectrum
from loratool.write.options import WriteOptions

__all__ = ["Advice", "EnoughRanks", "Saving", "advice_on"]

SMALLER: Final = "smaller"
"""What the output is called in a command that is advised."""


@dataclass(frozen=True, slots=True)
class EnoughRanks:
    """Which rank is enough for modules of one kind, each at that rank.

    Attributes:
        kind: What they are in their layers; empty for all modules.
        modules: How many there are.
        rank: The largest rank that one of them has now.
        ranks: By the share of ``‖Δ‖_F²`` of all of them together, the smallest that keeps it.
    """

    kind: str
    modules: int
    rank: int
    ranks: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return what the command line's JSON says of it."""
        return {"kind": self.kind, "modules": self.modules, "rank": self.rank, **self.ranks}


@dataclass(frozen=True, slots=True)
class Saving:
    """A truncation, and what it would save.

    Attributes:
        options: Of ``truncate``: ``energy`` or ``rank``, and its value.
        command: The command line that does it.
        bytes: Of the weights file that it writes.
        saved: By how many the weights file gets smaller.
        relative_error: ``‖written - Δ‖ / ‖Δ‖``, without the rounding to the dtype.
    """

    options: Mapping[str, float]
    command: str
    bytes: int
    saved: int
    relative_error: float

    def as_json(self) -> dict[str, Any]:
        """Return what the command line's JSON says of it."""
        return {
            "options": dict(self.options),
            "command": self.command,
            "bytes": self.bytes,
            "saved": self.saved,
            "relative_error": self.relative_error,
        }


@dataclass(frozen=True, slots=True)
class Advice:
    """Which ranks would be enough.

    Attributes:
        kinds: For each kind of module.
        whole: For all modules.
        savings: What ``truncate`` would save, for each share of each module, and in all.
        refusal: Why ``truncate`` does not take the adapter, if it does not.
    """

    kinds: tuple[EnoughRanks, ...]
    whole: EnoughRanks
    savings: tuple[Saving, ...]
    refusal: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what the command line's JSON says of it."""
        return {
            "kinds": [kind.as_json() for kind in self.kinds],
            "all": {k: v for k, v in self.whole.as_json().items() if k != "kind"},
            "truncate": [saving.as_json() for saving in self.savings],
            "refusal": self.refusal,
        }


def advice_on(adapter: Adapter, spectra: Sequence[Spectrum]) -> Advice | None:
    """Say which ranks would be enough, or nothing where every delta is zero.

    Args:
        adapter: The adapter.
        spectra: Those of its sites, in their order.
    """
    if not any(spectrum.spectral_norm for spectrum in spectra):
        return None
    positions = positions_of([s.module for s in spectra], adapter.components, adapter.family)
    kinds: dict[str, list[Spectrum]] = {}
    for position, spectrum in zip(positions, spectra, strict=True):
        label = " ".join(filter(None, (position.component, position.kind)))
        kinds.setdefault(label, []).append(spectrum)
    whole = _enough("", spectra)
    try:
        savings = tuple(_savings(adapter, spectra, whole))
        refusal = None
    except LoratoolError as error:
        savings, refusal = (), str(error)
    return Advice(
        tuple(_enough(kind, members) for kind, members in kinds.items()), whole, savings, refusal
    )


def _enough(kind: str, spectra: Sequence[Spectrum]) -> EnoughRanks:
    rank = max(len(spectrum.profile) for spectrum in spectra)
    together = [
        math.fsum(s.profile[place] for s in spectra if place < len(s.profile))
        for place in range(rank)
    ]
    ranks = {name: energy_rank(together, share) for name, share in ENERGIES.items()}
    return EnoughRanks(kind, len(spectra), rank, ranks)


def _savings(adapter: Adapter, spectra: Sequence[Spectrum], whole: EnoughRanks) -> Iterator[Saving]:
    """Yield what each truncation would save, planned as ``truncate`` plans it.

    Raises:
        LoratoolError: ``truncate`` refuses the adapter.
    """
    check_computable(adapter, verb="truncate")
    joints, notes = join([adapter])
    found = {spectrum.module: spectrum.experts for spectrum in spectra}
    is_file = not scheme_named(adapter.scheme).settings.file
    suffix = scheme_named(adapter.scheme).home.suffix if is_file else ""
    output = adapter.path.resolve().with_name(f"{SMALLER}{suffix}")
    size = adapter.weights.stat().st_size
    for truncation in _truncations(whole):
        draft = Combination(
            verb="truncate",
            adapters=[adapter],
            joints=joints,
            scheme=output_scheme([adapter], None),
            options=WriteOptions(output, keeps_naming=True),
            asked=truncation.recorded,
            keep_factors=True,
            notes=notes,
        )
        ranks = full_ranks(joints, truncation)
        if truncation.needs_spectra:
            ranks = choose_ranks(
                joints, truncation, found, plan_for=draft.plan, is_whole=draft.is_whole
            )
        nbytes = draft.plan(ranks).nbytes
        options = {k: v for k, v in truncation.recorded.items() if v is not None}
        flags = " ".join(f"--{name} {value:g}" for name, value in options.items())
        yield Saving(
            options,
            f"loratool truncate {_quoted(adapter.path)} {flags} -o {output.name}",
            nbytes,
            size - nbytes,
            _error(joints, ranks, found),
        )


def _truncations(whole: EnoughRanks) -> Iterator[Truncation]:
    """Yield what to try: each share in every module, and the one rank that keeps it in all."""
    for share in ENERGIES.values():
        yield Truncation(energy=share)
    for rank in dict.fromkeys(whole.ranks.values()):
        if rank < whole.rank:
            yield Truncation(rank=rank)


def _error(
    joints: Sequence[Joint],
    ranks: Mapping[str, int],
    spectra: Mapping[str, Sequence[Sequence[float]]],
) -> float:
    reports = [expected_report(j, ranks[j.rank_group], spectra[j.name]) for j in joints]
    total = math.fsum(report.squared_norm for report in reports)
    lost = math.fsum(report.squared_error for report in reports)
    return math.sqrt(lost / total) if total else 0.0


def _quoted(path: Path) -> str:
    """Return a path as a shell takes it; one that begins with a dash is no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
