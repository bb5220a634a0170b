"""Adapters on a live PyTorch model: attach, switch, train, fold in and save, without peft."""

from __future__ import annotations

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"loratool.live needs PyTorch, which cannot be imported: {error}; pip install torch"
    ) from None

from loratool.live.attaching import attach
from loratool.live.control import Live

__all__ = ["Live", "attach"]
