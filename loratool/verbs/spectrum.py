"""The singular values of every delta, and what they say about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loratool.adapter.model import Adapter
from loratool.adapter.problems import check_sound
from loratool.math.ranks import profile_of
from loratool.math.similarity import effective_rank, energy_rank, stable_rank
from loratool.plan.threads import in_parallel
from loratool.verbs.algebra.modules import Joint, join
from loratool.verbs.algebra.sums import Method, joint_spectra

__all__ = ["ENERGIES", "Spectrum", "spectra"]

ENERGIES: Final = {"rank_90": 0.9, "rank_99": 0.99, "rank_99_9": 0.999}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The spectrum of one module's delta, its scale included.

    Attributes:
        module: Its name.
        singular_values: Descending; as many as the factors have ranks, of all experts together.
        stable_rank: ``‖Δ‖_F² / ‖Δ‖₂²``.
        effective_rank: ``exp`` of the entropy of the singular values' shares.
        energy_ranks: The ranks that hold the shares in ``ENERGIES`` of ``‖Δ‖_F²``, by its keys;
            of stacked experts, which share one, the rank of each.
        experts: The singular values of each expert; those of a plain module are the only ones.
    """

    module: str
    singular_values: tuple[float, ...]
    stable_rank: float
    effective_rank: float
    energy_ranks: Mapping[str, int]
    experts: tuple[tuple[float, ...], ...]

    @property
    def profile(self) -> list[float]:
        """What each further rank adds to ``‖Δ‖_F²``, with all experts at that rank."""
        return profile_of(self.experts)

    @property
    def frobenius_norm(self) -> float:
        """``‖Δ‖_F``."""
        return math.sqrt(math.fsum(value * value for value in self.singular_values))

    @property
    def spectral_norm(self) -> float:
        """``‖Δ‖₂``."""
        return self.singular_values[0] if self.singular_values else 0.0

    @staticmethod
    def of(module: str, experts: Sequence[Sequence[float]]) -> Spectrum:
        """Describe singular values, those of each expert."""
        values = sorted((value for one in experts for value in one), reverse=True)
        profile = profile_of(experts)
        return Spectrum(
            module,
            tuple(values),
            stable_rank(values),
            effective_rank(values),
            {name: energy_rank(profile, share) for name, share in ENERGIES.items()},
            tuple(map(tuple, experts)),
        )

    @property
    def summary(self) -> dict[str, float]:
        """The numbers that tell what shape it has."""
        return {
            "frobenius_norm": self.frobenius_norm,
            "spectral_norm": self.spectral_norm,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            **self.energy_ranks,
        }

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises, and more."""
        return {"singular_values": list(self.singular_values), **self.summary}


def spectra(
    adapter: Adapter, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[Spectrum, ...]:
    """Return the spectrum of every site of ``adapter``, in their order.

    Raises:
        AdapterError: A site is broken, or holds NaN or infinity.
    """
    for site in adapter.sites:
        check_sound(site, adapter)
    joints, _ = join([adapter], to_write=False)

    def one(joint: Joint) -> Spectrum:
        return Spectrum.of(joint.name, joint_spectra(joint, Method()))

    sizes = [joint.nbytes for joint in joints]
    return tuple(in_parallel(one, joints, threads=threads, progress=progress, sizes=sizes))
