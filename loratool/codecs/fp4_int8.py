"""FP4 in bytes that claim to be whole numbers: experts of DeepSeek-V4, as transformers reads them.

``W = FP4[q] · 2^(scale - 127)`` with a scale for each 32 inputs. Two codes lie in each byte, the
first one in its low bits; scales are exponents. Stacks of experts are not turned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.fp8 import scales_beside
from loratool.codecs.lookup import E2M1, look_up
from loratool.codecs.parts import scales
from loratool.codecs.stacks import stacked_rows
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"dtypes": ["I8"]}

BLOCK: Final = 32
EXPONENTS: Final = ("F8_E8M0", "U8")
KEEP: Final = (
    "merge to 16 bits with --quantized dequantize, then quantise again with the tool that made it"
)


class _Fp4Int8:
    """Codes ``(…, out, in / 2)`` and scales ``(…, out, in / 32)``."""

    name: Final = "fp4-int8"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; scales that are floats are of codes of eight bits."""
        found = {}
        for name, codes in tensors.items():
            if codes.spec.dtype != "I8":
                continue
            beside = {
                leaf: scale
                for leaf, scale in scales_beside(name, tensors)[1].items()
                if scale.spec.dtype in EXPONENTS
            }
            if len(beside) != 1:
                continue
            ((_, scale),) = beside.items()
            *first, packed = codes.spec.shape or (0,)
            shape = (*first, 2 * packed)
            if len(shape) not in (2, 3) or scale.spec.shape != (*first, -(-2 * packed // BLOCK)):
                raise FileFormatError(
                    scale.spec.name,
                    f"has shape {list(scale.spec.shape)}, expected one for each {BLOCK} inputs of "
                    f"codes of FP4, two in a byte, {list(codes.spec.shape)}",
                )
            found[name.removesuffix(".weight")] = CodedTensor(
                CODEC,
                {"weight": codes, "scale": scale},
                TensorSpec(name, said.logical_dtype(), shape),
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
        codes, scale = coded.parts["weight"], coded.parts["scale"]
        grid = (stop - start, math.ceil(coded.width / BLOCK))
        powers = stacked_rows(parts, scale, start, stop)
        factors = scales(scale, powers, grid, kind, dtype="F8_E8M0")
        values = look_up(stacked_rows(parts, codes, start, stop), E2M1, kind)
        values = values.reshape(stop - start, coded.width)
        values *= np.repeat(factors, BLOCK, axis=1)[:, : coded.width]
        return values

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(coded.spec.name, "FP4 in I8 is not written again", hint=KEEP)


CODEC: Final[Codec] = _Fp4Int8()
