"""The model of an adapter: sites, extras, configuration. Made from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.scaling import Scaling
from loratool.adapter.slots import Slot
from loratool.adapter.told import Told
from loratool.adapter.variant import NO_GEOMETRY, Geometry, Variant
from loratool.files.containers import is_weights
from loratool.files.inputs import Stamp
from loratool.files.spec import StoredTensor

__all__ = [
    "FILE_ALPHA_KEY",
    "FUSED_PARAMETERS",
    "HEAD_LEAVES",
    "HISTORY_KEY",
    "INVOCATION_KEY",
    "UNTOLD",
    "Adapter",
    "Extra",
    "ExtraKind",
    "Kind",
    "Site",
    "in_registered_order",
    "is_folded",
    "unknown_scale",
    "without",
]

HEAD_LEAVES: Final = frozenset(("lm_head", "embed_out", "output_projection", "proj_out", "lm_loss"))
"""What output heads that may share the embedding's weight are called."""

HISTORY_KEY: Final = "loratool"
"""Metadata of what loratool has written: where it records no alpha, the scale is 1."""

FILE_ALPHA_KEY: Final = "adapter.lora.alpha"
"""Metadata of what has one alpha for all modules in its file."""

UNTOLD: Final = "untold"
"""In settings: the specs of tensors beside the factors that nobody knows the meaning of."""
INVOCATION_KEY: Final = "adapter.alora.invocation_tokens"
"""Metadata of what acts after its tokens only."""

