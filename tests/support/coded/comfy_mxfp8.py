"""Samples of ComfyUI's MXFP8."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import Sample, tensor
from coded.comfy_nvfp4 import MODULE, marks, tiled
from coded.fp8_scaled import codes
from loratool.codecs.codec import Description


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(8)
    for label, (rows, into), out, dtype in (
        ("tensor", (32, 64), None, "F8_E8M0"),
        ("metadata", (160, 96), 131, "U8"),
        ("short names", (256, 128), None, "F8_E8M0"),
    ):
        (name, shape, data), values = codes(random, (rows, into))
        kept = rows if out is None else out
        scale = random.integers(90, 130, (rows, into // 32), dtype=np.uint8)
        scale[0, 0] = 0  # which is zero in its files
        powers = np.where(scale == 0, 0.0, 2.0 ** (scale - 127.0))
        stored = tiled(scale)
        extra, metadata = marks("mxfp8", label)
        bias = {} if out is None else {f"{MODULE}.bias": tensor(np.ones(out), "BF16")[0]}
        yield Sample(
            "comfy_mxfp8",
            f"{label}-{rows}x{into}",
            {
                f"{MODULE}.weight": (name, shape, data),
                f"{MODULE}.weight_scale": (dtype, stored.shape, stored.tobytes()),
                f"{MODULE}.input_scale": tensor(np.ones(()), "F32")[0],
                **bias,
                **extra,
            },
            Description(metadata=metadata),
            (values * np.repeat(powers, 32, axis=1))[:kept],
            module=MODULE,
            name=f"{MODULE}.weight",
            scales=(f"{MODULE}.weight_scale",),
            optional=frozenset((f"{MODULE}.input_scale",)),
        )
