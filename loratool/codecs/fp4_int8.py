"""FP4 in bytes that claim to be whole numbers: experts of DeepSeek-V4, as transformers reads them.

``W = FP4[q] · 2^(scale - 127)`` with a scale for each 32 inputs. Two codes lie in each byte, the
first one in its low bits; scales are exponents. Stacks of experts are not turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.fp8 import scales_beside
from loratool.codecs.lookup import E2M1, look_up
from loratool.codecs.microscaled import BLOCK, encode_into
from loratool.codecs.numbers.number import Codes
from loratool.codecs.parts import scales
from loratool.codecs.stacks import stacked_rows
from loratool.errors import FileFormatError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"dtypes": ["I8"]}

EXPONENTS: Final = ("F8_E8M0", "U8")


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
            shape, grid = (*first, 2 * packed), (*first, 2 * packed // BLOCK)
            is_whole = len(shape) in (2, 3) and shape[-1] % BLOCK == 0
            if not is_whole or scale.spec.shape != grid:
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
        grid = (stop - start, coded.width // BLOCK)
        powers = stacked_rows(parts, scale, start, stop)
        factors = scales(scale, powers, grid, kind, dtype="F8_E8M0")
        values = look_up(stacked_rows(parts, codes, start, stop), E2M1, kind)
        values = values.reshape(stop - start, coded.width)
        values *= np.repeat(factors, BLOCK, axis=1)
        return values

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        return _Encoder(coded)


class _Encoder:
    """The scale of a block is one of two powers of two: whichever is nearer to its numbers."""

    roles: Final = ("weight", "scale")
    needs_largest: Final = False

    def __init__(self, coded: CodedTensor) -> None:
        self.coded = coded
        self.step: int = coded.spec.shape[1] if len(coded.spec.shape) == 3 else 1

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`."""
        if start % self.step or stop % self.step:
            raise ValueError(f"rows {start} to {stop} are no experts of {self.step}")
        if not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        first = start // self.step
        packed = np.empty((stop - start, self.coded.width // 2), np.uint8)
        powers = np.empty((stop - start, self.coded.width // BLOCK), np.uint8)
        encode_into(values, packed, powers)
        made = {"weight": packed.view(np.int8), "scale": powers}
        shapes = {role: self.coded.parts[role].spec.shape[1:] for role in self.roles}
        return {role: (first, made[role].reshape(-1, *shapes[role])) for role in self.roles}


CODEC: Final[Codec] = _Fp4Int8()
