"""A codec of no real model: bytes in blocks of 5 × 7, a scale and a shift for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loratool.codecs.codec import CodedTensor, Read, logical_dtype
from loratool.files.spec import StoredTensor, TensorSpec

CLAIM = {"suffixes": [".blocked_codes"], "methods": ["blocked"]}
HEIGHT, BREADTH = 5, 7


class Blocked:
    name = "blocked"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
    ) -> dict[str, CodedTensor]:
        found = {}
        for name, codes in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "blocked_codes":
                parts = {"codes": codes}
                parts |= {k: tensors[f"{module}.blocked_{k}"] for k in ("scales", "shifts")}
                spec = TensorSpec(f"{module}.weight", logical_dtype(config), codes.spec.shape)
                found[module] = CodedTensor(CODEC, parts, spec)
        return found

    def decode_rows(
        self, coded: CodedTensor, start: int, stop: int, read: Read, kind: Any = np.float64
    ) -> Any:
        codes = np.frombuffer(read(coded.parts["codes"], start, stop), np.int8)
        values = codes.reshape(stop - start, coded.width).astype(kind)
        first, last = start // HEIGHT, math.ceil(stop / HEIGHT)
        grids = []
        for part in ("scales", "shifts"):
            grid = np.frombuffer(read(coded.parts[part], first, last), np.float32)
            grid = grid.reshape(last - first, -1).repeat(HEIGHT, 0).repeat(BREADTH, 1)
            grids.append(grid[start - first * HEIGHT :][: stop - start, : coded.width])
        return values * grids[0].astype(kind) + grids[1].astype(kind)

    def row_step(self, coded: CodedTensor) -> int:
        return HEIGHT

    def encode_rows(self, coded: CodedTensor, start: int, stop: int, values: Any) -> Any:
        raise NotImplementedError


CODEC = Blocked()
