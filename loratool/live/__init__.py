"""Adapters on a live PyTorch model: attach, switch, train, fold in and save, without peft."""

from __future__ import annotations

from loratool.live.attaching import attach
from loratool.live.control import Live

__all__ = ["Live", "attach"]
