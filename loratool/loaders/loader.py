"""What a loader accepts: one ``Loader`` for each, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from loratool.adapter.findings import Finding
from loratool.adapter.model import Adapter, Site

__all__ = ["Fate", "Feature", "Fusion", "Loader", "Mend", "Rule", "ScaleReading"]


class Fate(Enum):
    """What becomes of something that a loader has no right place for."""

    REFUSED = "refused"
    """Loading fails."""
    MISREAD = "misread"
    """Loading succeeds, and the model is not the one that was trained."""
    NOTED = "noted"
    """It depends on the base, or on how the loader is started."""


class Mend(Enum):
    """What makes it right."""

    CONVERT = "convert"
    """Conversion alone."""
    TO_LORA = "to lora"
    """Conversion to plain LoRA factors, which equal it exactly."""
    APPROXIMATE = "approximate"
    """Conversion to the nearest plain LoRA factors; exactly, only a merge."""
    MERGE = "merge"
    """Only a merge into the base, or leaving it out."""


class Feature(Enum):
    """What an adapter may hold beyond one rank, one alpha and two matrices for each module."""

    PATTERNS = "rank_pattern or alpha_pattern"
    DORA = "magnitudes (DoRA)"
    BIASES = "biases"
    SAVED = "whole weights (modules_to_save)"
    NORMS = "whole weights of norms"
    TOKEN_ROWS = "trained token rows"
    EMBEDDING = "the delta of an embedding"
    HEAD = "the delta of the output head"
    PARAMETERS = "deltas of raw parameters (target_parameters)"
    CONVOLUTION = "deltas of convolutions"
    CP = "convolutions in three factors (lora_mid)"
    LOHA = "LoHa"
    LOKR = "LoKr"
    COMPACT = "factors in compact or divided form (AdaLoRA, BD-LoRA, stacked)"
    BASE_DEPENDENT = "deltas that depend on the base (KaSA, QALoRA)"
    UNFACTORED = "differences or rotations without low-rank factors"
    CHANGED_BASE = "a delta relative to a base that its initialisation changed"
    CONDITIONAL = "activation by tokens (aLoRA)"


@dataclass(frozen=True, slots=True)
class ScaleReading:
    """How a loader finds the number that multiplies ``B @ A``.

    Attributes:
        words: Where it takes it from, as the end of a sentence.
        of: Returns, for an adapter, what gives the factor that is applied to a module with A and
            B; ``None`` where the loader finds none.
    """

    words: str
    of: Callable[[Adapter], Callable[[Site], float | None]]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a loader does with something.

    Attributes:
        fate: Whether it refuses or misreads it.
        words: What it does, as the end of a sentence that begins with what it is.
        mend: What makes it right.
    """

    fate: Fate
    words: str
    mend: Mend = Mend.MERGE


@dataclass(frozen=True, slots=True)
class Fusion:
    """A module that is several projections in one.

    Attributes:
        parts: Their names, in the order of the rows of B.
        heads: Whether their sizes are those of attention heads, else all are alike.
    """

    parts: tuple[str, ...]
    heads: bool = False


@dataclass(frozen=True)
class Loader:
    """The rules of one loader.

    Attributes:
        name: What the command line calls it.
        title: What people call it.
        summary: One line on what is written for it.
        scheme: The key scheme to write.
        reads: The schemes that it reads.
        scale: Where it takes the scale from.
        fold: Whether the scale goes into B, so that nothing is left to interpret.
        rules: What it refuses or misreads; what is not here is accepted.
        tolerates: Schemes that it reads with a reservation, and which.
        direct: Schemes that it reads from any file, with no configuration beside it.
        mixed_ranks: What it does with modules of different ranks; ``None`` if that is right.
        uniform_rank: Whether all modules are written with one rank, filled up with zeros.
        ranks: The ranks that it can be set up for; empty for all.
        default_rank: The largest rank that it accepts unless told otherwise.
        rank_option: The option that says so.
        fusions: Modules that it wants apart where the base has them apart.
        fused: What it does with them in one.
        wrapped: What it does with keys that carry the prefix of a wrapper.
        named: What it does with keys that carry the adapter's name (``lora_A.default.weight``).
        file_names: What the weights file may be called; empty for any name.
        required: Fields that the configuration must have.
        regex_targets: What it does with a regular expression as ``target_modules``.
        config: Fields of the written configuration, whatever the input says.
        checks: What else it refuses or misreads, of an adapter in a scheme that it reads.
        source: Where the rules come from.
    """

    name: str
    title: str
    summary: str
    scheme: str
    reads: frozenset[str]
    scale: ScaleReading
    fold: bool
    rules: Mapping[Feature, Rule]
    tolerates: Mapping[str, str] = field(default_factory=dict)
    direct: frozenset[str] = frozenset()
    mixed_ranks: Rule | None = None
    uniform_rank: bool = False
    ranks: tuple[int, ...] = ()
    default_rank: int | None = None
    rank_option: str = ""
    fusions: Mapping[str, Fusion] = field(default_factory=dict)
    fused: str = ""
    wrapped: Rule | None = None
    named: Rule | None = None
    file_names: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    regex_targets: Rule | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Callable[[Adapter, Loader], Iterator[Finding]], ...] = ()
    source: str = ""

    @property
    def largest_rank(self) -> int | None:
        """The largest rank that it accepts at all, or ``None``."""
        return max(self.ranks, default=None)

    def next_rank(self, rank: int) -> int | None:
        """Return the smallest rank that it can be set up for and that holds ``rank``."""
        if not self.ranks:
            return rank
        return min((known for known in self.ranks if known >= rank), default=None)
