"""Call a function of torch tensors with arrays; goes as soon as arithmetic takes arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["through_torch"]


def through_torch(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Return ``function`` for float64 arrays."""

    def call(*arrays: Any) -> tuple[Any, ...]:
        import torch

        return tuple(t.double().numpy() for t in function(*map(torch.from_numpy, arrays)))

    return call
