"""Whole numbers and truth values: exact in float64 up to 2^53."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loratool.codecs.numbers.number import Array, Codes, Number
from loratool.codecs.numbers.scratch import Scratch

__all__ = ["NUMBERS"]


@dataclass(frozen=True, slots=True)
class _Integer:
    """A type that numpy has."""

    code: np.dtype[Any]

    def decode_into(self, codes: Codes, out: Array, scratch: Scratch) -> None:
        np.copyto(out, codes, casting="unsafe")

    @np.errstate(invalid="ignore")
    def encode_into(self, values: Array, out: Codes, scratch: Scratch) -> bool:
        np.copyto(out, values, casting="unsafe")
        return True


NUMBERS: Final[dict[str, Number]] = {
    "BOOL": _Integer(np.dtype("?")),
    **{
        f"{kind.upper()}{8 * size}": _Integer(np.dtype(f"<{kind}{size}"))
        for kind in "iu"
        for size in (1, 2, 4, 8)
    },
}
