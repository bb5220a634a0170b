"""A codec of no real model: bytes in blocks of 5 × 7, a scale and a shift for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loratool.codecs.codec import CodedTensor, Description, Parts
from loratool.errors import UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

CLAIM = {"suffixes": [".blocked_codes"], "methods": ["blocked"]}
HEIGHT, BREADTH = 5, 7


class Blocked:
    name = "blocked"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        found = {}
        for name, codes in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "blocked_codes":
                parts = {"codes": codes}
                parts |= {k: tensors[f"{module}.blocked_{k}"] for k in ("scales", "shifts")}
                spec = TensorSpec(f"{module}.weight", said.logical_dtype(), codes.spec.shape)
                found[module] = CodedTensor(CODEC, parts, spec)
        return found

    def decode_rows(
        self, coded: CodedTensor, start: int, stop: int, parts: Parts, kind: Any = np.float64
    ) -> Any:
        codes = np.frombuffer(parts.rows(coded.parts["codes"], start, stop), np.int8)
        values = codes.reshape(stop - start, coded.width).astype(kind)
        first, last = start // HEIGHT, math.ceil(stop / HEIGHT)
        grids = []
        for role in ("scales", "shifts"):
            grid = np.frombuffer(parts.rows(coded.parts[role], first, last), np.float32)
            grid = grid.reshape(last - first, -1).repeat(HEIGHT, 0).repeat(BREADTH, 1)
            grids.append(grid[start - first * HEIGHT :][: stop - start, : coded.width])
        return values * grids[0].astype(kind) + grids[1].astype(kind)

    def encoder(self, coded: CodedTensor) -> Any:
        raise UnsupportedError(coded.spec.name, "blocked codes need data", hint="merge to 16 bits")


CODEC = Blocked()
