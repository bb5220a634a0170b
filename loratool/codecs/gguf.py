"""The blocks of GGUF: one tensor with codes and scales in it, of one of some twenty types.

The common types are decoded here; what takes tables of a thousand numbers (IQ1 to IQ3, TQ) and what
is written again (Q4_0 to Q8_0, MXFP4) takes the ``gguf`` package. It encodes as llama.cpp's own
code does. NVFP4 may have one more scale for the whole tensor, or for each expert, beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Parts
from loratool.codecs.ggml import DECODERS
from loratool.codecs.numbers.number import Codes
from loratool.codecs.parts import scales
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC", "original_shape"]

CLAIM: Final = {
    "dtypes": [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "Q8_K",
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_NL",
        "IQ4_XS",
        "TQ1_0",
        "TQ2_0",
        "Q1_0",
        "MXFP4",
        "NVFP4",
    ],
}

WRITTEN: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
"""What is written again."""
BY_LIBRARY: Final = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
)
TERNARY: Final = ("TQ1_0", "TQ2_0", "Q1_0")
INSTALL: Final = "install it: pip install 'loratool[gguf]'"
BESIDE: Final = ("scale", "input_scale")
"""What NVFP4 may have beside it; the second is for computing only."""
ORIGINAL: Final = "comfy.gguf.orig_shape."
"""Before the names of tensors whose shapes GGUF does not have: what shapes they had."""
AT_ONCE: Final = 1 << 17
"""Weights decoded at a time: what is in between stays in the cache."""


class _Gguf:
    """``weight``; beside NVFP4 perhaps ``scale``, and ``input_scale``, which is no part of it."""

    name: Final = "gguf"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; a tensor's dtype tells it."""
        found = {}
        for name, stored in tensors.items():
            if DTYPES[stored.spec.dtype].block is None:
                continue
            shape = stored.spec.shape
            if len(shape) < 2:
                raise UnsupportedError(name, f"is a vector of {stored.spec.dtype} blocks")
            module = name.removesuffix(".weight")
            parts = {"weight": stored}
            if stored.spec.dtype == "NVFP4":
                beside = {leaf: tensors.get(f"{module}.{leaf}") for leaf in BESIDE}
                parts |= {leaf: part for leaf, part in beside.items() if part is not None}
            if "scale" in parts:
                _check_scale(parts["scale"], shape)
            found[module] = CodedTensor(
                CODEC,
                parts,
                TensorSpec(name, said.dtype or "F16", original_shape(name, shape, said.metadata)),
                {"format": stored.spec.dtype},
                shape[-1],
            )
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
        weight = coded.parts["weight"]
        name, width = weight.spec.dtype, coded.width
        block = DTYPES[name].block
        assert block is not None
        decode = DECODERS.get(name) or _library_decoder(weight)
        out = np.empty((stop - start, width), kind)
        per_row = width // block[0]
        rows = max(1, AT_ONCE // width) if width else 1
        for first in range(start, stop, rows):
            last = min(stop, first + rows)
            raw = np.frombuffer(_rows(weight, first, last, parts), np.uint8)
            made = out[first - start : last - start]
            with np.errstate(over="ignore", invalid="ignore"):
                is_finite = decode(
                    raw.reshape((last - first) * per_row, block[1]), made.reshape(-1, block[0])
                )
            if not is_finite:
                raise FileFormatError(
                    weight.spec.name,
                    "has a scale that is NaN or infinite",
                    hint="the file is damaged: download or quantise it again",
                )
        if "scale" in coded.parts:
            out *= _outer_scale(coded, start, stop, parts, kind)
        return out

    def encoder(self, coded: CodedTensor) -> _Encoder:
        """See :class:`Codec`."""
        dtype, name = coded.parts["weight"].spec.dtype, coded.spec.name
        if dtype in WRITTEN:
            return _Encoder(coded)
        hint = (
            "leave out --quantized keep: it becomes 16-bit floats, of which llama-quantize makes "
            f"{dtype} again"
        )
        if dtype in TERNARY:
            raise UnsupportedError(
                name,
                f"is {dtype}, for models that were trained with three values; an adapter's "
                "changes would be lost",
                hint=hint,
            )
        raise UnsupportedError(
            name, f"is {dtype}, which takes a search or calibration data to write", hint=hint
        )


class _Encoder:
    """Rows of blocks, as llama.cpp rounds them."""

    roles: Final = ("weight",)
    step: Final = 1
    needs_largest: Final = False

    def __init__(self, coded: CodedTensor) -> None:
        self.dtype = coded.parts["weight"].spec.dtype
        self.library, self.kind = _library(coded.spec.name, self.dtype, "writing")

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`; rows are those of blocks, whatever the shape of the weight."""
        with np.errstate(over="ignore", invalid="ignore"):
            single = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(single).all():
            raise ValueError("a value is not finite")
        block = DTYPES[self.dtype].block
        assert block is not None
        with np.errstate(all="ignore"):
            codes: Codes = self.library.quantize(single, self.kind)
            made = np.empty((codes.size // block[1], block[0]), np.float32)
            if not DECODERS[self.dtype](codes.reshape(-1, block[1]), made):
                raise ValueError(f"a value is not finite once it is {self.dtype}")
        return {"weight": (start, codes)}


def _rows(part: StoredTensor, start: int, stop: int, parts: Parts) -> Any:
    """Return rows of a stack of matrices, one below the other."""
    width = part.spec.shape[-1]
    if len(part.spec.shape) == 2:
        return parts.rows(part, start, stop)
    inner = prod(part.spec.shape[1:-1])
    found = []
    while start < stop:
        index, first = divmod(start, inner)
        last = min(inner, first + stop - start)
        found.append(parts.columns(part, first * width, last * width, (index, index + 1)))
        start += last - first
    return found[0] if len(found) == 1 else b"".join(found)


def _check_scale(scale: StoredTensor, shape: tuple[int, ...]) -> None:
    counts = {1, prod(shape[:-2])}
    if scale.spec.dtype != "F32" or scale.spec.elements not in counts:
        raise FileFormatError(
            scale.spec.name,
            f"is {scale.spec.dtype} {list(scale.spec.shape)}, expected one F32 for the tensor "
            "beside it, or one for each expert",
        )


def _outer_scale(
    coded: CodedTensor, start: int, stop: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return what each row is multiplied by, ``(rows, 1)``, or what all are."""
    scale = coded.parts["scale"]
    count = scale.spec.elements
    data = parts.rows(scale, 0, scale.spec.shape[0] if scale.spec.shape else 1)
    found = scales(scale, data, (count,), kind)
    if count == 1:
        return found
    return found[np.arange(start, stop) // (coded.rows // count)][:, None]


def original_shape(
    name: str, shape: tuple[int, ...], metadata: Mapping[str, str]
) -> tuple[int, ...]:
    """Return the shape that a tensor had before it was stored in one that GGUF has.

    Raises:
        FileFormatError: That is no shape, or one of another size.
    """
    text = metadata.get(f"{ORIGINAL}{name}")
    if text is None:
        return shape
    try:
        told = tuple(json.loads(text))
    except (ValueError, TypeError):
        told = ()
    is_shape = all(type(side) is int and side >= 0 for side in told)
    if not told or not is_shape or prod(told) != prod(shape):
        raise FileFormatError(
            name, f"has shape {list(shape)}, and {ORIGINAL}… says that it was {text[:80]}"
        )
    return told


def _library(name: str, dtype: str, doing: str) -> tuple[Any, Any]:
    """Return the ``gguf`` package, and what it calls a type.

    Raises:
        UnsupportedError: It is not installed, or does not know the type.
    """
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(
            name, f"is {dtype}; {doing} it takes the gguf package", hint=INSTALL
        ) from None
    kind = getattr(gguf.GGMLQuantizationType, dtype, None)
    if kind is None:
        raise UnsupportedError(
            name, f"is {dtype}, which this gguf package does not know", hint=INSTALL
        )
    return gguf, kind


def _library_decoder(weight: StoredTensor) -> Any:
    """Return what decodes blocks of a type that is not decoded here.

    Raises:
        UnsupportedError: Nothing does.
    """
    name, dtype = weight.spec.name, weight.spec.dtype
    library, kind = _library(name, dtype, "reading")
    if dtype not in BY_LIBRARY:
        raise UnsupportedError(
            name,
            f"is {dtype}, which is not read",
            hint="llama-quantize --allow-requantize makes F16 of it",
        )

    def decode(blocks: NDArray[np.uint8], out: NDArray[Any]) -> bool:
        # In one row: the package goes through sixteen at a time.
        np.copyto(out, library.dequantize(blocks.reshape(1, -1), kind).reshape(out.shape))
        return bool(np.isfinite(out).all())

    return decode


CODEC: Final[Codec] = _Gguf()
