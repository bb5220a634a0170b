"""Samples of LLM.int8(), with and without what says that codes lie row by row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, tensor
from loratool.codecs.codec import Description


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for shape, scale, has_format in (
        ((64, 32), "F32", True),
        ((33, 31), "F32", False),
        ((5, 7), "F16", True),
    ):
        codes = random.integers(-128, 128, shape, dtype=np.int8)
        stored, factors = tensor(random.random(shape[0]) + 0.1, scale)
        tensors = {
            f"{MODULE}.weight": ("I8", shape, codes.tobytes()),
            f"{MODULE}.SCB": stored,
            "model.norm.weight": ("BF16", (8,), bytes(16)),
        }
        if has_format:
            tensors[f"{MODULE}.weight_format"] = ("U8", (), bytes(1))
        yield Sample(
            "bitsandbytes_8bit",
            f"{shape[0]}x{shape[1]}-{scale}",
            tensors,
            Description({"quant_method": "bitsandbytes", "load_in_8bit": True}),
            codes * factors[:, None] / 127,
            dtype="F16" if scale == "F16" else "BF16",
            scales=(f"{MODULE}.SCB",),
            optional=frozenset({f"{MODULE}.weight_format"}),
        )
