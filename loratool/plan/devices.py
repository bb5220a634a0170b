"""Where factors are computed with: numpy on the processor, torch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratool.errors import UnsupportedError

__all__ = ["check_torch", "mover_to"]

PROCESSOR = ("auto", "cpu")


def mover_to(name: str) -> Callable[[Any], Any]:
    """Return what brings an array to the device that ``--device`` means.

    ``auto`` is the processor: what is done with factors takes less time than the way to a GPU.

    Raises:
        UnsupportedError: There is no such device, or no torch to reach it with.
    """
    if name in PROCESSOR:
        return _same
    check_torch(name)
    import torch

    from loratool.plan.gpu import resolve_device

    device = resolve_device(name)
    return lambda array: torch.from_numpy(array.copy()).to(device)


def check_torch(device: str) -> None:
    """Refuse a device that only torch reaches, where there is no torch.

    Raises:
        UnsupportedError: It cannot be imported.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"--device {device}",
            f"computing on a GPU needs PyTorch, which cannot be imported: {error}",
            hint="leave out --device to compute on the processor, which needs none",
        ) from None


def _same(array: Any) -> Any:
    return array
