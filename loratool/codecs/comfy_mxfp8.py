"""ComfyUI's MXFP8: FP8 in blocks of 32 inputs with a power of two each, in cuBLAS' order.

``W = Q · 2^(scale - 127)``, and a scale of 0 is zero. Rows and columns are padded to 32; as many
rows are there as the bias has, where there is one. Scales in the order of their blocks are those
of FP8 in blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.comfy import LEAF, Marks, logical_rows
from loratool.codecs.fp8 import LARGEST, factors_for, largest_of, rounded
from loratool.codecs.numbers import decode
from loratool.codecs.numbers.number import Codes
from loratool.codecs.parts import beside, needed, scales
from loratool.codecs.swizzled import TILE_ROWS, padded, swizzled, unswizzled
from loratool.errors import FileFormatError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".comfy_quant"], "metadata": ["_quantization_metadata"]}

BLOCK: Final = 32
SCALES: Final = ("F8_E8M0", "U8")


class _ComfyMxfp8:
    """Codes ``(out, in)`` and scales in tiles."""

    name: Final = "comfy-mxfp8"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`."""
        found = {}
        marks = Marks(tensors, said)
        for name, codes in tensors.items():
            module = name.removesuffix(".weight")
            is_code = module != name and codes.spec.dtype in LARGEST
            if is_code and marks.format_of(module) == "mxfp8":
                found[module] = _coded(tensors, module, codes, said)
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
        weight, scale = coded.parts["weight"], coded.parts["weight_scale"]
        if start == stop:
            return np.empty((0, coded.width), kind)
        first, last = start // TILE_ROWS * TILE_ROWS, -(-stop // TILE_ROWS) * TILE_ROWS
        tiles = np.frombuffer(parts.rows(scale, first, last), np.uint8)
        blocks = unswizzled(tiles.reshape(last - first, -1))
        used = np.ascontiguousarray(blocks[start - first : stop - first, : coded.width // BLOCK])
        factors = scales(scale, used, used.shape, kind, dtype="F8_E8M0")
        factors[used == 0] = 0.0
        data = parts.rows(weight, start, stop)
        values = decode(data, weight.spec.dtype, (stop - start, coded.width), kind)
        values *= np.repeat(factors, BLOCK, axis=1)
        return values

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        return _Encoder(coded)


class _Encoder:
    """The scale of a block is the least power of two with which no number is too large."""

    roles: Final = ("weight", "weight_scale")
    needs_largest: Final = False
    step: Final = TILE_ROWS

    def __init__(self, coded: CodedTensor) -> None:
        self.coded = coded

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`."""
        coded = self.coded
        if start % TILE_ROWS or (stop % TILE_ROWS and stop != coded.rows):
            raise ValueError(f"rows {start} to {stop} are no tiles of {TILE_ROWS}")
        dtype = coded.parts["weight"].spec.dtype
        blocks = values.reshape(stop - start, coded.width // BLOCK, BLOCK)
        peaks = largest_of(blocks)
        if not np.isfinite(peaks).all():
            raise ValueError("a value is not finite")
        # The code 0 stands for zero here, where it would be 2^-127.
        scale = np.maximum(factors_for(peaks, "F8_E8M0", LARGEST[dtype]), np.uint8(1))
        divisors = decode(scale, "F8_E8M0", scale.shape)
        codes = rounded(blocks, divisors[:, :, None], dtype).reshape(values.shape)
        scale[peaks == 0] = 0
        if stop == coded.rows:  # what is beyond the weight is zero
            rest = coded.parts["weight"].spec.shape[0] - stop
            codes = np.concatenate([codes, np.zeros((rest, coded.width), np.uint8)])
        return {"weight": (start, codes), "weight_scale": (start, swizzled(scale))}


def _coded(
    tensors: Mapping[str, StoredTensor], module: str, codes: StoredTensor, said: Description
) -> CodedTensor:
    """Return the weight of a layer.

    Raises:
        FileFormatError: Its tensors do not fit together.
    """
    scale = needed(tensors, module, "weight_scale", "codes of MXFP8")
    shape = codes.spec.shape
    expected = padded(shape[0], shape[1] // BLOCK) if len(shape) == 2 else ()
    is_fit = expected and scale.spec.shape == expected and not shape[1] % BLOCK
    if scale.spec.dtype not in SCALES or not is_fit:
        raise FileFormatError(
            scale.spec.name,
            f"is {scale.spec.dtype} of shape {list(scale.spec.shape)}, expected F8_E8M0 of "
            f"{list(expected)}: tiles with one for each {BLOCK} inputs of {list(shape)}",
        )
    out = logical_rows(tensors, module, shape[0], BLOCK)
    return CodedTensor(
        CODEC,
        {"weight": codes, "weight_scale": scale} | beside(tensors, module, (LEAF, "input_scale")),
        TensorSpec(f"{module}.weight", said.logical_dtype(), (out, shape[1])),
    )


CODEC: Final[Codec] = _ComfyMxfp8()
