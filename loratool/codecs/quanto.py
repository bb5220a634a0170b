"""Quanto: ``W = _data · _scale``, of 8 bits a row each; of 4 and 2 bits in groups, with a shift.

The codes of 4 and 2 bits are a matrix whose rows are groups of the flattened weight. Its first
rows lie in the low bits of the bytes, the next ones above them. ``W = code · scale - shift`` where
the shift is a float, ``(code - shift) · scale`` where it is whole. No tensor says how many rows the
weight itself has; its bias does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.numbers import decode
from loratool.codecs.parts import needed, scales
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".weight._scale", ".weight._shift"]}

SUFFIX: Final = ".weight._scale"
FLOATS: Final = ("F32", "F16", "BF16")
CODES: Final = ("I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")
SHIFTS: Final = (*FLOATS, "I8", "U8")
GROUPED: Final = (32, 64, 96, 128)
"""Sizes of groups; a group of any other is a whole row."""
BITS: Final = (4, 2)
HINT: Final = "merge on the 16-bit original"


class _Quanto:
    """``_data`` and ``_scale``, or ``_data._data``, ``_scale`` and ``_shift``, below ``weight``."""

    name: Final = "quanto"
    methods: Final = ("quanto",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`."""
        found = {}
        for name, scale in tensors.items():
            module = name.removesuffix(SUFFIX)
            if module == name:
                if name.endswith("._shift"):
                    stem = name.removesuffix(".weight._shift")
                    needed(tensors, stem, "weight._scale", "shifts of Quanto's codes")
                continue
            if scale.spec.dtype not in FLOATS:
                raise FileFormatError(name, f"is {scale.spec.dtype}, which is no scale")
            packed = tensors.get(f"{module}.weight._data._data")
            dtype = said.logical_dtype(scale.spec.dtype)
            if packed is None:
                codes = needed(tensors, module, "weight._data", "scales of Quanto's codes")
                parts = {"codes": codes, "scale": scale}
                kind = "qint8" if codes.spec.dtype == "I8" else "qfloat8"
                settings: dict[str, Any] = {"format": kind, "bits": 8}
                _check_rows(codes, scale)
                shape = codes.spec.shape
            else:
                shift = needed(tensors, module, "weight._shift", "Quanto's codes and scales")
                parts = {"codes": packed, "scale": scale, "shift": shift}
                settings = _groups(parts)
                rows = _rows(module, settings, tensors)
                shape = (rows, settings["groups"] * settings["group_size"] // rows)
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
        codes, scale = coded.parts["codes"], coded.parts["scale"]
        if coded.settings["bits"] == 8:
            shape = (stop - start, coded.width)
            values = decode(parts.rows(codes, start, stop), codes.spec.dtype, shape, kind)
            if scale.spec.elements == 1:
                values *= scales(scale, parts.rows(scale, 0, 1), (1, 1), kind)
            else:
                values *= scales(scale, parts.rows(scale, start, stop), (stop - start, 1), kind)
            return values
        size = coded.settings["group_size"]
        first, last = start * coded.width, stop * coded.width
        begin, end = first // size, -(-last // size)
        values = _unpacked(coded, begin, end, parts, kind)
        factors = scales(scale, parts.rows(scale, begin, end), (end - begin, 1), kind)
        shift = coded.parts["shift"]
        shifts = scales(shift, parts.rows(shift, begin, end), (end - begin, 1), kind)
        if shift.spec.dtype in FLOATS:
            values *= factors
            values -= shifts
        else:
            values -= shifts
            values *= factors
        cut = values.reshape(-1)[first - begin * size :][: last - first]
        return cut.reshape(stop - start, coded.width)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(
            coded.spec.name,
            "is not written in Quanto's codes again",
            hint="merge to 16 bits with --quantized dequantize, then quantise with optimum-quanto",
        )


def _unpacked(
    coded: CodedTensor, start: int, stop: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return the codes of some groups as numbers."""
    codes, bits = coded.parts["codes"], coded.settings["bits"]
    packed = codes.spec.shape[0]
    values = np.empty((stop - start, coded.settings["group_size"]), kind)
    for slot in range(8 // bits):
        begin = max(start - slot * packed, 0)
        end = min(stop - slot * packed, packed)
        if begin < end:
            data = np.frombuffer(parts.rows(codes, begin, end), np.uint8)
            data = data.reshape(end - begin, -1) >> bits * slot
            data &= (1 << bits) - 1
            row = slot * packed + begin - start
            np.copyto(values[row : row + end - begin], data)
    return values


def _check_rows(codes: StoredTensor, scale: StoredTensor) -> None:
    """Refuse what is no matrix of codes with a scale for each row, or for all.

    Raises:
        FileFormatError: It is not.
    """
    if codes.spec.dtype not in CODES or len(codes.spec.shape) < 2:
        raise FileFormatError(
            codes.spec.name,
            f"is {codes.spec.dtype} {list(codes.spec.shape)}, expected a matrix of codes",
        )
    shape = scale.spec.shape
    if scale.spec.elements != 1 and (
        shape[:1] != codes.spec.shape[:1] or math.prod(shape[1:]) != 1
    ):
        raise FileFormatError(
            scale.spec.name,
            f"has shape {list(shape)}, expected a scale for each row of codes "
            f"{list(codes.spec.shape)}",
        )


def _groups(parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return how packed codes lie.

    Raises:
        FileFormatError: Scales, shifts and codes do not fit together.
    """
    codes, scale, shift = (parts[role].spec for role in ("codes", "scale", "shift"))
    groups = scale.elements
    if codes.dtype != "U8" or len(codes.shape) != 2 or 0 in codes.shape:
        raise FileFormatError(
            codes.name, f"is {codes.dtype} {list(codes.shape)}, expected a matrix of U8"
        )
    for spec in (scale, shift):
        if spec.shape != (groups, 1) or spec.dtype not in SHIFTS:
            raise FileFormatError(
                spec.name,
                f"is {spec.dtype} {list(spec.shape)}, expected one number for each group",
            )
    bits = next((bits for bits in BITS if -(-groups * bits // 8) == codes.shape[0]), None)
    if bits is None:
        raise FileFormatError(
            codes.name,
            f"has {codes.shape[0]} rows for {groups} groups, which 4 and 2 bits do not make",
        )
    size = codes.shape[1]
    return {"format": f"qint{bits}", "bits": bits, "groups": groups, "group_size": size}


def _rows(module: str, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> int:
    """Return how many rows a weight has whose groups are told.

    Raises:
        FileFormatError: Its bias has another number.
        UnsupportedError: Nothing tells.
    """
    groups, size = settings["groups"], settings["group_size"]
    bias = tensors.get(f"{module}.bias")
    if bias is not None:
        rows = bias.spec.elements
        if not rows or groups % rows:
            raise FileFormatError(
                bias.spec.name, f"has {rows} numbers, and the weight {groups} groups"
            )
        return rows
    if size in GROUPED:
        raise UnsupportedError(
            module,
            f"is quantised in groups of {size} by Quanto, whose files do not say how many rows a "
            "weight has, and there is no bias to tell",
            hint=HINT,
        )
    return int(groups)


CODEC: Final[Codec] = _Quanto()
