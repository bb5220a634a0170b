"""Where factors are computed with: numpy on the processor, torch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratool.errors import UnsupportedError

__all__ = ["mover_to"]

PROCESSOR = ("auto", "cpu")


def mover_to(name: str) -> Callable[[Any], Any]:
    """Return what brings an array to the device that ``--device`` means.

    ``auto`` is the processor: what is done with factors takes less time than the way to a GPU.

    Raises:
        UnsupportedError: There is no such device, or no torch to reach it with.
    """
    if name in PROCESSOR:
        return _same
    try:
        import torch
    except ImportError:
        raise UnsupportedError(
            f"--device {name}", "needs torch, which is not installed", hint="pip install torch"
        ) from None
    from loratool.ops.tensors import resolve_device

    device = resolve_device(name)
    return lambda array: torch.from_numpy(array.copy()).to(device)


def _same(array: Any) -> Any:
    return array
