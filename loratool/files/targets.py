"""Outputs that go to a store: a path on the disk stands for each, where nothing is ever written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratool.files.objects.addresses import Address

__all__ = ["forget_targets", "let_stand_for", "target_of"]

_targets: dict[Path, Address] = {}
"""By the paths that stand for them; empty in a run that writes to the disk."""


def let_stand_for(path: Path, address: Address) -> None:
    """Let a path stand for an address that is written to."""
    _targets[path] = address


def target_of(path: Path) -> Address | None:
    """Return the address that a path stands for as an output; ``None`` for one of the disk."""
    return _targets.get(path) if _targets else None


def forget_targets() -> None:
    """Let no path stand for an address any more."""
    _targets.clear()
