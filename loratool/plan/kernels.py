"""From the edits of a step to the arithmetic that carries them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import WEIGHT
from loratool.base.region import Region
from loratool.codecs.weights import PaddedRows, RowSource, Weight, rows_of
from loratool.errors import MergeError
from loratool.files.inputs import InputFiles
from loratool.math.deltas import (
    Additive,
    Changed,
    Delta,
    Interpolated,
    Offset,
    Placed,
    Rows,
    WeightDecomposed,
    column_norms,
)
from loratool.math.lowrank import LowRank, stack
from loratool.math.namespace import Array, array_namespace
from loratool.math.principal import kasa_residual, olora_residual, pissa_residual
from loratool.math.products import Products, spaced
from loratool.plan.blocks import Arithmetic, arithmetic_on
from loratool.plan.factors import expert_delta, read_factors
from loratool.plan.model import (
    AddDelta,
    AddTensor,
    Blend,
    ChangeWeight,
    Decompose,
    Edit,
    Residual,
    SetRows,
    Step,
)

__all__ = ["BLOCK_ELEMENTS", "Kernel", "compile_step", "load_delta"]

BLOCK_ELEMENTS: Final = 1 << 19
"""Elements of one block: 2 MiB of float32.

Half of it would stay in the cache nearest to a core, but threads then hand the interpreter over
twice as often, which costs more.
"""
MEASURED_BLOCKS: Final = 2
"""Blocks of each tensor, evenly spread, in which the surviving share of the update is measured."""


@dataclass(frozen=True)
class Kernel:
    """How one tensor is computed, block by block.

    Attributes:
        rows: Rows of the matrix.
        width: Its columns.
        is_double: Whether it is computed in float64.
        output: The dtype of the result, as a header calls it.
        reader: Reads the source.
        deltas: What changes it, in order.
        is_empty: Whether all of the deltas are exactly zero.
        grain: Rows that only change together: blocks begin at multiples of these.
    """

    rows: int
    width: int
    is_double: bool
    output: str
    reader: RowSource
    deltas: tuple[Delta, ...]
    is_empty: bool
    grain: int = 1

    @property
    def is_move(self) -> bool:
        """Whether the bytes only go elsewhere, as with a tensor that is not contiguous."""
        return not self.deltas and self.reader.dtype == self.output

    @property
    def needs_original(self) -> bool:
        """Whether some delta looks at the values from before any change."""
        return any(
            isinstance(delta, WeightDecomposed | Interpolated | Rows)
            or (isinstance(delta, Changed) and delta.difference is not None)
            for delta in self.deltas
        )

    @property
    def block_rows(self) -> int:
        """Rows of one block."""
        count = max(1, min(self.rows, BLOCK_ELEMENTS // max(1, self.width)))
        return min(self.rows, -(-count // self.grain) * self.grain) or 1

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def stride(self) -> int:
        """Every how many blocks the surviving share of the update is measured."""
        return max(1, self.blocks // MEASURED_BLOCKS)

    @property
    def share(self) -> float:
        """What the sums over a measured block are multiplied by to stand for the whole."""
        return self.blocks / -(-self.blocks // self.stride)


def compile_step(step: Step, files: InputFiles, device: str, products: Products) -> Kernel:
    """Load the small tensors that ``step`` needs and return its arithmetic.

    Args:
        step: What to compute.
        files: Where descriptors come from.
        device: Where to compute, as ``--device`` says it.
        products: The arithmetic of the thread that calls.

    Raises:
        MergeError: Two adapters see the weight as matrices of different shapes.
    """
    width = _width(step)
    dtypes = (step.spec.dtype, step.source.spec.dtype)
    kind = arithmetic_on(device, is_double="F64" in dtypes)
    matrix = _Matrix(step, files, width, kind, products)
    deltas: list[Delta] = []
    plain: list[LowRank] = []
    nonzero = False
    grain = 1
    taken: Interpolated | None = None  # what the adapter whose turn it is sees as W₀
    for edit in step.edits:
        if isinstance(edit, AddDelta) and _covers(edit.region, matrix.rows, width):
            delta = load_delta(edit.site, edit.region, edit.scale, kind, edit.first)
            nonzero |= not _is_zero(delta)
            plain.append(delta)
            continue
        if plain:
            deltas.append(Additive(_stacked(plain)))
            plain.clear()
        if isinstance(edit, ChangeWeight):
            change, rows = _change(edit, matrix)
            grain = math.lcm(grain, rows) if grain * rows else 0
            deltas.append(change)
            nonzero = True
            continue
        for made in _deltas(edit, matrix, taken):
            nonzero |= not isinstance(made, Placed) or not _is_zero(made.delta)
            deltas.append(made)
        last = deltas[-1]
        taken = last if isinstance(last, Interpolated) else None
    if plain:
        deltas.append(Additive(_stacked(plain)))
    return Kernel(
        rows=matrix.rows,
        width=width,
        is_double="F64" in dtypes,
        output=step.spec.dtype,
        reader=matrix.reader,
        deltas=tuple(deltas),
        is_empty=not nonzero,
        grain=grain or max(1, matrix.rows),
    )


class _Matrix:
    """The weight of a step as a matrix, and how to read rows of it and of its like."""

    def __init__(
        self, step: Step, files: InputFiles, width: int, kind: Arithmetic, products: Products
    ) -> None:
        self.step = step
        self.files = files
        self.width = width
        self.kind = kind
        self.products = products
        self.rows = step.spec.elements // width if width else 0
        self.reader = self._reader(width)

    def _reader(self, width: int) -> RowSource:
        source = self.step.source
        shape = source.spec.shape
        if shape == self.step.spec.shape:
            return rows_of(source, width, self.files)
        return PaddedRows(rows_of(source, math.prod(shape[1:]), self.files), shape[0], width)

    def like(self, stored: Weight) -> Callable[[int, int], Array]:
        """Return what reads rows of another tensor of the same shape."""
        return partial(self.kind.rows, rows_of(stored, self.width, self.files))

    def blocks(self, taken: Interpolated | None) -> Iterator[tuple[int, Array]]:
        """Yield first row and rows of ``W₀`` from top to bottom; they may be overwritten."""
        count = max(1, BLOCK_ELEMENTS // max(1, self.width))
        for start in range(0, self.rows, count):
            block = self.kind.rows(self.reader, start, min(count, self.rows - start))
            yield start, block if taken is None else taken.target(start, block)


def _width(step: Step) -> int:
    placed = AddDelta | Decompose | ChangeWeight | AddTensor
    widths = {edit.region.width for edit in step.edits if isinstance(edit, placed)}
    if len(widths) > 1:
        raise MergeError(step.spec.name, "two adapters see this weight as different matrices")
    if widths:
        return widths.pop()
    shape = step.spec.shape
    return math.prod(shape[1:])


def _covers(region: Region, rows: int, width: int) -> bool:
    return (region.rows, region.columns, region.experts) == (rows, width, 1)


def _stacked(terms: list[LowRank]) -> LowRank:
    """Return the sum of ``terms``, its factors as they are multiplied fastest."""
    total = stack(terms)
    return LowRank(total.up, spaced(total.down), total.scale)


def _is_zero(delta: LowRank) -> bool:
    return delta.scale == 0 or not bool(delta.up.any()) or not bool(delta.down.any())


def _deltas(edit: Edit, matrix: _Matrix, taken: Interpolated | None) -> Iterator[Delta]:
    kind = matrix.kind
    match edit:
        case AddDelta():
            yield from _placed(edit, kind)
        case Decompose():
            yield _decompose(edit, matrix, taken)
        case Residual():
            yield Interpolated(_residual(edit, matrix), edit.weight)
        case Blend():
            replaced = matrix.step.base not in (None, matrix.step.source)
            base = matrix.step.base if replaced else None
            rounded = partial(kind.rounded, dtype=edit.tensor.spec.dtype)
            yield Interpolated(
                matrix.like(edit.tensor),
                edit.weight,
                rounded=rounded if edit.only_if_different else None,
                base=matrix.like(base) if base is not None else None,
            )
        case SetRows():
            values = kind.read(edit.tensor)
            yield Rows(edit.indices, values.reshape(len(edit.indices), -1), edit.weight)
        case AddTensor():
            yield _offset(edit, matrix)


def _placed(edit: AddDelta, kind: Arithmetic) -> Iterator[Delta]:
    region = edit.region
    if region.experts == 1 or region.expert is not None:
        delta = load_delta(edit.site, region, edit.scale, kind, edit.first)
        yield Placed(delta, region.first_row, region.first_column)
        return
    down, up = _factors(edit.site, region, kind)
    for expert in range(region.experts):
        delta = _expert(down, up, expert, region, edit.scale)
        yield Placed(delta, region.first_row + expert * region.rows, region.first_column)


def _offset(edit: AddTensor, matrix: _Matrix) -> Offset:
    region, first = edit.region, edit.first
    if region.transposed:
        values = matrix.kind.read(edit.tensor).reshape((-1, region.rows))
        turned = values[first : first + region.columns].T

        def rows(start: int, count: int) -> Array:
            return turned[start : start + count]

    elif region.exchanged is not None:
        values = matrix.kind.read(edit.tensor).reshape((-1, region.columns))
        ordered = region.stored(values[first : first + region.rows])

        def rows(start: int, count: int) -> Array:
            return ordered[start : start + count]

    else:
        read = partial(matrix.kind.rows, rows_of(edit.tensor, region.columns, matrix.files))

        def rows(start: int, count: int) -> Array:
            return read(first + start, count)

    place = region.first_row, region.first_column
    return Offset(rows, edit.scale, region.rows, region.columns, *place)


def load_delta(
    site: Site, region: Region, scale: float, kind: Arithmetic, first: int = 0
) -> LowRank:
    """Read the factors of one delta, or of its outputs from ``first`` on, as the region has it."""
    down, up = _factors(site, region, kind, first)
    if region.expert is not None:  # also where there is but one, which may be cut in parts
        return _expert(down, up, region.expert, region, scale)
    delta = LowRank(region.stored(up), down, scale)
    return delta.mT if region.transposed else delta


def _expert(down: Array, up: Array, expert: int, region: Region, scale: float) -> LowRank:
    """Return one expert's delta, oriented as the region stores it, or the part of it there."""
    delta = expert_delta(down, region.stored(up), expert, region.experts, scale)
    if region.transposed:
        delta = delta.mT
    index, parts = region.part
    if parts > 1:
        size = delta.up.shape[0] // parts
        delta = LowRank(delta.up[index * size : (index + 1) * size], delta.down, scale)
    return delta


