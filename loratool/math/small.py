"""Decompositions of small matrices: in float64 and on the processor, wherever the matrix is.

They take microseconds there, and milliseconds each on a GPU; and they are the same on both.
Results are beside the matrix again. A matrix that is large is decomposed where it is.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from loratool.math.namespace import Array, array_namespace, beside, double, is_on_host, on_host

__all__ = ["FOR_A_GPU", "cholesky", "eigh", "svd", "upper_inverse"]

SMALL: Final = 1024
"""The longest smaller side of a matrix that is moved to the processor for its singular values."""
FOR_A_GPU: Final = 200
"""From so many rows on a GPU finds eigenvectors sooner than a processor with one thread."""


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Return ``U, S, Vᵀ``, the thin singular value decomposition in float64.

    Args:
        matrix: ``(m, n)``, finite.

    Returns:
        ``(m, k)``, ``(k,)`` descending, ``(k, n)`` with ``k = min(m, n)``.
    """
    if not is_on_host(matrix) and min(matrix.shape) > SMALL:
        U, S, Vh = array_namespace(matrix).linalg.svd(double(matrix), full_matrices=False)
        return U, S, Vh
    found = np.linalg.svd(on_host(double(matrix)), full_matrices=False)
    return beside(found.U, matrix), beside(found.S, matrix), beside(found.Vh, matrix)


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors of a symmetric matrix, the largest first.

    Args:
        matrix: ``(k, k)``, float64; only its lower triangle is read.

    Returns:
        ``(k,)`` and ``(k, k)``, one eigenvector in each column.
    """
    if not is_on_host(matrix) and matrix.shape[0] >= FOR_A_GPU:
        xp = array_namespace(matrix)
        values, vectors = xp.linalg.eigh(matrix)
        return xp.flip(values), xp.flip(vectors, axis=1)
    found = np.linalg.eigh(on_host(matrix))
    values, vectors = found.eigenvalues[::-1].copy(), found.eigenvectors[:, ::-1].copy()
    return beside(values, matrix), beside(vectors, matrix)


def cholesky(matrix: Array) -> np.ndarray | None:
    """Return the upper R of ``matrix = Rᵀ R``, or ``None`` if it is not positive definite.

    Args:
        matrix: ``(k, k)``, symmetric, float64.
    """
    try:
        return np.linalg.cholesky(on_host(matrix), upper=True)
    except np.linalg.LinAlgError:
        return None


def upper_inverse(upper: np.ndarray) -> np.ndarray:
    """Return the inverse of an upper triangular matrix.

    Its LU decomposition is itself without any rounding, for there is nothing below the diagonal
    that could be a pivot; what is left is the substitution.
    """
    return np.linalg.inv(upper)
