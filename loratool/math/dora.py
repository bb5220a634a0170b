"""The DoRA nearest to a finetuned weight: a low-rank change, and a length for every row.

DoRA (arXiv 2402.09353) makes of a weight W the rows ``m_i V_i / ‖V_i‖`` with ``V = W + B A``. The
best lengths for given factors are those of least squares, ``m_i = ⟨W'_i, V_i⟩ / ‖V_i‖``; the best
factors for given lengths are nearly the leading part of ``W' / d - W`` with ``d_i = m_i / ‖V_i‖``,
for all d are near 1. The two are found in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from loratool.math.extraction import Leading

__all__ = ["Decomposed", "nearest_dora"]

MOST_TURNS: Final = 12
LEAST_GAIN: Final = 0.05
"""Of the squared error: when a turn gains less the search is over. Where finetuning was a DoRA of
that rank, each turn is some ten times nearer; else the second gains hardly anything."""
BLOCK_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True)
class Decomposed:
    """A weight as DoRA makes it.

    Attributes:
        leading: ``B A`` as factors, with what they lack of the last difference.
        up: B ``(out, r)`` as it is written.
        down: A ``(r, in)`` as it is written.
        magnitude: ``(out,)``, in the dtype that is written.
        squared_error: ``‖W' - made‖_F²`` with what is written.
    """

    leading: Leading
    up: np.ndarray
    down: np.ndarray
    magnitude: np.ndarray
    squared_error: float


def nearest_dora(
    before: np.ndarray,
    after: np.ndarray,
    plain: Leading,
    lead: Callable[[np.ndarray], Leading],
    rounded: Callable[[np.ndarray], np.ndarray],
    kind: type = np.float32,
) -> Decomposed:
    """Return the DoRA whose weight is nearest to ``after``, found in a few turns.

    Args:
        before: W, ``(out, in)``, float32 or float64.
        after: W', of the same shape and dtype.
        plain: The leading part of ``W' - W``, of the rank that is wanted.
        lead: Returns the leading part of a difference, of the rank that is wanted.
        rounded: Rounds factors to the dtype that is written.
        kind: The dtype of the lengths.
    """
    lengths = _quotient(_row_products(before, after), _row_products(after, after))
    found = plain
    d, lost = _fitted(before, after, plain)
    other = lead(_difference(after, lengths, before))
    scales, value = _fitted(before, after, other)
    if value < lost:
        found, d, lost = other, scales, value
    for _ in range(MOST_TURNS):
        other = lead(_difference(after, _quotient(np.ones_like(d), d), before))
        scales, value = _fitted(before, after, other)
        gain = 1 - value / lost if lost else 0.0
        if gain > 0:
            found, d, lost = other, scales, value
        if gain < LEAST_GAIN:
            break
    written = _with_lengths(before, after, found, rounded, kind)
    if found is plain:
        return written
    simpler = _with_lengths(before, after, plain, rounded, kind)
    return written if written.squared_error <= simpler.squared_error else simpler


def _with_lengths(
    before: np.ndarray,
    after: np.ndarray,
    found: Leading,
    rounded: Callable[[np.ndarray], np.ndarray],
    kind: type,
) -> Decomposed:
    """Return factors as they are written, with the best lengths for those."""
    up, down = rounded(found.up), rounded(found.down)
    products, squares = np.empty(len(before)), np.empty(len(before))
    for rows, made in _blocks(before, up, down):
        products[rows] = _row_products(after[rows], made)
        squares[rows] = _row_products(made, made)
    norms = np.sqrt(squares)
    magnitude: np.ndarray = _quotient(products, norms).astype(kind)
    d = _quotient(magnitude.astype(np.float64), norms)
    error = 0.0
    for rows, made in _blocks(before, up, down):
        lost = after[rows] - made * d[rows, None].astype(made.dtype)
        error += float(_row_products(lost, lost).sum())
    return Decomposed(found, up, down, magnitude, error)


def _blocks(
    before: np.ndarray, up: np.ndarray, down: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rows of ``W + B A``, a few at a time, and which they are."""
    step = max(1, BLOCK_ELEMENTS // before.shape[1])
    for start in range(0, len(before), step):
        rows = slice(start, start + step)
        yield rows, before[rows] + up[rows] @ down


def _fitted(before: np.ndarray, after: np.ndarray, found: Leading) -> tuple[np.ndarray, float]:
    """Return by what each row of ``W + B A`` is multiplied to be nearest to W', and the error."""
    scales, total = np.empty(len(before)), 0.0
    for rows, made in _blocks(before, found.up, found.down):
        d = _quotient(_row_products(after[rows], made), _row_products(made, made))
        lost = after[rows] - made * d[:, None].astype(made.dtype)
        scales[rows] = d
        total += float(_row_products(lost, lost).sum())
    return scales, total


def _difference(after: np.ndarray, scale: np.ndarray, before: np.ndarray) -> np.ndarray:
    made: np.ndarray = after * scale[:, None].astype(after.dtype)
    made -= before
    return made


def _row_products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the inner products of the rows of two matrices, in float64."""
    found: np.ndarray = np.einsum("ij,ij->i", one, other, dtype=np.float64)
    return found


def _quotient(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Return quotients, 1 where nothing is divided by nothing."""
    found: np.ndarray = np.divide(over, under, out=np.ones_like(over), where=under != 0)
    return found
