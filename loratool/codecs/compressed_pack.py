"""compressed-tensors' "pack-quantized": whole numbers of 1 to 8 bits, packed along the inputs.

``W[o, i] = (q - z) · weight_scale[o, g]`` with ``g = i // group_size``, or as ``weight_g_idx``
says. Codes are stored from 0 on: half of their number is taken away from them, and from zeros,
which are packed along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.parts import beside, needed, refuse_rotated, scales
from loratool.codecs.words import (
    INDICES,
    WORD,
    group_index,
    scale_groups,
    turned_words,
    unpack,
    words_for,
)
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {
    "suffixes": [".weight_packed", ".weight_shape", ".scale_packed", ".bitmask"],
    "methods": ["compressed-tensors"],
}

SUFFIX: Final = ".weight_packed"
WHY: Final = "codes of compressed-tensors"
SCALES: Final = ("F16", "BF16", "F32")
SHAPES: Final = {"I64": "<i8", "I32": "<i4"}
OTHERS: Final = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
HINT: Final = "merge on the 16-bit original"
KEEP: Final = (
    "merge to 16 bits with --quantized dequantize, then quantise again with llm-compressor"
)


class _CompressedPack:
    """``weight_packed``, ``weight_scale``, ``weight_shape``, perhaps zeros and an index."""

    name: Final = "compressed-tensors-pack"
    methods: Final = ("compressed-tensors",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; bytes of FP4 have the same name and another dtype."""
        _refuse_sparse(tensors)
        found = {}
        for name, words in tensors.items():
            module = name.removesuffix(SUFFIX)
            if module != name and words.spec.dtype == "I32":
                found[module] = _coded(tensors, module, words, said)
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
        bits, groups = coded.settings["bits"], coded.settings["groups"]
        words, scale = coded.parts["weight_packed"], coded.parts["weight_scale"]
        packed = np.frombuffer(parts.rows(words, start, stop), np.uint8)
        codes = unpack(packed.reshape(stop - start, 4 * words.spec.shape[1]), bits, coded.width)
        is_one = scale.spec.elements == 1
        first, last = (0, 1) if is_one else (start, stop)
        shape = (1, 1) if is_one else (stop - start, groups)
        factors = scales(scale, parts.rows(scale, first, last), shape, kind)
        zeros: NDArray[Any] | float = float(1 << (bits - 1))
        if "weight_zero_point" in coded.parts:
            zeros = _zeros(coded, start, stop, parts).astype(kind)
        size = -(-coded.width // groups)
        where = None
        if "weight_g_idx" in coded.parts:
            where = group_index(parts, coded.parts["weight_g_idx"], groups, size)
        return scale_groups(codes, zeros, factors, size if where is None else where, kind)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        bits = coded.settings["bits"]
        raise UnsupportedError(
            coded.spec.name, f"compressed-tensors INT{bits} needs calibration data", hint=KEEP
        )


def _zeros(coded: CodedTensor, start: int, stop: int, parts: Parts) -> NDArray[np.uint8]:
    """Return the zeros of some outputs as their codes are counted, ``(stop - start, groups)``."""
    part, bits = coded.parts["weight_zero_point"], coded.settings["bits"]
    if part.spec.dtype == "I8":
        # Not packed, as old files have them, and those with one for all.
        is_one = part.spec.elements == 1
        first, last = (0, 1) if is_one else (start, stop)
        shape = (last - first, coded.settings["groups"])
        whole = np.frombuffer(parts.rows(part, first, last), np.int8).reshape(shape)
        return whole.view(np.uint8) + np.uint8(1 << (bits - 1))
    columns = turned_words(parts, part, 0, part.spec.shape[1])
    return unpack(columns, bits, stop)[:, start:].T


def _coded(
    tensors: Mapping[str, StoredTensor], module: str, words: StoredTensor, said: Description
) -> CodedTensor:
    """Return a module's weight.

    Raises:
        FileFormatError: Its tensors do not fit together.
        UnsupportedError: It is no matrix.
    """
    refuse_rotated(module, said)
    scale = needed(tensors, module, "weight_scale", WHY)
    shape = needed(tensors, module, "weight_shape", WHY)
    optional = beside(tensors, module, ("weight_zero_point", "weight_g_idx", *OTHERS))
    zeros, index = optional.get("weight_zero_point"), optional.get("weight_g_idx")
    if len(words.spec.shape) != 2:
        raise UnsupportedError(
            words.spec.name, f"is a stack of packed codes, {list(words.spec.shape)}", hint=HINT
        )
    if scale.spec.dtype not in SCALES or shape.spec.dtype not in SHAPES:
        part, dtypes = (scale, SCALES) if scale.spec.dtype not in SCALES else (shape, SHAPES)
        raise FileFormatError(
            part.spec.name, f"is {part.spec.dtype}, expected {' or '.join(dtypes)}"
        )
    out, into = _shape(shape)
    bits = _bits(words, out, into, said)
    groups = 1
    if scale.spec.elements != 1:
        groups = scale.spec.shape[1] if len(scale.spec.shape) == 2 else 1
        if out > 1 and 0 < 2 * scale.spec.shape[0] <= out + 1 and groups not in (1, into):
            raise UnsupportedError(
                scale.spec.name,
                f"scales blocks of whole numbers, {list(scale.spec.shape)}",
                hint=HINT,
            )
        if scale.spec.shape not in ((out,), (out, groups)) or not groups or into % groups:
            raise FileFormatError(
                scale.spec.name,
                f"has shape {list(scale.spec.shape)}, expected one for each group of inputs of "
                f"a weight {[out, into]}",
            )
    if zeros is not None:
        packed = {"I32": (words_for(out, bits), groups), "I8": scale.spec.shape}
        if zeros.spec.shape != packed.get(zeros.spec.dtype):
            raise FileFormatError(
                zeros.spec.name,
                f"is {zeros.spec.dtype} of shape {list(zeros.spec.shape)}, expected I32 of "
                f"{[words_for(out, bits), groups]}",
            )
    if index is not None and (index.spec.shape != (into,) or index.spec.dtype not in INDICES):
        raise FileFormatError(
            index.spec.name,
            f"is {index.spec.dtype} of shape {list(index.spec.shape)}, expected one whole number "
            f"for each of {into} inputs",
        )
    return CodedTensor(
        CODEC,
        {"weight_packed": words, "weight_scale": scale, "weight_shape": shape, **optional},
        TensorSpec(f"{module}.weight", said.logical_dtype(scale.spec.dtype), (out, into)),
        {"bits": bits, "groups": groups},
    )


def _shape(part: StoredTensor) -> tuple[int, int]:
    """Return outputs and inputs, as a tensor tells them.

    Raises:
        FileFormatError: It does not.
    """
    if part.spec.shape != (2,):
        raise FileFormatError(
            part.spec.name, f"has shape {list(part.spec.shape)}, expected outputs and inputs"
        )
    told = np.frombuffer(read_bytes(part), SHAPES[part.spec.dtype]).tolist()
    if min(told) < 1:
        raise FileFormatError(part.spec.name, f"says {told}, expected the shape of a matrix")
    return told[0], told[1]


def _bits(words: StoredTensor, out: int, into: int, said: Description) -> int:
    """Return how many bits a code has.

    Raises:
        FileFormatError: Codes of no width fill these words, or those of several.
    """
    rows, columns = words.spec.shape
    fitting = [bits for bits in range(1, 9) if words_for(into, bits) == columns]
    if len(fitting) > 1:
        fitting = [bits for bits in fitting if bits in _told(said)] or fitting
    if rows != out or len(fitting) != 1:
        raise FileFormatError(
            words.spec.name,
            f"has shape {[rows, columns]}, expected {out} rows of {into} codes of some bits in "
            f"words of {WORD}",
        )
    return fitting[0]


def _told(said: Description) -> set[int]:
    """Return the widths of codes that the configuration names."""
    groups = said.quantization.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if type(bits) is int:
            found.add(bits)
    return found


def _refuse_sparse(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse matrices of which only what is not zero is stored, and codes in tiles.

    Raises:
        UnsupportedError: There are such.
    """
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "scale_packed":
            raise UnsupportedError(
                module, "is stored by compressed-tensors as marlin-24", hint=HINT
            )
        if leaf == "bitmask" and f"{module}.compressed" in tensors:
            raise UnsupportedError(
                module, "is stored by compressed-tensors as a sparse matrix", hint=HINT
            )


CODEC: Final[Codec] = _CompressedPack()
