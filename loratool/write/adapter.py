"""An adapter that does not exist yet: what it is made of, in no scheme in particular."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapter.part import Part
from loratool.adapter.told import Told
from loratool.files.inputs import Stamp
from loratool.plan.history import History
from loratool.plan.sidecar import Sidecar
from loratool.values.expr import Together
from loratool.write.extras import Extras

__all__ = ["NewAdapter"]


@dataclass(frozen=True, kw_only=True)
class NewAdapter:
    """An adapter that will be written.

    Attributes:
        parts: Its modules.
        extras: What travels beside them.
        scheme: The scheme that it comes in; empty where it is of none, or of several.
        config: PEFT's configuration to start from; ``None`` where nothing has one.
        config_changes: Fields that it gets.
        keeps_targets: Whether its fields that choose modules mean exactly these modules.
        sidecar: The configuration that it came with, where that is another tool's than PEFT.
        family: The pipeline that its modules belong to, where known.
        components: What begins their paths and is a component of a pipeline for certain.
        is_native: Whether its backbone is named as in original checkpoints.
        name: Its name inside the file that it comes from.
        stem: The name of that file.
        metadata: What it says about its training.
        told: What is known of the model that it is for.
        history: How it came to be.
        licence: What its card says of its licence, where it comes with none of its own.
        sidecars: Files that travel along.
        measured: What is computed for its report alone.
        stamps: What the inputs were when their headers were read.
        notes: What a user should know.
        dropped: Tensors and modules that are not written, with the reason.
        left_behind: Files beside the weights that are not carried over, with the reason.
    """

    parts: tuple[Part, ...]
    extras: Extras = field(default_factory=Extras)
    scheme: str = ""
    config: Mapping[str, Any] | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    keeps_targets: bool = False
    sidecar: Mapping[str, Any] | None = None
    family: str | None = None
    components: frozenset[str] = frozenset()
    is_native: bool = False
    name: str | None = None
    stem: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    told: Told | None = None
    history: History | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    sidecars: tuple[Sidecar, ...] = ()
    measured: tuple[Together, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    left_behind: tuple[tuple[str, str], ...] = ()
