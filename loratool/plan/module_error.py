"""The tensors of a module as they are written, and the error of what rounding makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from loratool.adapter.model import Kind
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError
from loratool.plan.adapter import ModuleOutput
from loratool.plan.outcome import Approximated, Outcome
from loratool.values.arrays import Rounded

if TYPE_CHECKING:
    from loratool.values.arrays import Array

__all__ = ["computed"]

LARGEST_NORM: Final = 1e100
TOO_ROUGH: Final = 2e-3
"""A relative error beyond this is no longer the rounding of a 16-bit dtype alone."""


def computed(item: ModuleOutput, outcome: Outcome) -> dict[Slot, Rounded]:
    """Return the tensors of a module that do not only move, and note the error.

    Raises:
        AdapterError: A value is finite in the input and not in the output.
    """
    part = item.part
    results: dict[int, tuple[Array, ...]] = {}
    approximated: list[Approximated] = []
    for together in item.togethers:
        results[id(together)], report = together.compute()
        if isinstance(report, Approximated):
            approximated.append(report)
        elif report is not None:
            outcome.reports[together.name] = report
    exact = {
        slot: output.value.evaluate(results)
        for slot, output in item.outputs()
        if output.moved is None
    }
    made = {slot: Rounded.of(array, item.specs[slot].dtype) for slot, array in exact.items()}
    is_exact = all(made[slot].is_exact for slot in made)
    if part.is_plain and (approximated or not is_exact):
        exact |= {s: v.evaluate(results) for s, v in part.values.items() if s not in exact}
        made = _measured(item, exact, made, approximated, outcome)
    for slot, array in made.items():
        if not array.is_finite:
            raise AdapterError(
                item.specs[slot].name,
                f"does not fit into {item.specs[slot].dtype}",
                hint="write a wider dtype with --dtype float32",
            )
    return made


def _measured(
    item: ModuleOutput,
    exact: Mapping[Slot, Array],
    made: dict[Slot, Rounded],
    approximated: Sequence[Approximated],
    outcome: Outcome,
) -> dict[Slot, Rounded]:
    """Note the error of a module; return its tensors, the scale shared where that is better."""
    part = item.part
    low, high = part.slots
    truth = _oriented(item, exact)
    norm, error = _squares(truth, _oriented(item, {**exact, **_values(made)}))
    if not all(array_is_finite(array) for array in truth):
        outcome.nonfinite.append(part.module)
        return made
    if not math.isfinite(error) or error > TOO_ROUGH**2 * norm:
        # Too large or too small for the dtype: share the scale with A, by a power of two.
        shift = _balance(exact[low], exact[high])
        other = {low: exact[low] * shift, high: exact[high] / shift}
        trial = {slot: Rounded.of(array, item.specs[slot].dtype) for slot, array in other.items()}
        found = {**exact, **_values(made), **_values(trial)}
        _, better = _squares(truth, _oriented(item, found))
        if not math.isfinite(error) or better < error:
            made, error = {**made, **trial}, better
            outcome.shifted.append(part.module)
    if approximated:
        norm = math.fsum(each.squared_norm for each in approximated)
        error += math.fsum(each.squared_error for each in approximated)
    outcome.errors[part.module] = (norm, error)
    return made


def _values(made: Mapping[Slot, Rounded]) -> dict[Slot, Array]:
    return {slot: array.values for slot, array in made.items()}


def _oriented(item: ModuleOutput, values: Mapping[Slot, Array]) -> tuple[Array, Array]:
    """Return A ``(r, columns)`` and B ``(rows, r)``, however they are stored."""
    low, high = (values[slot] for slot in item.part.slots)
    if item.part.stacked:
        return low, _apart(high, [rows for _, rows in item.part.stacked])
    if low.ndim == 3 and item.part.kind is not Kind.CONV:  # stacked experts: nobody turns them
        return low, high
    if item.is_transposed:
        return low.T, high.T
    if low.ndim == 2 and low.shape[0] != high.shape[1]:  # a table, whose A llama.cpp turns
        return low.T, high
    return low.reshape(low.shape[0], -1), high.reshape(high.shape[0], -1)


def _apart(up: Array, heights: Sequence[int]) -> Array:
    """Return a B whose parts stand above each other with each beside the others."""
    import numpy as np

    rank, first = up.shape[1], 0
    whole = np.zeros((up.shape[0], rank * len(heights)))
    for index, height in enumerate(heights):
        rows = slice(first, first + height)
        whole[rows, index * rank : (index + 1) * rank] = up[rows]
        first += height
    return whole


def array_is_finite(array: Array) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    import numpy as np

    return bool(np.isfinite(array).all())


def _squares(exact: tuple[Array, Array], made: tuple[Array, Array]) -> tuple[float, float]:
    """Return ``‖Δ‖²`` and ``‖written - Δ‖²`` from r × r Gram matrices.

    Both are capped at the largest number of float64, in one proportion.
    """
    import numpy as np

    (down, up), (low, high) = exact, made
    if down.ndim == 3:
        pairs = [_squares((down[i], up[i]), (low[i], high[i])) for i in range(down.shape[0])]
        return math.fsum(norm for norm, _ in pairs), math.fsum(error for _, error in pairs)
    with np.errstate(invalid="ignore", over="ignore"):
        peaks = [float(np.abs(array).max(initial=0.0)) or 1.0 for array in (down, up)]
        if not all(map(math.isfinite, peaks)):
            return math.nan, math.nan
        down, low = down / peaks[0], low / peaks[0]
        up, high = up / peaks[1], high / peaks[1]
        norm = float(((up.T @ up) * (down @ down.T)).sum())
        left = np.concatenate([high - up, up], axis=1)
        right = np.concatenate([low, low - down], axis=0)
        error = float(((left.T @ left) * (right @ right.T)).sum())
    error = max(0.0, error) if math.isfinite(error) else math.inf
    size = min(peaks[0] * peaks[1], LARGEST_NORM) ** 2
    return norm * size, error * size


def _balance(down: Array, up: Array) -> float:
    """Return the power of two that makes the largest elements of both factors alike."""
    import numpy as np

    high, low = float(np.abs(up).max()), float(np.abs(down).max())
    if not high or not low or not math.isfinite(high / low):
        return 1.0
    return 2.0 ** round(math.log2(high / low) / 2)
