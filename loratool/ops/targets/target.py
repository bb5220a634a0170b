"""What a loader accepts, as data: one ``Target`` for each, in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = ["Fate", "Feature", "Fusion", "Mend", "Rule", "ScaleReading", "Target"]


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


class ScaleReading(Enum):
    """How a loader finds the number that multiplies ``B @ A``."""

    GLOBAL = "lora_alpha / r of adapter_config.json, the same for every module"
    GLOBAL_STABILISED = (
        "lora_alpha / r of adapter_config.json, or lora_alpha / sqrt(r) with use_rslora, the same "
        "for every module"
    )
    GLOBAL_ALPHA = (
        "one lora_alpha over the rank of each module's tensors; an alpha of 0 counts as 1"
    )
    MODULE_ALPHA = "each module's alpha tensor over its rank, or 1 where it has none"
    DIFFUSERS = "what diffusers' converters make of alphas"
    MULTIPLIER = "lora_parameters.scale of adapter_config.json, as it is"


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
class Target:
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
