"""ComfyUI's NVFP4: codes of FP4 in blocks of 16, with a scale in FP8 each and one for all.

``W = FP4[q] · weight_scale · weight_scale_2``. The names are modelopt's and the layout is not: the
first code of a byte has its high bits, and scales lie in cuBLAS' order. Only what the file says of
the layer tells which it is. Rows and columns are padded to 16; as many rows are there as the bias
has, where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.comfy import LEAF, METADATA, Marks, logical_rows
from loratool.codecs.fp4 import LARGEST, in_bytes, nearest
from loratool.codecs.lookup import E2M1, look_up
from loratool.codecs.numbers import decode, encode
from loratool.codecs.numbers.number import Codes
from loratool.codecs.parts import beside, needed, scales
from loratool.codecs.swizzled import TILE_ROWS, padded, swizzled, unswizzled
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {
    "suffixes": [".comfy_quant", ".weight_scale_2"],
    "metadata": ["_quantization_metadata"],
}

BLOCK: Final = 16
PEAK: Final = 448.0
"""The largest scale of a block."""
SMALLEST: Final = 2.0**-9
OF_MODELOPT: Final = "quantization_config"
"""A key of headers that modelopt writes, whose codes lie in its own order even for ComfyUI."""
HINT: Final = "merge on the 16-bit original"


class _ComfyNvfp4:
    """Codes ``(out, in / 2)``, scales in tiles, and a single number."""

    name: Final = "comfy-nvfp4"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; a layer that nothing is said of is modelopt's."""
        found = {}
        marks = Marks(tensors, said)
        for name, codes in tensors.items():
            module = name.removesuffix(".weight")
            if module == name or codes.spec.dtype != "U8":
                continue
            if marks.format_of(module) == "nvfp4":
                found[module] = _coded(tensors, module, codes, said)
            elif METADATA in said.metadata and f"{module}.weight_scale_2" in tensors:
                raise FileFormatError(
                    name, f"has codes of NVFP4, and {METADATA} says nothing of its layer"
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
        codes, scale = coded.parts["weight"], coded.parts["weight_scale"]
        whole = coded.parts["weight_scale_2"]
        one = scales(whole, parts.rows(whole, 0, 1), (1,), kind)
        if start == stop:
            return np.empty((0, coded.width), kind)
        first, last = start // TILE_ROWS * TILE_ROWS, -(-stop // TILE_ROWS) * TILE_ROWS
        tiles = np.frombuffer(parts.rows(scale, first, last), np.uint8)
        blocks = unswizzled(tiles.reshape(last - first, -1))
        count = coded.width // BLOCK
        used = np.ascontiguousarray(blocks[start - first : stop - first, :count])
        factors = scales(scale, used, used.shape, kind)
        factors *= one
        data = np.frombuffer(parts.rows(codes, start, stop), np.uint8)
        values = look_up(data, E2M1, kind, high_first=True).reshape(stop - start, coded.width)
        values *= np.repeat(factors, BLOCK, axis=1)
        return values

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        return _Encoder(coded)


class _Encoder:
    """The largest number becomes the largest product; each block's the largest code."""

    roles: Final = ("weight", "weight_scale", "weight_scale_2")
    needs_largest: Final = True
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
        if largest is None or not math.isfinite(largest) or not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        dtype = coded.parts["weight_scale_2"].spec.dtype
        wanted = max(largest / (LARGEST * PEAK), 2.0**-126) if largest > 0 else 1.0
        whole = encode(np.array(wanted), dtype)
        factor = float(decode(whole, dtype, ()))
        blocks = values.reshape(stop - start, coded.width // BLOCK, BLOCK).astype(np.float64)
        peaks = np.abs(blocks).max(axis=2)
        # A block of zeros has the scale zero, as those beyond the weight have.
        scale = encode(
            np.where(peaks > 0, np.clip(peaks / LARGEST / factor, SMALLEST, PEAK), 0.0), "F8_E4M3"
        )
        divisors = decode(scale, "F8_E4M3", scale.shape) * factor
        divisors[peaks == 0] = 1.0
        blocks /= divisors[:, :, None]
        codes = nearest(blocks).reshape(-1, 2)[:, ::-1]
        packed = in_bytes(codes).reshape(stop - start, coded.width // 2)
        if stop == coded.rows:  # what is beyond the weight is zero
            rest = coded.parts["weight"].spec.shape[0] - stop
            packed = np.concatenate([packed, np.zeros((rest, packed.shape[1]), np.uint8)])
        return {
            "weight": (start, packed),
            "weight_scale": (start, swizzled(scale)),
            "weight_scale_2": (0, whole.reshape(coded.parts["weight_scale_2"].spec.shape)),
        }


def _coded(
    tensors: Mapping[str, StoredTensor], module: str, codes: StoredTensor, said: Description
) -> CodedTensor:
    """Return the weight of a layer.

    Raises:
        FileFormatError: Its tensors do not fit together.
        UnsupportedError: Its inputs are scaled too, or its codes are in an order that is not told.
    """
    if f"{module}.pre_quant_scale" in tensors:
        raise UnsupportedError(
            module, "has a pre_quant_scale: its inputs are scaled before its weight", hint=HINT
        )
    if OF_MODELOPT in said.metadata:
        raise UnsupportedError(
            module,
            "is NVFP4 that modelopt wrote for ComfyUI; which code of a byte is the first in such "
            "files was never checked",
            hint=HINT,
        )
    scale = needed(tensors, module, "weight_scale", "codes of NVFP4")
    whole = needed(tensors, module, "weight_scale_2", "codes of NVFP4")
    if len(codes.spec.shape) != 2:
        raise UnsupportedError(
            codes.spec.name, f"is a stack of FP4 codes, {list(codes.spec.shape)}", hint=HINT
        )
    rows, packed = codes.spec.shape
    into = 2 * packed
    expected = padded(rows, into // BLOCK)
    if scale.spec.dtype != "F8_E4M3" or scale.spec.shape != expected or into % BLOCK:
        raise FileFormatError(
            scale.spec.name,
            f"is {scale.spec.dtype} of shape {list(scale.spec.shape)}, expected F8_E4M3 of "
            f"{list(expected)}: tiles with one for each {BLOCK} inputs of {[rows, into]}",
        )
    if whole.spec.dtype not in ("F32", "BF16", "F16") or whole.spec.elements != 1:
        raise FileFormatError(
            whole.spec.name,
            f"is {whole.spec.dtype} of shape {list(whole.spec.shape)}, expected one float",
        )
    out = logical_rows(tensors, module, rows, BLOCK)
    parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": whole}
    return CodedTensor(
        CODEC,
        parts | beside(tensors, module, (LEAF, "input_scale")),
        TensorSpec(f"{module}.weight", said.logical_dtype(), (out, into)),
    )


CODEC: Final[Codec] = _ComfyNvfp4()
