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
        config: The base's parsed ``config.json``, or that of the copy which lies beside the
            adapter; empty where there is none.
        folder: Where the adapter is, if it is in a file: its tool may have left more there.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
