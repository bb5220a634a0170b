"""Stored numbers as float64 arrays and back, in numpy: torch takes seconds to import.

bfloat16 is the upper half of a float32; rounding to it is to the nearest, ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loratool.files.container import read_view
from loratool.files.spec import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Rounded", "decode", "encode"]

KINDS: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def decode(stored: StoredTensor) -> Array:
    """Read a tensor as float64, which holds every value of its dtype."""
    import numpy as np

    shape, dtype = stored.spec.shape, stored.spec.dtype
    if dtype in KINDS:
        return np.frombuffer(read_view(stored), KINDS[dtype]).reshape(shape).astype(np.float64)
    if dtype == "BF16":
        return _from_bfloat16(np.frombuffer(read_view(stored), "<u2")).reshape(shape)
    from loratool.ops.tensors import read_tensor

    values: Array = read_tensor(stored).double().numpy()
    return values


def encode(values: Array, dtype: str) -> NDArray[Any]:
    """Return ``values`` rounded once to ``dtype``; bfloat16 and 8-bit floats as their bits."""
    import numpy as np

    if dtype in KINDS:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values).astype(KINDS[dtype])
    if dtype == "BF16":
        return _to_bfloat16(values)
    import torch

    from loratool.ops.tensors import torch_dtype

    made = torch.from_numpy(np.ascontiguousarray(values)).to(torch_dtype(dtype))
    return made.view(torch.uint8).numpy()


@dataclass(frozen=True, slots=True)
class Rounded:
    """An array as it is written.

    Attributes:
        bits: What is written, in the shape of the array.
        values: The numbers that ``bits`` stand for.
        is_exact: Whether those are the numbers that were asked for.
        is_finite: Whether they are finite where those were.
    """

    bits: NDArray[Any]
    values: Array
    is_exact: bool
    is_finite: bool

    @staticmethod
    def of(values: Array, dtype: str) -> Rounded:
        """Round ``values`` to ``dtype``, once."""
        import numpy as np

        bits = encode(values, dtype)
        back = _decoded(bits, dtype, values.shape)
        is_exact = np.array_equal(back, values, equal_nan=True)
        is_finite = is_exact or bool((np.isfinite(back) | ~np.isfinite(values)).all())
        return Rounded(bits, back, is_exact, is_finite)


def _decoded(bits: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> Array:
    import numpy as np

    if dtype in KINDS:
        return bits.astype(np.float64)
    if dtype == "BF16":
        return _from_bfloat16(bits.reshape(-1)).reshape(shape)
    import torch

    from loratool.ops.tensors import torch_dtype

    back: Array = torch.from_numpy(bits).view(torch_dtype(dtype)).double().numpy().reshape(shape)
    return back


def _from_bfloat16(bits: NDArray[Any]) -> Array:
    import numpy as np

    wide = bits.astype("<u4") << np.uint32(16)
    return wide.view("<f4").astype(np.float64)


def _to_bfloat16(values: Array) -> NDArray[Any]:
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values).astype("<f4")
    bits = single.view("<u4")
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    made = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2")
    return np.where(np.isnan(single), np.uint16(0x7FC0), made).astype("<u2")
