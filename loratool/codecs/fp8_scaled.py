"""FP8 with one scale for a tensor, a row, an expert, or a column of an expert.

``W = Q · s``: the scale multiplies, whatever it is called. So do transformers (``weight_scale_inv``
without blocks, fbgemm's ``weight_scale``), compressed-tensors, modelopt and ComfyUI, whose older
files say ``scale_weight`` and have an empty tensor ``scaled_fp8`` as a marker, the newer ones
``comfy_quant`` or ``_quantization_metadata``. Numbers beside it that are of inputs are no part of
the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.fp8 import (
    LARGEST,
    BlockEncoder,
    decode_blocks,
    few_scales,
    scaled_weights,
)
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"dtypes": ["F8_E4M3", "F8_E5M2"], "metadata": ["_quantization_metadata"]}


class _Fp8Scaled:
    """Two tensors: ``weight`` of any shape, ``scale`` with few numbers."""

    name: Final = "fp8"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; scales that are a grid belong to FP8 in blocks."""
        found = {}
        for one in scaled_weights(tensors, said, tuple(LARGEST)):
            blocks = few_scales(one, said)
            if blocks is None:
                continue
            spec = one.weight.spec
            dtype = said.logical_dtype(one.scale.spec.dtype)
            found[one.module] = CodedTensor(
                CODEC,
                one.parts,
                TensorSpec(spec.name, dtype, spec.shape),
                {"blocks": blocks},
                columns=spec.shape[-1] if len(spec.shape) == 3 else 0,
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
        return BlockEncoder(coded, coded.settings["blocks"])


CODEC: Final[Codec] = _Fp8Scaled()
