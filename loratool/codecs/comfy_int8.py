"""ComfyUI's ``int8_tensorwise``: whole numbers of 8 bits, ``W = q · weight_scale``.

There is one scale for all, or one for each output. Where the layer says ``convrot``, its weight was
rotated: such ones are refused, as all of ComfyUI's formats that are not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.comfy import LEAF, Marks
from loratool.codecs.fp8 import Scaled, decode_blocks, few_scales
from loratool.codecs.parts import beside, needed
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {
    "suffixes": [".comfy_quant", ".weight_scale"],
    "metadata": ["_quantization_metadata"],
}

SCALES: Final = ("F32", "BF16", "F16")
KEEP: Final = "merge to 16 bits with --quantized dequantize, then quantise again for ComfyUI"


class _ComfyInt8:
    """``weight`` and ``scale``."""

    name: Final = "comfy-int8"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; a layer that nothing is said of is somebody else's."""
        found = {}
        marks = Marks(tensors, said)
        for name, codes in tensors.items():
            module = name.removesuffix(".weight")
            if module == name or codes.spec.dtype != "I8":
                continue
            if marks.format_of(module) != "int8_tensorwise":
                continue
            scale = needed(tensors, module, "weight_scale", "whole numbers of 8 bits")
            others = beside(tensors, module, (LEAF, "input_scale"))
            one = Scaled(module, codes, scale, others)
            blocks = few_scales(one, said)
            if blocks is None or scale.spec.dtype not in SCALES:
                raise FileFormatError(
                    scale.spec.name,
                    f"is {scale.spec.dtype} of shape {list(scale.spec.shape)}, expected one float "
                    f"for all or for each output of a weight {list(codes.spec.shape)}",
                )
            shape = codes.spec.shape
            found[module] = CodedTensor(
                CODEC,
                one.parts,
                TensorSpec(name, said.logical_dtype(scale.spec.dtype), shape),
                {"blocks": blocks},
                columns=shape[-1] if len(shape) == 3 else 0,
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
        return decode_blocks(coded, coded.settings["blocks"], start, stop, parts, kind)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(
            coded.spec.name, "whole numbers of 8 bits lose most of a small change", hint=KEEP
        )


CODEC: Final[Codec] = _ComfyInt8()