def _factors(site: Site, region: Region, kind: Arithmetic, first: int = 0) -> tuple[Array, Array]:
    out, width = region.rows, region.columns
    if region.transposed:
        out, width = width, out
    # Factors may be products of what is stored.
    down, up = read_factors(site, kind if site.is_plain else kind.double(), width)
    if region.experts == 1 and region.expert is None:
        up = up[first : first + out]
    if not site.is_plain:
        return kind.converted(down), kind.converted(up)
    if site.variant.is_blocked and (up.shape[0], down.shape[1]) != (out, width):
        raise MergeError(site.label, "has block-diagonal factors of an unknown form")
    return down, up


def _change(edit: ChangeWeight | Decompose, matrix: _Matrix) -> tuple[Changed, int]:
    """Return a change by a variant, and how many rows have to change together; 0 means all."""
    site, region, kind = edit.site, edit.region, matrix.kind.double()
    values = {slot: kind.read(stored) for slot, stored in site.slots.items()}
    is_bias = isinstance(edit, ChangeWeight) and edit.is_bias
    outputs, inputs = region.rows, region.columns
    if region.transposed:
        outputs, inputs = inputs, outputs
    kernel = matrix.step.spec.shape[2:] if not is_bias and region.experts == 1 else ()
    shape = (edit.outputs or outputs, inputs // math.prod(kernel), *kernel)
    if is_bias:
        if isinstance(edit, ChangeWeight) and edit.beside is not None:
            values[WEIGHT] = _beside(*edit.beside, matrix)
        change = site.variant.bias_change(site, values)
    else:
        change = site.variant.change(site, values, shape, edit.scale)
    rows = change.grain[1] if region.transposed else change.grain[0]
    function = Changed(
        change.changed,
        region.rows,
        region.columns,
        region.first_row,
        region.first_column,
        kernel,
        region.transposed,
        edit.weight if isinstance(edit, ChangeWeight) else 1.0,
        edit.first,
        change.difference if change.of_original else None,
    )
    is_aligned = rows and region.first_row % rows == 0
    return function, rows if is_aligned else 0


def _beside(weight: Weight, region: Region, matrix: _Matrix) -> Array:
    """Return the weight of a layer whose bias is computed, ``(out, in)`` in float64."""
    reader = rows_of(weight, region.width, matrix.files)
    rows = matrix.kind.double().rows(reader, region.first_row, region.rows)
    found = rows[:, region.first_column : region.first_column + region.columns]
    return found.T if region.transposed else region.ordered(found)


def _decompose(edit: Decompose, matrix: _Matrix, taken: Interpolated | None) -> WeightDecomposed:
    region, kind = edit.region, matrix.kind
    delta: Delta
    if edit.site.variant.has_change and not edit.site.is_plain:
        delta, _ = _change(edit, matrix)
    else:
        low_rank = load_delta(edit.site, region, edit.scale, kind, edit.first)
        delta = Placed(low_rank, region.first_row, region.first_column)
    outputs = region.columns if region.transposed else region.rows
    magnitude = kind.read(edit.site.slots[Slot.MAGNITUDE]).reshape(-1)
    expected = edit.outputs or outputs
    if edit.is_by_input:
        kernel = math.prod(matrix.step.spec.shape[2:])
        expected = (region.rows if region.transposed else region.columns) // kernel
    if magnitude.shape[0] != expected:
        raise MergeError(
            edit.site.label, f"its magnitude has {magnitude.shape[0]} entries, expected {expected}"
        )
    if not edit.is_by_input:
        magnitude = region.stored(magnitude[edit.first : edit.first + outputs])
    norms = None
    if edit.is_by_input != region.transposed:  # one magnitude for each column, or several
        place = (region.first_row, region.rows, region.first_column)
        norms = column_norms(matrix.blocks(taken), delta, region.columns, matrix.products, place)
        norms, magnitude = _over_kernels(norms, magnitude)
    reference = taken.target if taken is not None else None
    return WeightDecomposed(
        delta,
        magnitude,
        norms,
        edit.weight,
        reference,
        region.rows,
        region.columns,
        region.first_row,
        region.first_column,
    )


def _over_kernels(norms: Array, magnitude: Array) -> tuple[Array, Array]:
    """Return norms and magnitudes of columns where those of a kernel's places are one."""
    count = magnitude.shape[0]
    size = norms.shape[0] // count
    if size == 1:
        return norms, magnitude
    xp = array_namespace(norms)
    together = xp.sqrt(xp.sum(norms.reshape((count, size)) ** 2, axis=1, keepdims=True))
    spread = (xp.broadcast_to(one, (count, size)) for one in (together, magnitude[:, None]))
    whole, repeated = (one.reshape(-1) for one in spread)
    return whole, repeated


def _residual(edit: Residual, matrix: _Matrix) -> Callable[[int, int], Array]:
    """Return the base weight as PEFT leaves it on loading, but not rounded in between."""
    weight = matrix.kind.double().rows(matrix.reader, 0, matrix.rows)
    match edit.kind:
        case "pissa":
            values = pissa_residual(weight, edit.rank)
        case "kasa":
            values = kasa_residual(weight, edit.rank)
        case _:
            values = olora_residual(weight, edit.rank, edit.scale)
    return lambda start, count: matrix.kind.converted(values[start : start + count])
