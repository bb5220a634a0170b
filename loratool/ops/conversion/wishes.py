"""What a conversion is asked for, beyond the scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapter.model import Adapter
from loratool.adapter.scheme import KeyScheme
from loratool.ops.conversion.base import Base
from loratool.ops.targets.target import Target

__all__ = ["Wishes"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a conversion is asked for, beyond the scheme.

    Attributes:
        output: Where it goes.
        base: The base, where one was given.
        initial: The adapter as it was before training, where its initialisation changed the base.
        dtype: The dtype to write (``F32``), or ``None``.
        family: Which pipeline the modules belong to, where names do not tell.
        naming: ``native`` or ``diffusers`` for the backbone, or ``None`` for what is usual.
        component: Write this component of a pipeline only, in its own names.
        name: The adapter's name inside the file, for schemes that have one.
        drop: Regular expressions of what may be left out.
        to_lora: Whether to write plain LoRA whatever the variant.
        rank: Rank of what has to be approximated for that.
        fold: Fold all scales into the factors.
        pad: Give all modules this rank, the missing ones zero.
        target: The loader that it is for, where one was named.
        options: What was asked for, for the metadata; without it the history of the input is
            that of the output.
        history: The history to record instead of either.
        then: The scheme that the output is converted to in the end, where it is only a step.
        digest: SHA-256 of the input's weights.
    """

    output: Path
    base: Base | None = None
    initial: Adapter | None = None
    dtype: str | None = None
    family: str | None = None
    naming: str | None = None
    component: str | None = None
    name: str | None = None
    drop: tuple[str, ...] = ()
    to_lora: bool = False
    rank: int | None = None
    fold: bool = False
    pad: int | None = None
    target: Target | None = None
    options: Mapping[str, Any] | None = None
    history: Mapping[str, str] | None = None
    then: KeyScheme | None = None
    digest: str | None = None
