"""Stored numbers as float64 arrays and back, whole tensors at a time."""

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


SINGLE: Final = frozenset({"F32", "F16", "BF16"})
"""Floats whose values float32 holds."""


def decode(stored: StoredTensor) -> Array:
    """Read a tensor as float64, which holds every value of its dtype."""
    from loratool.codecs import numbers

    return numbers.decode(read_view(stored), stored.spec.dtype, stored.spec.shape)


def encode(values: Array, dtype: str) -> NDArray[Any]:
    """Return ``values`` rounded once to ``dtype``, as they are stored."""
    from loratool.codecs import numbers

    return numbers.encode(values, dtype)


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

        from loratool.codecs import numbers

        bits = numbers.encode(values, dtype)
        is_single = values.dtype == np.float32 and dtype in SINGLE
        back = numbers.decode(bits, dtype, values.shape, np.float32 if is_single else np.float64)
        is_exact = np.array_equal(back, values) or np.array_equal(back, values, equal_nan=True)
        is_finite = is_exact or bool((np.isfinite(back) | ~np.isfinite(values)).all())
        return Rounded(bits, back, is_exact, is_finite)
