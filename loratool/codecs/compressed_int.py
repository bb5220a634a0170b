"""compressed-tensors' "int-quantized" and "naive-quantized": one byte for each whole number (W8A8).

``W[o, i] = (q - z) · weight_scale``, with one scale for all, for each output, or for each group of
inputs; without ``weight_zero_point`` all zeros are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.parts import beside, refuse_rotated, scales
from loratool.codecs.words import INDICES, group_index, scale_groups
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".weight_scale"], "methods": ["compressed-tensors"]}

SUFFIX: Final = ".weight_scale"
SCALES: Final = ("F16", "BF16", "F32")
FOREIGN: Final = ("SCB", "comfy_quant", "weight_format", "weight_scale_2", "weight_s_rel")
"""Tensors beside the codes with which they are somebody else's."""
COMFY: Final = "_quantization_metadata"
OTHERS: Final = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
HINT: Final = "merge on the 16-bit original"
KEEP: Final = (
    "merge to 16 bits with --quantized dequantize, then quantise again with llm-compressor"
)


class _CompressedInt:
    """``weight`` ``(out, in)`` and ``weight_scale``, perhaps zeros and an index."""

    name: Final = "compressed-tensors-int"
    methods: Final = ("compressed-tensors",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; bytes of other libraries have other tensors beside them."""
        found: dict[str, CodedTensor] = {}
        if COMFY in said.metadata:
            return found
        for name, scale in tensors.items():
            module = name.removesuffix(SUFFIX)
            weight = tensors.get(f"{module}.weight")
            if module == name or weight is None or weight.spec.dtype != "I8":
                continue
            # Exponents scale two codes of four bits in each byte.
            is_foreign = any(f"{module}.{leaf}" in tensors for leaf in FOREIGN)
            if scale.spec.dtype in SCALES and not is_foreign:
                found[module] = _coded(tensors, module, weight, scale, said)
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
        groups, scale = coded.settings["groups"], coded.parts["weight_scale"]
        codes = np.frombuffer(parts.rows(coded.parts["weight"], start, stop), np.int8)
        is_one = coded.settings["is_one"]
        first, last = (0, 1) if is_one else (start, stop)
        shape = (last - first, groups)
        factors = scales(scale, parts.rows(scale, first, last), shape, kind)
        zeros: NDArray[Any] | float = 0.0
        zero = coded.parts.get("weight_zero_point")
        if zero is not None:
            zeros = np.frombuffer(parts.rows(zero, first, last), np.int8).reshape(shape)
            zeros = zeros.astype(kind)
        size = -(-coded.width // groups)
        where = None
        if "weight_g_idx" in coded.parts:
            where = group_index(parts, coded.parts["weight_g_idx"], groups, size)
        codes = codes.reshape(stop - start, coded.width)
        return scale_groups(codes, zeros, factors, size if where is None else where, kind)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(coded.spec.name, "W8A8 needs calibration data", hint=KEEP)


def _coded(
    tensors: Mapping[str, StoredTensor],
    module: str,
    weight: StoredTensor,
    scale: StoredTensor,
    said: Description,
) -> CodedTensor:
    """Return a module's weight.

    Raises:
        FileFormatError: Its tensors do not fit together.
        UnsupportedError: Its inputs are scaled, or its codes are in blocks.
    """
    refuse_rotated(module, said)
    if f"{module}.pre_quant_scale" in tensors:
        raise UnsupportedError(
            module, "has a pre_quant_scale: its inputs are scaled before its weight", hint=HINT
        )
    optional = beside(tensors, module, ("weight_zero_point", "weight_g_idx", *OTHERS))
    zero, index = optional.get("weight_zero_point"), optional.get("weight_g_idx")
    if len(weight.spec.shape) != 2:
        raise UnsupportedError(
            weight.spec.name, f"is a stack of codes, {list(weight.spec.shape)}", hint=HINT
        )
    out, into = weight.spec.shape
    shape = scale.spec.shape
    is_one = scale.spec.elements == 1
    groups = shape[1] if len(shape) == 2 and not is_one else 1
    if not is_one and (shape not in ((out,), (out, groups)) or not groups or into % groups):
        if len(shape) == 2 and shape[0] and -(-out // shape[0]) > 1:
            raise UnsupportedError(
                scale.spec.name, f"scales blocks of whole numbers, {list(shape)}", hint=HINT
            )
        raise FileFormatError(
            scale.spec.name,
            f"has shape {list(shape)}, expected one for all, for each output or for each group "
            f"of inputs of a weight {[out, into]}",
        )
    if zero is not None and (zero.spec.dtype, zero.spec.elements) != ("I8", scale.spec.elements):
        raise FileFormatError(
            zero.spec.name,
            f"is {zero.spec.dtype} of shape {list(zero.spec.shape)}, expected I8 of {list(shape)}",
        )
    if index is not None and (index.spec.shape != (into,) or index.spec.dtype not in INDICES):
        raise FileFormatError(
            index.spec.name,
            f"is {index.spec.dtype} of shape {list(index.spec.shape)}, expected one whole number "
            f"for each of {into} inputs",
        )
    return CodedTensor(
        CODEC,
        {"weight": weight, "weight_scale": scale, **optional},
        TensorSpec(weight.spec.name, said.logical_dtype(scale.spec.dtype), (out, into)),
        {"groups": groups, "is_one": is_one},
    )


CODEC: Final[Codec] = _CompressedInt()
