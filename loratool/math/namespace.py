"""The array API namespace of arrays, and the few things that the standard lacks.

Arithmetic is written once, against the array API standard (https://data-apis.org/array-api/).
numpy (2.1 or later) is itself such a namespace. PyTorch is not, and ``array_api_compat.torch``
stands in for it; it is imported once an argument is a tensor, when torch is loaded already.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

__all__ = [
    "Array",
    "array_namespace",
    "beside",
    "double",
    "is_on_host",
    "on_host",
    "padded",
    "squared_norm",
]

Array: TypeAlias = Any
"""An array of any library; numpy arrays and PyTorch tensors have no static type in common."""


def array_namespace(*arrays: Array | None) -> Any:
    """Return the namespace that all ``arrays`` belong to; ``None`` belongs to any.

    Raises:
        TypeError: They belong to different libraries, or to none.
    """
    present = [array for array in arrays if array is not None]
    if all(isinstance(array, np.ndarray) for array in present):
        return np
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    if tensor is not None and all(isinstance(array, tensor) for array in present):
        import array_api_compat.torch

        return array_api_compat.torch
    found = {
        array.__array_namespace__() if hasattr(array, "__array_namespace__") else type(array)
        for array in present
    }
    if len(found) != 1 or isinstance(namespace := found.pop(), type):
        kinds = sorted({type(array).__qualname__ for array in present})
        raise TypeError(f"no array library is that of {' and '.join(kinds)}")
    return namespace


def is_on_host(array: Array) -> bool:
    """Whether the processor can read the elements."""
    return str(array.device) == "cpu"


def on_host(array: Array) -> np.ndarray:
    """Return a numpy array of the elements, in the same memory where that is possible."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):  # PyTorch converts only what needs no gradient
        array = array.detach().cpu()
    return np.asarray(array)


def beside(values: np.ndarray, array: Array) -> Array:
    """Return ``values`` as an array of the library and on the device of ``array``."""
    if isinstance(array, np.ndarray):
        return values
    if min(values.strides, default=0) < 0:  # PyTorch knows none such
        values = values.copy()
    xp = array_namespace(array)
    if str(array.device).startswith("cuda"):
        # From pinned memory it goes without anybody waiting.
        return xp.asarray(values).pin_memory().to(array.device, non_blocking=True)
    return xp.asarray(values, device=array.device)


def double(array: Array) -> Array:
    """Return ``array`` in float64, itself if it is that already."""
    xp = array_namespace(array)
    return xp.astype(array, xp.float64, copy=False)


def squared_norm(array: Array) -> float:
    """Return the sum of all squares, each squared and added up in float64."""
    if isinstance(array, np.ndarray):
        axes = list(range(array.ndim))
        return float(np.einsum(array, axes, array, axes, [], dtype=np.float64))
    wide = double(array)
    return float(array_namespace(array).sum(wide * wide))


def padded(matrix: Array, rows: int, columns: int) -> Array:
    """Return ``matrix`` with zeros below and to the right of it, ``(rows, columns)``.

    A matrix that is as large already is returned itself.
    """
    xp = array_namespace(matrix)
    for axis, size in enumerate((rows, columns)):
        missing = size - matrix.shape[axis]
        if missing > 0:
            shape = (missing, matrix.shape[1]) if axis == 0 else (matrix.shape[0], missing)
            zeros = xp.zeros(shape, dtype=matrix.dtype, device=matrix.device)
            matrix = xp.concat([matrix, zeros], axis=axis)
    return matrix
