"""How an adapter is to be written, beyond the scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapter.scheme import Told
from loratool.base.model import Model

__all__ = ["WriteOptions"]


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How an adapter is to be written, beyond the scheme.

    Attributes:
        output: Where it goes.
        base: The base, where one was given.
        told: What the base says of itself, where it is at hand and nothing else of it is needed.
        dtype: The dtype to write (``F32``), or ``None`` for that of each tensor.
        family: Which pipeline the modules belong to, where names do not tell.
        naming: ``native`` or ``diffusers`` for the backbone, or ``None`` for what is usual.
        keeps_naming: Whether a backbone goes by the names that were read, where the scheme is the
            one that it was read in; else by those that are usual there.
        component: Write this component of a pipeline only, in its own names.
        name: The adapter's name inside the file, for schemes that have one.
        fold: Fold all scales into the factors.
        pad: Give all modules this rank, the missing ones zero.
        config: Fields that PEFT's configuration gets in any case.
    """

    output: Path
    base: Model | None = None
    told: Told | None = None
    dtype: str | None = None
    family: str | None = None
    naming: str | None = None
    keeps_naming: bool = False
    component: str | None = None
    name: str | None = None
    fold: bool = False
    pad: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