FUSED_PARAMETERS: Final = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""The parameters of fused experts, in the order in which transformers registers them."""


def in_registered_order(parameters: Iterable[str]) -> tuple[str, ...]:
    """Return paths of parameters once each, those of known names in their registered order."""
    unique = list(dict.fromkeys(parameters))
    leaves = [path.rpartition(".")[2] for path in unique]
    if not all(leaf in FUSED_PARAMETERS for leaf in leaves):
        return tuple(unique)
    return tuple(sorted(unique, key=lambda path: FUSED_PARAMETERS.index(path.rpartition(".")[2])))


class Kind(Enum):
    """What kind of weight a site adapts."""

    LINEAR = "linear"
    CONV = "conv"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Site:
    """One adapted module.

    Attributes:
        module: Its dotted path, as the adapter spells it.
        kind: Linear, conv or embedding.
        variant: What its tensors make of its weight.
        slots: Its tensors by role.
        scaling: Alpha and rank.
        nesting: How many ``base_layer`` steps the key had; adapters on several parameters of
            one module nest that way, the first registered parameter innermost.
        parameters: Full paths of the raw parameters that the configuration lets this site
            adapt (``target_parameters``); empty for ordinary modules.
        enabled: Which of the parts of a merged projection stacked factors are for
            (``enable_lora``); empty for ordinary factors.
        settings: What else its variant knows about it.
        spelled: What the file calls the module, where that is not its path.
    """

    module: str
    kind: Kind
    variant: Variant
    slots: Mapping[Slot, StoredTensor]
    scaling: Scaling
    nesting: int = 0
    parameters: tuple[str, ...] = ()
    enabled: tuple[bool, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    spelled: str = ""

    @property
    def geometry(self) -> Geometry:
        """Shapes of the delta; zeros where the tensors do not tell."""
        try:
            shapes = {slot: tensor.spec.shape for slot, tensor in self.slots.items()}
            return self.variant.geometry(shapes, self.settings)
        except (KeyError, IndexError, ValueError):
            return NO_GEOMETRY

    @property
    def is_plain(self) -> bool:
        """Whether it has A and B, whatever lies beside or between them."""
        return self.variant.is_plain

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All that its delta is computed from: its own tensors, and those that it shares."""
        shared = {i.spec.name: i for i in self.settings.values() if isinstance(i, StoredTensor)}
        return (*self.slots.values(), *shared.values())

    @property
    def down(self) -> StoredTensor | None:
        """A: ``(r, in)``, ``(r, in, *kernel)`` or ``(r, num_embeddings)``."""
        return self.slots.get(Slot.DOWN) or self.slots.get(Slot.EMBEDDING_DOWN)

    @property
    def up(self) -> StoredTensor | None:
        """B: ``(out, r)``, ``(out, r, 1, …)`` or ``(dim, r)``."""
        return self.slots.get(Slot.UP) or self.slots.get(Slot.EMBEDDING_UP)

    @property
    def label(self) -> str:
        """The module, with its nesting where that tells two sites apart."""
        return self.module + ".base_layer" * self.nesting

    @property
    def pattern_path(self) -> str:
        """What ``rank_pattern`` and ``alpha_pattern`` are matched against.

        The output projection inside an ``nn.MultiheadAttention`` goes by the attention's name.
        """
        is_inner = self.nesting > 0 and not self.parameters
        return self.module.rpartition(".")[0] if is_inner else self.module

    @property
    def rows(self) -> int:
        """Rows of A: the rank, or ranks of all experts together where A stacks them."""
        down = self.down
        if down is None:
            return 0 if self.is_plain else self.geometry.rank
        return down.spec.shape[0] if down.spec.shape else 0

    @property
    def experts(self) -> int:
        """How many experts A stacks; 1 for an ordinary module."""
        if not self.parameters or not self.scaling.rank or self.rows % self.scaling.rank:
            return 1
        return max(1, self.rows // self.scaling.rank)

    @property
    def rank(self) -> int:
        """The rank of one delta."""
        return self.rows // self.experts

    @property
    def in_features(self) -> int:
        """Columns of A: inputs, input channels, or rows of the embedding."""
        down = self.down
        if down is None:
            return 0 if self.is_plain else self.geometry.into
        return down.spec.shape[1] if len(down.spec.shape) > 1 else 0

    @property
    def out_features(self) -> int:
        """Rows of B: outputs, output channels, or the embedding's dimension."""
        up = self.up
        if up is None and not self.is_plain:
            return self.geometry.out
        rows = up.spec.shape[0] if up and up.spec.shape else 0
        return rows // sum(self.enabled) * len(self.enabled) if self.enabled else rows


class ExtraKind(Enum):
    """What a tensor is that belongs to no delta."""

    FULL = "full"
    """A whole weight or bias: it replaces the base's, or is added to it."""
    BASE_COPY = "base copy"
    """An unmerged copy of the weight that a site adapts."""
    ROWS = "rows"
    """New values for some rows of an embedding."""
    SHARED = "shared"
    """Something that the deltas of several sites are made of."""
    STATE = "state"
    """Something that only training needs."""


@dataclass(frozen=True, slots=True)
class Extra:
    """A tensor that travels with the adapter without being part of a delta.

    Attributes:
        key: Its name in the file.
        name: The parameter it stands for, in the adapter's spelling (``lm_head.weight``).
        kind: What becomes of it.
        tensor: Where it is.
    """

    key: str
    name: str
    kind: ExtraKind
    tensor: StoredTensor


def is_folded(adapter: Adapter) -> bool:
    """Whether the file says that it was written with every scale in the factors."""
    return HISTORY_KEY in adapter.metadata


def unknown_scale(adapter: Adapter) -> str | None:
    """Return what has to be said where nothing records the scale of some modules, else ``None``.

    It is then taken as 1. Files that loratool wrote with every scale in the factors are right so.
    """
    missing = [
        site
        for site in adapter.sites
        if site.scaling.alpha is None and (site.is_plain or site.variant.is_compact)
    ]
    if not missing or is_folded(adapter):
        return None
    some = "" if len(missing) == len(adapter.sites) else f" for {len(missing)} modules"
    return f"alpha is not recorded{some}, so the scale is taken as 1"


@dataclass(frozen=True)
class Adapter:
    """An adapter whose headers have been read.

    Attributes:
        path: What the user named.
        weights: The weights file.
        scheme: Name of the key scheme.
        sites: Adapted modules in the order of their names.
        extras: Everything else in the file.
        config: The PEFT configuration, where there is one.
        metadata: The file's own metadata.
        name: The adapter's name inside the file, where keys carry one.
        notes: What is worth knowing and no error, one sentence each.
        skipped: Keys that were left out on request.
        stamp: What the weights file was when its header was read.
        tensors: All tensors that belong to it, by key.
        sidecar: ``adapter_config.json``, where it is another tool's than PEFT's.
        unresolved: Modules whose dotted path the file does not tell, with the paths that it
            may be; none where the name is unknown altogether.
        unknown: Why that is so, where the scheme itself can tell.
        family: The pipeline that its modules belong to (``sdxl``, ``flux``), where known.
        components: What begins its paths and is a component of a pipeline for certain.
        is_native: Whether its backbone was named as in original checkpoints.
        mixed: Keys of factors that another scheme would read, and its own does not.
        beside: Weights of a base that lie in its file and are not its own, by key.
        told: What is known of the model that it is for.
        others: Further files that its tensors lie in, and what they were.
    """

    path: Path
    weights: Path
    scheme: str
    sites: tuple[Site, ...]
    extras: tuple[Extra, ...]
    config: LoraConfig | None
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    stamp: Stamp
    name: str | None = None
    notes: tuple[str, ...] = field(default=())
    skipped: tuple[str, ...] = field(default=())
    sidecar: Mapping[str, Any] | None = None
    unresolved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: str | None = None
    family: str | None = None
    components: frozenset[str] = frozenset()
    is_native: bool = False
    mixed: tuple[str, ...] = ()
    beside: Mapping[str, StoredTensor] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    others: Mapping[Path, Stamp] = field(default_factory=dict)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """What every file of its weights was when its header was read, the first one first."""
        return {self.weights: self.stamp, **self.others}

    @property
    def title(self) -> str:
        """What people call it: its folder, or its file without the ending."""
        path = self.path.resolve()
        return path.stem if is_weights(path) else path.name

    @property
    def folder(self) -> Path:
        """Where its sidecars are."""
        return self.weights.parent

    @property
    def parameters(self) -> int:
        """Number of trained numbers: elements of all tensors but alphas, which nobody trains."""
        alphas = {
            site.slots[Slot.ALPHA].spec.name for site in self.sites if Slot.ALPHA in site.slots
        }
        specs = (tensor.spec for tensor in self.tensors.values())
        return sum(spec.elements for spec in specs if spec.name not in alphas)

    @property
    def nbytes(self) -> int:
        """Size of all its tensors in bytes."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    @property
    def is_conditional(self) -> bool:
        """Whether it acts after its invocation tokens only (aLoRA)."""
        is_told = self.config is not None and self.config.flag("alora_invocation_tokens")
        return is_told or INVOCATION_KEY in self.metadata

    @property
    def base_model(self) -> str | None:
        """What it says that it was trained on."""
        said = self.config.base_model if self.config is not None else None
        other = (self.sidecar or {}).get("model")
        return said or (other if isinstance(other, str) else None)

    def field(self, name: str) -> Any:
        """Return a raw field of its configuration, or ``None``."""
        return self.config.raw.get(name) if self.config else None


def without(adapter: Adapter, sites: Iterable[str], extras: Iterable[str]) -> Adapter:
    """Return an adapter without some of its sites (by label) and extras (by key)."""
    gone, keys = set(sites), set(extras)
    kept = tuple(site for site in adapter.sites if site.label not in gone)
    is_shared = {extra.key for extra in adapter.extras if extra.kind is ExtraKind.SHARED}
    keys = keys - is_shared if kept else keys | is_shared
    own = {tensor.spec.name for site in kept for tensor in site.tensors}
    lost = {
        tensor.spec.name
        for site in adapter.sites
        if site.label in gone
        for tensor in site.slots.values()
    } - own
    left = {key for key, tensor in adapter.tensors.items() if tensor.spec.name in lost} | keys
    return replace(
        adapter,
        sites=kept,
        extras=tuple(extra for extra in adapter.extras if extra.key not in keys),
        tensors={key: tensor for key, tensor in adapter.tensors.items() if key not in left},
        skipped=(*adapter.skipped, *(key for key in adapter.tensors if key in left)),
    )
