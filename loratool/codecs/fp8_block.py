"""FP8 with a scale for each block of a matrix: DeepSeek-V3's layout, read by transformers as "fp8".

``W[i, j] = Q[i, j] · s[i // b0, j // b1]``. The scale multiplies, whatever its name,
``weight_scale_inv``, suggests. The last blocks are ragged. Scales are floats, or exponents alone
(E8M0), some of these in bytes that claim to be whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Parts
from loratool.codecs.numbers import decode, encode
from loratool.codecs.numbers.number import Codes
from loratool.codecs.parts import scales
from loratool.errors import FileFormatError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".weight_scale_inv"]}

SUFFIX: Final = ".weight_scale_inv"
LARGEST: Final = 448.0
USUAL_BLOCK: Final = (128, 128)
SCALES: Final = ("F32", "BF16", "F16", "F8_E8M0", "U8")


class _Fp8Block:
    """Two tensors: ``weight`` ``(out, in)``, ``scale`` ``(⌈out / b0⌉, ⌈in / b1⌉)``."""

    name: Final = "fp8-block"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; a scale that is no grid belongs to another way of storing FP8."""
        given = said.quantization.get("weight_block_size")
        found = {}
        for name, scale in tensors.items():
            module = name.removesuffix(SUFFIX)
            weight = tensors.get(f"{module}.weight")
            if module == name or weight is None or weight.spec.dtype != "F8_E4M3":
                continue
            if len(weight.spec.shape) != 2 or len(scale.spec.shape) != 2:
                continue
            if scale.spec.dtype not in SCALES:
                raise FileFormatError(name, f"is {scale.spec.dtype}, which is no scale of blocks")
            dtype = said.logical_dtype(scale.spec.dtype)
            found[module] = CodedTensor(
                CODEC,
                {"weight": weight, "scale": scale},
                TensorSpec(weight.spec.name, dtype, weight.spec.shape),
                {"block": _block(name, weight.spec.shape, scale.spec.shape, given)},
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
        weight, scale = coded.parts["weight"], coded.parts["scale"]
        height, breadth = coded.settings["block"]
        values = decode(
            parts.rows(weight, start, stop), weight.spec.dtype, (stop - start, coded.width), kind
        )
        first, last = start // height, -(-stop // height)
        grid = (last - first, scale.spec.shape[1])
        data = parts.rows(scale, first, last)
        factors = scales(scale, data, grid, kind, dtype=_scale_dtype(scale))
        for row in range(first, last):
            rows = slice(max(0, row * height - start), (row + 1) * height - start)
            values[rows] *= np.repeat(factors[row - first], breadth)[: coded.width]
        return values

    def encoder(self, coded: CodedTensor) -> _Encoder:
        """See :class:`Codec`."""
        return _Encoder(coded)


class _Encoder:
    """The largest number of each block becomes the largest code."""

    roles: Final = ("weight", "scale")
    needs_largest: Final = False

    def __init__(self, coded: CodedTensor) -> None:
        self.coded = coded
        self.step: int = coded.settings["block"][0]

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`."""
        coded = self.coded
        height, breadth = coded.settings["block"]
        if start % height or (stop % height and stop != coded.rows):
            raise ValueError(f"rows {start} to {stop} are no blocks of {height}")
        scale = coded.parts["scale"]
        dtype = _scale_dtype(scale)
        first, last = start // height, -(-stop // height)
        peaks = np.empty((last - first, scale.spec.shape[1]))
        for row in range(last - first):
            columns = np.abs(values[row * height : (row + 1) * height]).max(axis=0)
            peaks[row] = np.maximum.reduceat(columns, np.arange(0, coded.width, breadth))
        if not np.isfinite(peaks).all():
            raise ValueError("a value is not finite")
        factors = encode(_scales(peaks, dtype), dtype)
        divisors = decode(factors, dtype, factors.shape)
        scaled = values.astype(np.float64)
        for row in range(last - first):
            rows = slice(row * height, (row + 1) * height)
            scaled[rows] /= np.repeat(divisors[row], breadth)[: coded.width]
        codes = encode(np.clip(scaled, -LARGEST, LARGEST, out=scaled), "F8_E4M3")
        return {"weight": (start, codes), "scale": (first, factors)}


def _scales(largest: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return what to divide blocks by whose largest numbers are ``largest``; never zero."""
    scales = np.where(largest > 0, largest / LARGEST, 1.0)
    if dtype == "F8_E8M0":
        mantissa, exponent = np.frexp(scales)
        powers: NDArray[np.float64] = np.ldexp(
            1.0, np.clip(exponent - (mantissa == 0.5), -127, 127)
        )
        return powers
    return np.maximum(scales, {"F16": 2.0**-24}.get(dtype, 2.0**-126))


def _scale_dtype(scale: StoredTensor) -> str:
    return "F8_E8M0" if scale.spec.dtype == "U8" else scale.spec.dtype


def _block(name: str, shape: tuple[int, ...], grid: tuple[int, ...], given: Any) -> tuple[int, int]:
    """Return rows and columns of a block: the configured ones, else what the shapes tell.

    Without a configuration blocks are the usual ones, else of a power of two that divides the
    weight evenly: with ragged edges several sizes make the same grid.

    Raises:
        FileFormatError: The configured size is none, blocks of it do not make this grid, or
            nothing tells which size does.
    """
    block = USUAL_BLOCK
    if given is not None:
        is_pair = isinstance(given, list | tuple) and len(given) == 2
        if not is_pair or not all(type(size) is int and size > 0 for size in given):
            raise FileFormatError(
                "weight_block_size", f"is {given!r:.40}, expected the rows and columns of a block"
            )
        block = (given[0], given[1])
    elif not _makes(shape, block, grid):
        height, breadth = (_length(size, n) for size, n in zip(shape, grid, strict=True))
        if not height or not breadth:
            raise FileFormatError(
                name,
                f"has shape {list(grid)} for a weight {list(shape)}, which several sizes of blocks "
                "would make",
                hint="say which in config.json: quantization_config.weight_block_size",
            )
        block = (height, breadth)
    if not _makes(shape, block, grid):
        raise FileFormatError(
            name,
            f"has shape {list(grid)}, which is not one scale for each block of "
            f"{' × '.join(map(str, block))} of a weight {list(shape)}",
        )
    return block


def _length(size: int, count: int) -> int:
    """Return how long ``count`` blocks of an axis are; 0 where that cannot be told."""
    if count == 1:
        return max(1, size)
    length, rest = divmod(size, count) if count else (0, 1)
    return length if not rest and length.bit_count() == 1 else 0


def _makes(shape: tuple[int, ...], block: tuple[int, int], grid: tuple[int, ...]) -> bool:
    """Whether a weight has this many blocks of this size."""
    return grid == tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=True))


CODEC: Final[Codec] = _Fp8Block()
