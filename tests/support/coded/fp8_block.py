"""Samples of FP8 with a scale for each block, ragged edges included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample
from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for (out, into), block, scale in (
        ((256, 384), (128, 128), "F32"),
        ((200, 150), (128, 128), "F32"),
        ((200, 150), (128, 128), "BF16"),
        ((37, 50), (16, 8), "F8_E8M0"),
        ((37, 50), (16, 8), "U8"),
        ((3, 5), (128, 128), "F32"),
    ):
        grid = (-(-out // block[0]), -(-into // block[1]))
        codes = random.integers(0, 0x7F, (out, into), dtype=np.uint8)
        codes |= random.integers(0, 2, (out, into), dtype=np.uint8) << 7
        kind = "F8_E8M0" if scale == "U8" else scale
        scales = random.integers(100, 130, grid) if kind == "F8_E8M0" else random.random(grid)
        raw = scales.astype("u1") if kind == "F8_E8M0" else (scales * 1e-3).astype("<f4")
        if scale == "BF16":
            raw = (raw.view("<u4") >> 16).astype("<u2")
        values = decode(codes, "F8_E4M3", codes.shape)
        numbers = decode(raw, kind, grid)
        spread = np.repeat(np.repeat(numbers, block[0], axis=0), block[1], axis=1)
        yield Sample(
            "fp8_block",
            f"{out}x{into}-{scale}",
            {
                f"{MODULE}.weight": ("F8_E4M3", (out, into), codes.tobytes()),
                f"{MODULE}.weight_scale_inv": (scale, grid, raw.tobytes()),
                "model.norm.weight": ("BF16", (8,), bytes(16)),
            },
            Description({"quant_method": "fp8", "weight_block_size": list(block)}),
            values * spread[:out, :into],
            scales=(f"{MODULE}.weight_scale_inv",),
        )
