"""What the planning of one adapter's share of a merge needs to know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loratool.adapter.model import Adapter
from loratool.files.checkpoint import Checkpoint
from loratool.files.spec import StoredTensor
from loratool.names.conv1d import CONV1D_LEAVES, CONV1D_MODEL_TYPES
from loratool.ops.merging.modules import ModuleIndex
from loratool.ops.plan import Blend, Edit, SetRows

__all__ = ["BaseView", "Changes", "Share"]


class BaseView:
    """The base as a merge sees it: tensors by name, modules, model type.

    Args:
        checkpoint: The opened base.
        tensors: Its tensors, where they are not those of the checkpoint (a replicated stack).
    """

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor] | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.tensors = checkpoint.tensors if tensors is None else tensors
        self.index = ModuleIndex(self.tensors, self.model_types)

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed ``config.json``; empty where there is none."""
        return self.checkpoint.config

    @cached_property
    def model_types(self) -> frozenset[str]:
        """Model types of the model and of its parts."""
        parts = [self.config, *(v for v in self.config.values() if isinstance(v, dict))]
        return frozenset(str(part["model_type"]) for part in parts if "model_type" in part)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the base's tensor ``name``."""
        return self.tensors[name].spec.shape

    @cached_property
    def _conv1d_by_shape(self) -> bool | None:
        """Whether the layers called ``c_attn`` or ``c_fc`` widen along their second axis."""
        for name, stored in self.tensors.items():
            parts = name.split(".")
            if parts[-1] == "weight" and len(parts) > 1 and parts[-2] in ("c_attn", "c_fc"):
                shape = stored.spec.shape
                if len(shape) == 2 and shape[0] != shape[1]:
                    return shape[0] < shape[1]
        return None

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a square weight is stored as ``(in, out)``; ``None`` if nothing can tell.

        Decided by the other layers of the same kind, then by the model type.
        """
        if module.rpartition(".")[2] in CONV1D_LEAVES:
            if self._conv1d_by_shape is not None:
                return self._conv1d_by_shape
            if self.model_types:
                return bool(self.model_types & CONV1D_MODEL_TYPES)
            return None
        return False if self.model_types else None


@dataclass
class Changes:
    """What happens to one tensor: the base's, or one that is added.

    Attributes:
        replacement: The adapter's tensor that takes its place, if any.
        base: The adapter's copy of the base's tensor, where it has another shape (a resized
            vocabulary): what the edits apply to.
        edits: What is done to it, in order.
    """

    replacement: StoredTensor | None = None
    base: StoredTensor | None = None
    edits: list[Edit] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.replacement is not None or self.base is not None or bool(self.edits)

    @property
    def source(self) -> StoredTensor | None:
        """What the adapter puts in the place of the base's tensor, if anything."""
        return self.replacement or self.base

    @property
    def effects(self) -> list[Edit]:
        """The edits without copies of the base weight, which change nothing by themselves."""
        return [e for e in self.edits if not (isinstance(e, Blend) and e.only_if_different)]

    @property
    def is_rows_only(self) -> bool:
        """Whether it gives some rows new values and nothing else."""
        return self.replacement is None and all(isinstance(e, SetRows) for e in self.effects)


@dataclass
class Share:
    """One adapter's part in a merge.

    Attributes:
        adapter: The adapter.
        weight: What its delta is multiplied by.
        changes: By the name of the output tensor.
        notes: What a user should know.
    """

    adapter: Adapter
    weight: float
    changes: dict[str, Changes] = field(default_factory=lambda: defaultdict(Changes))
    notes: list[str] = field(default_factory=list)

    def where(self, what: str) -> str:
        """Return ``what`` with the adapter's path before it, for error messages."""
        return f"{self.adapter.path}: {what}"
