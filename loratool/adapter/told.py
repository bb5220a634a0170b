"""What is known of the model that an adapter is for, to schemes that depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Told"]


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of the model that an adapter is for, to a scheme that depends on it.

    Attributes:
        metadata: What the adapter's file says of itself.
        base: What the base's weights file does.
        config: What the base's configuration says of its language model; empty where there is none.
        is_tied: What it says about tied embeddings, if anything.
        folder: Where the adapter is, if it is in a file: its tool may have left more there.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    is_tied: bool | None = None
    folder: Path | None = None
