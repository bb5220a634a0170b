"""The array libraries that arithmetic has to work with; truth is computed in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["Library", "on_libraries"]


class Library:
    """Calls functions with arrays of one library, and hands back tensors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call ``function`` with arrays in place of all tensors; no argument may change."""
        copies = [self.arrays(argument) for argument in arguments]
        named = {key: self.arrays(value) for key, value in options.items()}
        found = self.tensors(function(*copies, **named))
        for before, after in zip(arguments, copies, strict=True):
            assert_same(before, self.tensors(after))
        return found

    def arrays(self, value: Any) -> Any:
        """Return what ``value`` is with arrays in place of its tensors."""

        def copy(tensor: torch.Tensor) -> Any:
            plain = tensor.detach().clone()
            return plain.numpy() if self.name == "numpy" else plain

        return mapped(value, torch.Tensor, copy)

    def tensors(self, value: Any) -> Any:
        """Return what ``value`` is with tensors in place of its arrays, all of one library."""
        if self.name == "numpy":
            mapped(value, torch.Tensor, refuse)
            return mapped(value, np.ndarray, lambda array: torch.from_numpy(array.copy()))
        mapped(value, np.ndarray, refuse)
        return value


def on_libraries(test: Any) -> Any:
    """Run a test with ``library`` as each of the libraries."""
    names = ("numpy", "torch")
    return pytest.mark.parametrize("library", [Library(name) for name in names], ids=names)(test)


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Change all values of a kind, also inside of tuples, lists and dataclasses."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(part, kind, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: mapped(getattr(value, f.name), kind, change) for f in fields(value)}
        return type(value)(**parts)
    return value


def refuse(array: Any) -> Any:
    """Fail: a result is an array of another library than the arguments."""
    raise AssertionError(f"a {type(array)} in the result")


def assert_same(before: Any, after: Any) -> None:
    """Make sure that a function has left its arguments alone."""
    seen: list[torch.Tensor] = []
    mapped(before, torch.Tensor, lambda tensor: seen.append(tensor) or tensor)
    mapped(
        after,
        torch.Tensor,
        lambda tensor: torch.testing.assert_close(
            tensor, seen.pop(0).detach(), rtol=0, atol=0, equal_nan=True
        ),
    )
