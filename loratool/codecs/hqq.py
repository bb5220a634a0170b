"""HQQ: ``W = (code - zero) · scale``, with a zero point and a scale of floats for each group.

A weight is cut into groups of its flattened numbers, the rows of a matrix (axis 1), or has them as
the columns of one (axis 0). The rows of that matrix are packed: the first half of them lies in the
high bits of the bytes, the second in the low ones; likewise quarters and eighths, and tenths in
words of 32 bits, for codes of 3. Everything that describes a weight is a tensor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.numbers import decode
from loratool.codecs.parts import needed, scales
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".W_q"]}

SUFFIX: Final = ".W_q"
PACKINGS: Final = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
SLOTS: Final = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""How many codes lie in a byte, or in a word of 32 bits."""
HELD_IN: Final = {5: 8, 6: 8, 1.58: 2}
"""Bits of codes that lie in more than they need."""
FLOATS: Final = ("F32", "F16", "BF16")
NUMBERS: Final = (*FLOATS, "BOOL", "U8", "I32", "I64")
DESCRIBED: Final = ("shape", "nbits", "axis")
OTHERS: Final = (
    *("group_size", "packing", "view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero"),
    *("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)
"""What else a file may have of a weight."""
NESTED: Final = ("zero_q", "scale_q", "meta_zero", "meta_scale")
HINT: Final = "merge on the 16-bit original"


class _Hqq:
    """``W_q``, ``scale``, ``zero`` and up to sixteen tensors that describe them."""

    name: Final = "hqq"
    methods: Final = ("hqq",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`."""
        found = {}
        for name, codes in tensors.items():
            module = name.removesuffix(SUFFIX)
            if module == name:
                continue
            _check_plain(module, tensors)
            parts = {"codes": codes}
            for role in ("scale", "zero", *DESCRIBED):
                parts[role] = needed(tensors, module, role, "HQQ's codes")
            parts |= {r: t for r in OTHERS if (t := tensors.get(f"{module}.{r}")) is not None}
            shape, settings = _settings(module, parts)
            dtype = said.logical_dtype(parts["scale"].spec.dtype)
            spec = TensorSpec(f"{module}.weight", dtype, shape)
            found[module] = CodedTensor(CODEC, parts, spec, settings)
        return found

    def decode_rows(
        self,
        coded: CodedTensor,
        start: int,
        stop: int,
        parts: Parts,
        kind: DTypeLike = np.float64,
    ) -> NDArray[Any]:
        """See :class:`Codec`."""
        first, last = start * coded.width, stop * coded.width
        by_rows = coded.settings["axis"] == 1
        found = (_groups if by_rows else _strips)(coded, first, last, parts, kind)
        return found.reshape(stop - start, coded.width)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(
            coded.spec.name,
            "is not written in HQQ's codes again: that takes a search for scales",
            hint="merge to 16 bits with --quantized dequantize, then quantise with hqq",
        )


def _groups(
    coded: CodedTensor, first: int, last: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return some of the flattened numbers, whose groups are rows."""
    size = coded.settings["group_size"]
    start, stop = first // size, -(-last // size)
    values = np.empty((stop - start, size), kind)
    for slot, begin, end in _runs(coded, start, stop):
        data = _unit_rows(coded, begin, end, parts).reshape(end - begin, size)
        row = slot * coded.settings["packed_rows"] + begin - start
        _unpack(coded, data, slot, values[row : row + end - begin])
    for role in ("zero", "scale"):
        part = coded.parts[role]
        numbers = scales(part, parts.rows(part, start, stop), (stop - start, 1), kind)
        (np.subtract if role == "zero" else np.multiply)(values, numbers, out=values)
    return values.reshape(-1)[first - start * size :][: last - first]


def _strips(
    coded: CodedTensor, first: int, last: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return some of the flattened numbers, whose groups are columns."""
    breadth, packed = coded.settings["groups"], coded.settings["packed_rows"]
    values = np.empty(last - first, kind)
    at = first
    while at < last:
        row, column = divmod(at, breadth)
        end = min(last, (row + 1) * breadth)
        slot, line = divmod(row, packed)
        strip = values[at - first : end - first]
        data = _unit_columns(coded, line, column, column + end - at, parts)
        _unpack(coded, data, slot, strip)
        for role in ("zero", "scale"):
            part = coded.parts[role]
            raw = parts.columns(part, column, column + end - at, (0, 1))
            numbers = scales(part, raw, strip.shape, kind)
            (np.subtract if role == "zero" else np.multiply)(strip, numbers, out=strip)
        at = end
    return values


def _runs(coded: CodedTensor, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the place in a byte, and the packed rows, that some rows are in."""
    packed = coded.settings["packed_rows"]
    for slot in range(coded.settings["slots"]):
        begin = max(start - slot * packed, 0)
        end = min(stop - slot * packed, packed)
        if begin < end:
            yield slot, begin, end


def _unit(coded: CodedTensor) -> str:
    """Return the type that codes lie in, whatever their tensor claims to be."""
    return "<i4" if coded.settings["bits"] == 3 else "u1"


def _unit_rows(coded: CodedTensor, begin: int, end: int, parts: Parts) -> NDArray[Any]:
    return np.frombuffer(parts.rows(coded.parts["codes"], begin, end), _unit(coded))


def _unit_columns(
    coded: CodedTensor, line: int, start: int, stop: int, parts: Parts
) -> NDArray[Any]:
    """Return some units of one packed row, in elements of another size where it has such."""
    codes, unit = coded.parts["codes"], np.dtype(_unit(coded))
    size = DTYPES[codes.spec.dtype].bits // 8
    first, last = start * unit.itemsize // size, -(-stop * unit.itemsize // size)
    data = np.frombuffer(parts.columns(codes, first, last, (line, line + 1)), np.uint8)
    skip = start * unit.itemsize - first * size
    return data[skip : skip + (stop - start) * unit.itemsize].view(unit)


def _unpack(coded: CodedTensor, data: NDArray[Any], slot: int, out: NDArray[Any]) -> None:
    """Write the codes at one place of bytes or words to ``out``."""
    bits, slots = coded.settings["bits"], coded.settings["slots"]
    if bits < 8:
        data = data >> (slots - 1 - slot) * bits
        data &= (1 << bits) - 1
    np.copyto(out, data, casting="unsafe")


def _check_plain(module: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse zero points or scales that are codes themselves.

    Raises:
        UnsupportedError: They are.
    """
    for name in NESTED:
        if f"{module}.{name}" in tensors:
            raise UnsupportedError(
                module,
                f"has {name!r}: zero points or scales that are codes are not read",
                hint=HINT,
            )
    for name in ("quant_zero", "quant_scale"):
        part = tensors.get(f"{module}.{name}")
        if part is not None and _number(part):
            raise UnsupportedError(
                module,
                f"says {name!r}: zero points or scales that are codes are not read",
                hint=HINT,
            )


def _settings(
    module: str, parts: Mapping[str, StoredTensor]
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the shape of a weight, and how its codes lie.

    Raises:
        FileFormatError: Its tensors contradict each other.
        UnsupportedError: Its codes are not packed, or have one scale for all.
    """
    numbers = _numbers(parts["shape"])
    shape = tuple(int(n) for n in numbers)
    if parts["shape"].spec.dtype not in ("I64", "I32") or len(shape) != 2 or min(shape) < 1:
        raise FileFormatError(parts["shape"].spec.name, f"is {list(shape)}, expected two sides")
    said = round(_number(parts["nbits"]), 2)
    bits = HELD_IN.get(said, said)
    if bits not in SLOTS:
        raise FileFormatError(parts["nbits"].spec.name, f"is {said:g}, which HQQ has no codes of")
    axis = _number(parts["axis"])
    if axis not in (0, 1):
        raise FileFormatError(parts["axis"].spec.name, f"is {axis:g}, expected 0 or 1")
    packing = _text(parts["packing"]) if "packing" in parts else PACKINGS[int(bits)]
    if packing != PACKINGS[int(bits)]:
        raise UnsupportedError(
            module,
            f"has codes of {said:g} bits packed as {packing!r:.20}, expected "
            f"{PACKINGS[int(bits)]!r}",
            hint=HINT,
        )
    count, (groups, size) = math.prod(shape), _grouping(module, shape, int(axis), parts)
    rows = size if axis == 0 else groups
    slots = SLOTS[int(bits)]
    settings = {
        "format": f"hqq-{said:g}bit",
        "bits": int(bits),
        "axis": int(axis),
        "groups": groups,
        "group_size": size,
        "slots": slots,
        "packed_rows": -(-rows // slots),
    }
    _check_codes(parts["codes"], settings, count // rows)
    return shape, settings


def _grouping(
    module: str, shape: tuple[int, ...], axis: int, parts: Mapping[str, StoredTensor]
) -> tuple[int, int]:
    """Return how many groups there are, and of how many numbers."""
    count = math.prod(shape)
    scale, zero = parts["scale"].spec, parts["zero"].spec
    groups = scale.elements
    wanted = (groups, 1) if axis == 1 else (1, groups)
    for spec in (scale, zero):
        if spec.dtype not in FLOATS or spec.shape != wanted or not groups or count % groups:
            raise FileFormatError(
                spec.name,
                f"is {spec.dtype} {list(spec.shape)}, expected one float for each group along "
                f"axis {axis} of a weight {list(shape)}",
            )
    size = count // groups
    if "group_size" in parts and (told := _number(parts["group_size"])) != size:
        raise FileFormatError(
            parts["group_size"].spec.name,
            f"is {told:g}, but there are {groups} scales for {count} numbers, {size} for each",
        )
    return groups, size


def _check_codes(codes: StoredTensor, settings: Mapping[str, Any], columns: int) -> None:
    """Refuse codes of another size; floats hold bytes as they are (``view_as_float``)."""
    spec, rows, bits = codes.spec, settings["packed_rows"], settings["bits"]
    dtypes = ("I32", *FLOATS) if bits == 3 else ("U8", *FLOATS)
    unit = 4 if bits == 3 else 1
    wanted = rows * columns * unit
    if (
        spec.dtype not in dtypes
        or len(spec.shape) != 2
        or spec.shape[0] != rows
        or spec.nbytes != wanted
    ):
        raise FileFormatError(
            spec.name,
            f"is {spec.dtype} {list(spec.shape)}, expected {rows} rows of {columns * unit} bytes "
            f"for codes of {bits} bits",
        )


def _numbers(part: StoredTensor) -> list[float]:
    """Return the few numbers of a part that describes a weight."""
    if part.spec.nbytes > 64 or part.spec.dtype not in NUMBERS:
        raise FileFormatError(
            part.spec.name,
            f"is {part.spec.dtype} {list(part.spec.shape)}, expected one or two numbers",
        )
    found: list[float] = decode(read_bytes(part), part.spec.dtype, (part.spec.elements,)).tolist()
    return found


def _number(part: StoredTensor) -> float:
    numbers = _numbers(part)
    if len(numbers) != 1 or not math.isfinite(numbers[0]):
        raise FileFormatError(part.spec.name, f"is {numbers}, expected one number")
    return numbers[0]


def _text(part: StoredTensor) -> str:
    """Return a word whose letters are numbers."""
    if part.spec.dtype != "U8" or part.spec.elements > 64:
        raise FileFormatError(part.spec.name, f"is {part.spec.dtype}, expected a word in bytes")
    return read_bytes(part).decode("latin-1")


CODEC: Final[Codec] = _Hqq()
