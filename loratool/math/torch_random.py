"""The random numbers of PyTorch's generator on the processor, without PyTorch.

Some adapters store the seed of their projections instead of the projections. The generator is a
Mersenne twister (``mt19937``), seeded as its authors' ``init_genrand`` does, and numpy has the
same one. What is made of its words is told here: uniform and normal numbers, and permutations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TorchGenerator", "to_bfloat16"]

FEW: Final = (2**32 - 1) // 20
"""Permutations of so many elements are drawn in another way, with two words for each."""
CHUNK: Final = 1 << 20
"""Words that are drawn at once for them."""
BLOCK: Final = 16
"""Normal numbers that are made at once; fewer are made in pairs, of twice as many words."""
DIGITS: Final = 24
"""Bits of a word that a uniform number is made of: as many as float32 has."""


class TorchGenerator:
    """``torch.Generator("cpu").manual_seed(seed)``: the same numbers, in the same order."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        # Only the legacy interface seeds with a plain number as PyTorch does.
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = state

    def words(self, count: int) -> NDArray[np.uint32]:
        """Return the next words of 32 bits."""
        return self._bits.random_raw(count).astype(np.uint32)

    def uniform(
        self, shape: tuple[int, ...], low: float, high: float, dtype: str = "float32"
    ) -> NDArray[np.float32]:
        """Return what ``torch.empty(shape, dtype=dtype).uniform_(low, high)`` holds.

        Args:
            shape: The shape.
            low: The lowest number.
            high: The end of the interval.
            dtype: ``float32`` or ``bfloat16``, whose numbers float32 holds too.
        """
        words = self.words(math.prod(shape))
        start, end = np.asarray(low, np.float32), np.asarray(high, np.float32)
        shares = (words & np.uint32((1 << DIGITS) - 1)) * 2.0**-DIGITS
        # One rounding, as the fused instruction has it: the product is exact in float64.
        values = (shares * np.float64(end - start) + np.float64(start)).astype(np.float32)
        if dtype == "bfloat16":
            values, start, end = to_bfloat16(values), to_bfloat16(start), to_bfloat16(end)
        values[values == end] = start  # what is rounded up to the end begins again
        whole: NDArray[np.float32] = values.reshape(shape)
        return whole

    def normal(self, shape: tuple[int, ...], deviation: float) -> NDArray[np.float32]:
        """Return what ``torch.normal(0, deviation, shape)`` holds, but for its last bit.

        Both of Box's and Muller's numbers are used; PyTorch's own logarithm and cosine differ from
        others in the last bit of float32.
        """
        count = math.prod(shape)
        if count < BLOCK:
            values = self._normal_pairs(count)
        else:
            values = self.uniform((count,), 0.0, 1.0).astype(np.float64)
            _to_normal(values[: count // BLOCK * BLOCK].reshape((-1, BLOCK)))
            if count % BLOCK:  # the last ones are drawn again
                values[-BLOCK:] = self.uniform((BLOCK,), 0.0, 1.0)
                _to_normal(values[-BLOCK:].reshape((1, BLOCK)))
        whole: NDArray[np.float32] = (values * deviation).astype(np.float32).reshape(shape)
        return whole

    def _normal_pairs(self, count: int) -> NDArray[np.float64]:
        """Return normal numbers made of two uniform ones of float64 each two."""
        halves = self.words(4 * -(-count // 2)).astype(np.uint64).reshape((-1, 2, 2))
        both = halves[..., 0] << np.uint64(32) | halves[..., 1]
        shares = (both & np.uint64((1 << 53) - 1)) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-shares[:, 1])), 2 * np.pi * shares[:, 0]
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        values: NDArray[np.float64] = pairs.reshape(-1)[:count]
        return values

    def first_of_permutation(self, count: int, wanted: int) -> NDArray[np.int64]:
        """Return the first entries of ``torch.randperm(count)``."""
        wanted = min(wanted, count)
        return self._shuffled(count, wanted) if count < FEW else self._inside_out(count, wanted)

    def _shuffled(self, count: int, wanted: int) -> NDArray[np.int64]:
        """Draw each entry from those that are left, so that later ones need not be drawn."""
        moved: dict[int, int] = {}
        found = np.empty(wanted, np.int64)
        draws = self.words(min(wanted, count - 1)).tolist()
        for place in range(wanted):
            # The last one of all is not drawn: it is what is left.
            other = place + draws[place] % (count - place) if place < len(draws) else place
            found[place] = moved.get(other, other)
            moved[other] = moved.get(place, place)
        return found

    def _inside_out(self, count: int, wanted: int) -> NDArray[np.int64]:
        """Let each number take the place of an earlier one, which goes to the end.

        What ends in the first places may come late, so that all have to be drawn.
        """
        found = np.arange(wanted)
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            pairs = self.words(2 * size).astype(np.uint64).reshape((size, 2))
            numbers = np.arange(start, start + size)
            places = (pairs[:, 0] << np.uint64(32) | pairs[:, 1]) % (numbers + 1).astype(np.uint64)
            for index in np.flatnonzero(places < wanted):
                number, place = start + int(index), int(places[index])
                if number < wanted:
                    found[number] = found[place]
                found[place] = number
        return found


def _to_normal(blocks: NDArray[np.float64]) -> None:
    """Make normal numbers of uniform ones, in place; the halves of a block belong together."""
    radius = np.sqrt(-2 * np.log(1 - blocks[:, : BLOCK // 2]))
    angle = 2 * np.pi * blocks[:, BLOCK // 2 :]
    blocks[:, : BLOCK // 2] = radius * np.cos(angle)
    blocks[:, BLOCK // 2 :] = radius * np.sin(angle)


def to_bfloat16(values: Any) -> NDArray[np.float32]:
    """Return float32 numbers rounded to the nearest that bfloat16 has, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
