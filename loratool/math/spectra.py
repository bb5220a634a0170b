"""The inverse Fourier transform of a spectrum of few entries, some rows of it at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SparseSpectrum"]


class SparseSpectrum:
    """The real part of the inverse Fourier transform of a sparse real spectrum, ``(out, in)``.

    Of the columns that have entries all outputs are transformed at once; the inputs of some of the
    outputs when they are asked for. As only the real part is wanted, entries of the second half of
    the columns are those of the first, with their rows counted from the other end.

    Args:
        values: ``(n,)``, in float64.
        places: Rows and columns of the entries, ``(n,)`` each.
        out: Rows of the transform.
        into: Columns of the transform.
    """

    def __init__(
        self,
        values: NDArray[np.float64],
        places: tuple[NDArray[np.int64], ...],
        out: int,
        into: int,
    ) -> None:
        self.into = into
        rows, columns = places
        is_late = 2 * columns > into
        rows = np.where(is_late, (out - rows) % out, rows)
        columns = np.where(is_late, into - columns, columns)
        is_alone = (columns == 0) | (2 * columns == into)
        self.columns, which = np.unique(columns, return_inverse=True)
        entries: NDArray[Any] = np.zeros((len(self.columns), out), np.complex128)
        np.add.at(entries, (which, rows), values * np.where(is_alone, 1.0, 0.5))
        self.halves = np.fft.ifft(entries, axis=1)

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return rows ``start`` to ``stop``, ``(stop - start, in)``."""
        half = np.zeros((stop - start, self.into // 2 + 1), np.complex128)
        half[:, self.columns] = self.halves[:, start:stop].T
        found: NDArray[np.float64] = np.fft.irfft(half, n=self.into, axis=1)
        return found
