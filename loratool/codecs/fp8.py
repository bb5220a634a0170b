"""What the codecs of 8-bit floats share: scales beside codes, scales of blocks, one rounding.

Every scaling is one of blocks: of a whole tensor, a row, an expert, or a rectangle.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import CodedTensor, Description, Parts
from loratool.codecs.comfy import Marks
from loratool.codecs.numbers import decode, encode
from loratool.codecs.numbers.number import Codes
from loratool.codecs.numbers.scratch import Scratch
from loratool.codecs.parts import refuse_rotated, scales
from loratool.codecs.stacks import stacked_rows
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = [
    "COMPANIONS",
    "GATE_UP",
    "LARGEST",
    "SCALES",
    "WEIGHT_SCALES",
    "BlockEncoder",
    "Blocks",
    "Scaled",
    "decode_blocks",
    "factor_dtype",
    "factors_for",
    "few_scales",
    "largest_of",
    "rounded",
    "scaled_weights",
    "scales_beside",
]

LARGEST: Final = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
"""The largest number of each 8-bit float that is read."""
SCALES: Final = ("F32", "F16", "BF16", "F8_E8M0", "U8")
"""What scales may be stored as; bytes are exponents."""
WEIGHT_SCALES: Final = (
    *("weight_scale_inv", "weight_scale", "scale_weight"),
    *("qscale_weight", "scale"),
)
"""What scales of ``weight`` are called; all of them multiply."""
COMPANIONS: Final = (
    *("input_scale", "scale_input", "activation_scale", "qscale_act"),
    *("input_scale_ub", "comfy_quant"),
    *("weight_zero_point", "input_zero_point", "output_zero_point"),
)
"""What else belongs to such a module; its weight depends on the zeros alone."""

ZERO: Final = "weight_zero_point"
ZEROS: Final = ("I8", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F32")
"""What zeros may be stored as, which compressed-tensors takes away from codes."""

FORMATS: Final = ("float8_e4m3fn", "float8_e5m2", "fp8")
"""ComfyUI's names for what is read here; its others have scales in another order."""
GATE_UP: Final = "gate_up_proj"
"""A module with two matrices of as many rows, one below the other."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """Codes with their scale.

    Attributes:
        module: What they belong to: a module, or a parameter of one.
        weight: The codes.
        scale: What multiplies them.
        others: What else belongs to them, by its role.
    """

    module: str
    weight: StoredTensor
    scale: StoredTensor
    others: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, StoredTensor]:
        """All of its tensors, the codes first."""
        return {"weight": self.weight, "scale": self.scale, **self.others}


def scales_beside(
    name: str, tensors: Mapping[str, StoredTensor]
) -> tuple[str, dict[str, StoredTensor]]:
    """Return what names beside a weight begin with, and its scales by the rest of theirs.

    A parameter that is no module's ``weight`` has its scale beside it: ``gate_up_proj_scale``.
    """
    module = name.removesuffix(".weight")
    stem = f"{module}." if module != name else f"{name}_"
    known = WEIGHT_SCALES if module != name else (*WEIGHT_SCALES, "scale_inv")
    return stem, {leaf: tensors[stem + leaf] for leaf in known if stem + leaf in tensors}


def scaled_weights(
    tensors: Mapping[str, StoredTensor], said: Description, dtypes: tuple[str, ...]
) -> Iterator[Scaled]:
    """Yield all weights of some dtypes that have a scale beside them.

    Raises:
        FileFormatError: One has several scales, or one that is no number.
        UnsupportedError: One is smoothed, its inputs scaled too, or rotated.
    """
    marks = Marks(tensors, said)
    for name, weight in tensors.items():
        if weight.spec.dtype not in dtypes or weight.spec.elements == 0:
            continue
        module = name.removesuffix(".weight")
        stem, found = scales_beside(name, tensors)
        if not found or f"{stem}weight_scale_2" in tensors:
            continue  # two levels of scales are another format's
        if marks.format_of(module) not in (None, *FORMATS):
            continue
        if len(found) > 1:
            raise FileFormatError(name, f"has several scales beside it: {', '.join(found)}")
        ((_, scale),) = found.items()
        if scale.spec.dtype not in SCALES:
            raise FileFormatError(
                scale.spec.name, f"is {scale.spec.dtype}, expected one of {', '.join(SCALES)}"
            )
        if f"{stem}pre_quant_scale" in tensors:
            raise UnsupportedError(
                name,
                "is smoothed: 'pre_quant_scale' beside it scales what goes into it",
                hint="merge on the 16-bit original",
            )
        refuse_rotated(module, said)
        others = {leaf: tensors[stem + leaf] for leaf in COMPANIONS if stem + leaf in tensors}
        zero = others.get(ZERO)
        if zero is not None and (
            zero.spec.dtype not in ZEROS or zero.spec.shape != scale.spec.shape
        ):
            raise FileFormatError(
                zero.spec.name,
                f"is {zero.spec.dtype} {list(zero.spec.shape)}, expected one zero for each of the "
                f"scales, {list(scale.spec.shape)}",
            )
        yield Scaled(module, weight, scale, others)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rectangles of a matrix that have a scale each.

    Attributes:
        height: Rows of a block.
        breadth: Its columns.
        period: Rows after which blocks begin anew, as those of the next expert do.
        grid: Rows and columns of all scales as one matrix.
        shape: Rows and columns of the weight as a matrix.
    """

    height: int
    breadth: int
    period: int
    grid: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def of(
        cls, shape: tuple[int, int], height: int, breadth: int, period: int | None = None
    ) -> Blocks:
        """Return blocks of one size; the last ones of a period may be smaller."""
        rows, width = shape
        period = rows if period is None else period
        count = -(-rows // period) * -(-period // height)
        return cls(height, breadth, period, (count, -(-width // breadth)), shape)

    @property
    def step(self) -> int:
        """Where rows may be cut without cutting a block: at multiples of this."""
        if self.period % self.height and self.period < self.shape[0]:
            return self.period
        return self.height

    def index(self, row: int) -> int:
        """Return which row of the grid a row of the weight belongs to."""
        pieces, rest = divmod(row, self.period)
        return pieces * -(-self.period // self.height) + rest // self.height

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield first row, end, and row of the grid of all runs of rows with the same scales."""
        while start < stop:
            begin = start - start % self.period
            rest = (start - begin) // self.height
            end = min(begin + min((rest + 1) * self.height, self.period), stop)
            yield start, end, self.index(start)
            start = end

    def spread(self, factors: NDArray[Any]) -> NDArray[Any]:
        """Return rows of the grid as wide as the weight, or 1 where a row has one scale."""
        if self.grid[1] == 1:
            return factors
        if self.breadth == 1:
            return factors
        return np.repeat(factors, self.breadth, axis=1)[:, : self.shape[1]]


def few_scales(one: Scaled, said: Description) -> Blocks | None:
    """Return the blocks of scales that are no grid: of a tensor, an expert, a row, a column.

    Raises:
        UnsupportedError: Their shape leaves open which rows or columns they are of.
    """
    shape, scale = one.weight.spec.shape, one.scale.spec.shape
    count, is_one = one.scale.spec.elements, one.scale.spec.elements == 1
    if len(shape) == 3 and not is_one:
        return _few_of_stack(one, said)
    rows = math.prod(shape[:-1]) if len(shape) == 3 else shape[0] if shape else 1
    whole = (rows, one.weight.spec.elements // rows)
    if is_one:
        is_grid = len(shape) == len(scale) == 2 and "weight_block_size" in said.quantization
        return None if is_grid else Blocks.of(whole, *whole)
    if count == rows and scale[:1] == (rows,):
        return Blocks.of(whole, 1, whole[1])
    if len(scale) > 1:
        return None
    if scale == (2,) and one.module.endswith(GATE_UP) and rows % 2 == 0:
        return Blocks.of(whole, rows // 2, whole[1])
    raise UnsupportedError(
        one.scale.spec.name,
        f"has {count} scales for {rows} rows: of matrices in one, of which nothing tells the rows",
        hint="merge on the original whose projections are apart, or on the 16-bit one",
    )


def _few_of_stack(one: Scaled, said: Description) -> Blocks | None:
    """Return the blocks of a stack of experts, ``(experts, rows, columns)``."""
    (count, rows, width), scale = one.weight.spec.shape, one.scale.spec.shape
    whole = (count * rows, width)
    if scale in ((count,), (count, 1), (count, 1, 1)):
        return Blocks.of(whole, rows, width, rows)
    by_row = scale in ((count, rows), (count, rows, 1))
    # The last is fbgemm's way with ``down_proj``: the scales of its columns stand upright.
    by_column = scale in ((count, 1, width), (count, width), (count, width, 1))
    if said.method == "fbgemm_fp8" and by_column:
        by_row = False
    if by_row and by_column:
        raise UnsupportedError(
            one.scale.spec.name,
            f"has shape {list(scale)} for experts of {rows} × {width}: of rows or of columns, "
            "which nothing tells",
            hint="merge on the 16-bit original",
        )
    if by_row:
        return Blocks.of(whole, 1, width, rows)
    return Blocks.of(whole, rows, 1, rows) if by_column else None


def factor_dtype(scale: StoredTensor) -> str:
    """Return what scales are: bytes are exponents alone."""
    return "F8_E8M0" if scale.spec.dtype == "U8" else scale.spec.dtype


def decode_blocks(
    coded: CodedTensor, blocks: Blocks, start: int, stop: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return rows of ``weight``, each code times the scale of its block.

    Raises:
        FileFormatError: A scale is NaN or infinite.
    """
    weight, scale = coded.parts["weight"], coded.parts["scale"]
    values = _codes(coded, weight, start, stop, parts, kind)
    if start == stop:
        return values
    first, last = blocks.index(start), blocks.index(stop - 1) + 1
    factors = blocks.spread(_factors(scale, blocks, first, last, parts, kind))
    zeros = None
    if ZERO in coded.parts:
        zeros = blocks.spread(_factors(coded.parts[ZERO], blocks, first, last, parts, kind))
    if blocks.height == 1:
        if zeros is not None:
            values -= zeros
        values *= factors
        return values
    for begin, end, row in blocks.runs(start, stop):
        rows = values[begin - start : end - start]
        if zeros is not None:
            rows -= zeros[row - first]
        rows *= factors[row - first]
    return values


def _codes(
    coded: CodedTensor, weight: StoredTensor, start: int, stop: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return rows of the codes as numbers; a stack is one matrix below the other."""
    data = (
        stacked_rows(parts, weight, start, stop)
        if _each(coded, weight) > 1
        else parts.rows(weight, start, stop)
    )
    return decode(data, weight.spec.dtype, (stop - start, coded.width), kind)


def _each(coded: CodedTensor, weight: StoredTensor) -> int:
    """Return how many rows of the matrix one row along the first axis has."""
    shape = weight.spec.shape
    return coded.rows // shape[0] if shape and shape[0] else 1


def _factors(
    scale: StoredTensor, blocks: Blocks, first: int, last: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return rows of the grid, however the axes of the stored scales are cut."""
    rows, columns = blocks.grid
    stored = scale.spec.shape[0] if scale.spec.shape else 1
    each = rows // stored
    begin, end = first // each, -(-last // each)
    data = parts.rows(scale, begin, end)
    found = scales(scale, data, ((end - begin) * each, columns), kind, dtype=factor_dtype(scale))
    return found[first - begin * each : last - begin * each]


class BlockEncoder:
    """The largest number of each block becomes the largest code.

    Args:
        coded: The weight.
        blocks: Its blocks.

    Raises:
        UnsupportedError: It has zeros.
    """

    roles: Final = ("weight", "scale")

    def __init__(self, coded: CodedTensor, blocks: Blocks) -> None:
        if ZERO in coded.parts:
            raise UnsupportedError(
                coded.spec.name,
                "has zeros beside its scales, which take calibration data",
                hint="merge to 16 bits with --quantized dequantize, then quantise again with "
                "llm-compressor",
            )
        self.coded = coded
        self.blocks = blocks
        rows, columns = blocks.grid
        self.needs_largest = (rows, columns) == (1, 1)
        """A single scale is that of all rows, which may then be cut anywhere."""
        shape = coded.parts["scale"].spec.shape
        self._each = rows // (shape[0] if shape else 1)
        # Tensors are written by rows along their first axis: those of one expert at once.
        whole = _each(coded, coded.parts["weight"])
        self.step: int = whole if whole > 1 else 1 if self.needs_largest else blocks.step

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`."""
        coded, blocks = self.coded, self.blocks
        if start % self.step or (stop % self.step and stop != coded.rows):
            raise ValueError(f"rows {start} to {stop} are no blocks of {self.step}")
        weight, scale = coded.parts["weight"], coded.parts["scale"]
        dtype = factor_dtype(scale)
        first, last = blocks.index(start), blocks.index(stop - 1) + 1
        peaks = self._peaks(start, stop, values, largest)
        factors = factors_for(peaks, dtype, LARGEST[weight.spec.dtype])
        divisors = decode(factors, dtype, factors.shape)
        codes = self._codes(start, stop, values, divisors, first)
        stored = scale.spec.shape
        rows = (last - first) // self._each if stored else 1
        return {
            "weight": (self._row(start), codes.reshape(self._rows(start, stop))),
            "scale": (
                0 if self.needs_largest else first // self._each,
                factors.reshape((rows, *stored[1:]) if stored else ()),
            ),
        }

    def _row(self, row: int) -> int:
        """Return a row of the matrix as one along the first axis of the stored codes."""
        return row // _each(self.coded, self.coded.parts["weight"])

    def _rows(self, start: int, stop: int) -> tuple[int, ...]:
        shape = self.coded.parts["weight"].spec.shape
        count = self._row(stop) - self._row(start)
        return (count, *shape[1:]) if shape else ()

    def _peaks(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None
    ) -> NDArray[np.float64]:
        """Return the largest magnitudes of the blocks.

        Raises:
            ValueError: One is not finite.
        """
        blocks = self.blocks
        if self.needs_largest:
            found = np.full((1, 1), np.nan if largest is None else largest)
            here = float(max(values.max(), -values.min())) if values.size else 0.0
            if not here <= found[0, 0]:
                found[:] = np.nan
        else:
            found = _block_peaks(blocks, start, stop, values)
        if not np.isfinite(found).all():
            raise ValueError("a value is not finite")
        return found

    def _codes(
        self, start: int, stop: int, values: NDArray[Any], divisors: NDArray[np.float64], first: int
    ) -> Codes:
        """Return values by the scales of their blocks, rounded once."""
        blocks, dtype = self.blocks, self.coded.parts["weight"].spec.dtype
        if blocks.height == 1 and blocks.shape[1] % blocks.breadth == 0:
            grouped = values.reshape(*divisors.shape, blocks.breadth)
            return rounded(grouped, divisors[:, :, None], dtype).reshape(values.shape)
        wide = blocks.spread(divisors)
        if blocks.height == 1 or blocks.grid == (1, 1):
            return rounded(values, wide, dtype)
        codes = np.empty(values.shape, dtype=np.uint8)
        for begin, end, row in blocks.runs(start, stop):
            rows = slice(begin - start, end - start)
            codes[rows] = rounded(values[rows], wide[row - first : row - first + 1], dtype)
        return codes


def _block_peaks(
    blocks: Blocks, start: int, stop: int, values: NDArray[Any]
) -> NDArray[np.float64]:
    first, last = blocks.index(start), blocks.index(stop - 1) + 1
    found = np.empty((last - first, blocks.grid[1]))
    edges = np.arange(0, blocks.shape[1], blocks.breadth)
    if blocks.height == 1 and blocks.shape[1] % blocks.breadth == 0:
        return largest_of(values.reshape(*found.shape, blocks.breadth))
    if blocks.height == 1:
        top, low = (fold.reduceat(values, edges, axis=1) for fold in (np.maximum, np.minimum))
        return np.maximum(top, -low).astype(np.float64)
    for begin, end, row in blocks.runs(start, stop):
        rows = values[begin - start : end - start]
        columns = np.maximum(rows.max(axis=0), -rows.min(axis=0))
        found[row - first] = np.maximum.reduceat(columns, edges)
    return found


def largest_of(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest magnitudes along the last axis, NaN where there is one.

    Without their sign the bits of floats are in the order of the numbers, which is quicker.
    """
    kind = "u4" if values.dtype == np.float32 else "u8"
    bits = np.ascontiguousarray(values).view(kind)
    unsigned = bits & np.array(np.iinfo(kind).max >> 1, kind)
    found: NDArray[np.float64] = unsigned.max(axis=-1).view(values.dtype).astype(np.float64)
    return found


def factors_for(peaks: NDArray[np.float64], dtype: str, largest: float) -> Codes:
    """Return the scales, as stored, of blocks whose largest magnitudes are ``peaks``; never zero.

    Raises:
        ValueError: One is larger than its dtype has.
    """
    found = np.where(peaks > 0, peaks / largest, 1.0)
    if dtype == "F8_E8M0":
        mantissa, exponent = np.frexp(found)
        found = np.ldexp(1.0, np.clip(exponent - (mantissa == 0.5), -127, 127))
    else:
        found = np.maximum(found, {"F16": 2.0**-24}.get(dtype, 2.0**-126))
    codes = encode(found, dtype)
    back = decode(codes, dtype, codes.shape)
    if not np.isfinite(back).all():
        raise ValueError(f"a value is not finite as a scale of {dtype}")
    if dtype == "F16":  # whose smallest are so coarse that quotients would be too large
        codes += back < found * (1 - 2.0**-10)
    return codes


LAYOUTS: Final = {"F8_E4M3": (3, 7, 0x7E), "F8_E5M2": (2, 15, 0x7B)}
"""Bits of the mantissa, what is subtracted from the exponent, and the largest code."""
LOCAL: Final = threading.local()


def rounded(values: NDArray[Any], divisors: NDArray[np.float64], dtype: str) -> Codes:
    """Return ``values / divisors`` as codes of an 8-bit float, as if rounded once.

    What is too large becomes the largest. Quotients of float32 are made smaller by a power of two,
    so that their exponents are those of the code: its bits are then the upper ones, below which
    rounding looks at the rest. Only where a quotient lies exactly between two codes may the true
    one lie beside: those are computed again, in float64.

    Args:
        values: float32 or float64, finite.
        divisors: float32 numbers that go with the values by broadcasting.
        dtype: Of the codes.
    """
    mantissa, bias, largest = LAYOUTS[dtype]
    wide = np.ldexp(divisors, 127 - bias)
    if values.dtype != np.float32 or not wide.max(initial=0.0) < np.finfo(np.float32).max:
        limit = LARGEST[dtype]
        return encode(np.clip(values / divisors, -limit, limit), dtype)
    scratch = _scratch()
    quotients = np.divide(
        values,
        wide.astype(np.float32),
        out=scratch.array("quotients", values.shape, np.float32),
    )
    bits = quotients.view(np.uint32)
    shift = 23 - mantissa
    half = np.uint32(1 << (shift - 1))
    other = np.bitwise_and(
        bits, np.uint32((1 << shift) - 1), out=scratch.array("other", values.shape, np.uint32)
    )
    doubtful = np.flatnonzero(other == half)
    np.right_shift(bits, np.uint32(shift), out=other)
    np.bitwise_and(other, np.uint32(1), out=other)
    np.add(other, half - np.uint32(1), out=other)
    np.add(other, bits, out=other)
    np.right_shift(other, np.uint32(16), out=other)
    upper = scratch.array("upper", values.shape, np.uint16)
    np.copyto(upper, other, casting="unsafe")
    found = np.bitwise_and(
        upper, np.uint16(0x7FFF), out=scratch.array("found", values.shape, np.uint16)
    )
    np.right_shift(found, np.uint16(shift - 16), out=found)
    too_large = found > largest
    if too_large.any():
        found[too_large] = largest
    np.right_shift(upper, np.uint16(8), out=upper)
    np.bitwise_and(upper, np.uint16(0x80), out=upper)
    np.bitwise_or(found, upper, out=found)
    codes: Codes = found.astype(np.uint8)
    if doubtful.size:
        whole = np.broadcast_to(divisors, values.shape)
        places = np.unravel_index(doubtful, values.shape)
        codes[places] = encode(values[places].astype(np.float64) / whole[places], dtype)
    return codes


def _scratch() -> Scratch:
    """Return memory of this thread that is used again."""
    found: Scratch | None = getattr(LOCAL, "scratch", None)
    if found is None:
        found = LOCAL.scratch = Scratch()
    return found
