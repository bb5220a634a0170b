"""Samples of FP4 in bytes that claim to be whole numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample
from coded.comfy_nvfp4 import MAGNITUDES
from loratool.codecs.codec import Description

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(11)
    for shape, names, dtype in (
        ((9, 64), (f"{MODULE}.weight", f"{MODULE}.scale"), "F8_E8M0"),
        ((9, 96), (f"{MODULE}.weight", f"{MODULE}.weight_scale_inv"), "U8"),
        ((3, 5, 64), (EXPERTS, f"{EXPERTS}_scale_inv"), "F8_E8M0"),
    ):
        codes = random.integers(0, 16, shape, dtype=np.uint8)
        powers = random.integers(90, 130, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)
        values = np.where(codes & 8, -1.0, 1.0) * np.array(MAGNITUDES)[codes & 7]
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        yield Sample(
            "fp4_int8",
            f"{'x'.join(map(str, shape))}-{dtype}",
            {
                names[0]: ("I8", packed.shape, packed.tobytes()),
                names[1]: (dtype, powers.shape, powers.tobytes()),
            },
            Description({"quant_method": "fp8", "weight_block_size": [128, 128]}),
            values * np.repeat(2.0 ** (powers - 127.0), 32, axis=-1),
            module=names[0].removesuffix(".weight"),
            name=names[0],
            scales=(names[1],),
        )
