"""FP8 with a scale for each block of a matrix: DeepSeek-V3's layout, read by transformers as "fp8".

``W[i, j] = Q[i, j] · s[i // b0, j // b1]``. The scale multiplies, whatever its name,
``weight_scale_inv``, suggests. The last blocks are ragged. Scales are floats, or exponents alone
(E8M0), some of these in bytes that claim to be whole numbers. Stacks of experts have a grid each,
in which gate and up may have blocks of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.fp8 import (
    GATE_UP,
    BlockEncoder,
    Blocks,
    Scaled,
    decode_blocks,
    few_scales,
    scaled_weights,
)
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"dtypes": ["F8_E4M3"]}

USUAL_BLOCK: Final = (128, 128)
MICRO: Final = (1, 32)
"""Blocks of scales that are exponents, where those of the others are larger."""
Block: TypeAlias = tuple[int, int]


class _Fp8Block:
    """Two tensors: ``weight`` ``(out, in)``, ``scale`` ``(⌈out / b0⌉, ⌈in / b1⌉)``."""

    name: Final = "fp8-block"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; a scale that is no grid belongs to another way of storing FP8."""
        given = _given(said.quantization)
        found = {}
        for one in scaled_weights(tensors, said, ("F8_E4M3",)):
            if few_scales(one, said) is not None:
                continue
            shape, dtype = one.weight.spec.shape, said.logical_dtype(one.scale.spec.dtype)
            found[one.module] = CodedTensor(
                CODEC,
                one.parts,
                TensorSpec(one.weight.spec.name, dtype, shape),
                {"blocks": _blocks(one, given)},
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
        return BlockEncoder(coded, coded.settings["blocks"])


def _given(quantization: Mapping[str, Any]) -> Block | None:
    """Return the size of blocks that a configuration names, where it names one.

    Raises:
        FileFormatError: It names something else.
    """
    given: Any = quantization.get("weight_block_size")
    if given is None:
        given = _block_structure(quantization)
    if given is None:
        return None
    is_pair = isinstance(given, list | tuple) and len(given) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in given):
        raise FileFormatError(
            "weight_block_size", f"is {given!r:.40}, expected the rows and columns of a block"
        )
    return given[0], given[1]


def _block_structure(quantization: Mapping[str, Any]) -> Any:
    """Return the size of blocks that compressed-tensors' groups agree on, ``128x128`` as a list."""
    groups = quantization.get("config_groups")
    each = groups.values() if isinstance(groups, dict) else ()
    weights = [one.get("weights") for one in each if isinstance(one, dict)]
    found = [
        one["block_structure"]
        for one in weights
        if isinstance(one, dict) and one.get("block_structure")
    ]
    if not found or any(one != found[0] for one in found):
        return None
    text = found[0]
    if not isinstance(text, str):
        return text
    return [int(size) if size.isdecimal() else size for size in text.split("x")]


def _blocks(one: Scaled, given: Block | None) -> Blocks:
    """Return the blocks of a weight, from their size as it is told or as the shapes tell.

    Raises:
        FileFormatError: The scales are no grid of it.
        UnsupportedError: They are one for the whole expert, or one for each of its halves.
    """
    shape, grid = one.weight.spec.shape, one.scale.spec.shape
    if len(grid) == 4 and grid[1::2] == (1, 1):
        grid = grid[::2]
    if len(shape) == 2 and len(grid) == 2:
        return Blocks.of((shape[0], shape[1]), *_block(one, shape, grid, given))
    if len(shape) != 3 or len(grid) != 3 or grid[0] != shape[0]:
        raise FileFormatError(
            one.scale.spec.name, f"has shape {list(grid)}, which is no grid for {list(shape)}"
        )
    count, rows, width = shape
    whole = (count * rows, width)
    half = rows // 2
    if one.module.endswith(GATE_UP) and rows % 2 == 0 and grid[1] % 2 == 0:
        # Gate and up were quantised by themselves, so that blocks begin anew at the second.
        size = given if given is not None else (half, width) if grid[1:] == (2, 1) else None
        try:
            height, breadth = _block(one, (half, width), (grid[1] // 2, grid[2]), size)
        except FileFormatError:
            pass
        else:
            if half % height and _makes((rows, width), (height, breadth), grid[1:]):
                raise UnsupportedError(
                    one.scale.spec.name,
                    f"has {grid[1]} rows of scales for {rows} rows, of which gate and up may have "
                    "some each, or share one",
                    hint="merge on the original whose experts are apart, or on the 16-bit one",
                )
            return Blocks.of(whole, height, breadth, half)
    return Blocks.of(whole, *_block(one, shape[1:], grid[1:], given), rows)


def _block(
    one: Scaled, shape: tuple[int, ...], grid: tuple[int, ...], given: Block | None
) -> Block:
    """Return rows and columns of a block: the configured ones, else what the shapes tell.

    Without a configuration blocks are the usual ones, else of a power of two that divides the
    weight evenly: with ragged edges several sizes make the same grid.

    Raises:
        FileFormatError: Blocks of the configured size do not make this grid, or nothing tells
            which size does.
    """
    name = one.scale.spec.name
    block = given or USUAL_BLOCK
    if not _makes(shape, block, grid) and _is_micro(one.scale, shape, grid):
        return MICRO
    if given is None and not _makes(shape, block, grid):
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


def _is_micro(scale: StoredTensor, shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether scales are of 32 numbers each, which one checkpoint may have beside larger ones."""
    return scale.spec.dtype in ("F8_E8M0", "U8") and _makes(shape, MICRO, grid)


def _length(size: int, count: int) -> int:
    """Return how long ``count`` blocks of an axis are; 0 where that cannot be told."""
    if count == 1:
        return max(1, size)
    length, rest = divmod(size, count) if count else (0, 1)
    return length if not rest and length.bit_count() == 1 else 0


def _makes(shape: tuple[int, ...], block: Block, grid: tuple[int, ...]) -> bool:
    """Whether a weight has this many blocks of this size."""
    return grid == tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=True))


CODEC: Final[Codec] = _Fp8Block()
