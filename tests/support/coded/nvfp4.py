"""Samples of NVFP4, by modelopt's names and by compressed-tensors'."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, tensor
from coded.mxfp4 import E2M1, in_bytes
from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode

MODELOPT = Description({"quant_method": "modelopt", "quant_algo": "NVFP4"})
COMPRESSED = Description({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for label, leaf, (out, into), shape, extra, said in (
        ("modelopt", "weight", (33, 48), (), False, MODELOPT),
        ("modelopt-tiles", "weight", (128, 64), (1,), True, MODELOPT),
        ("modelopt-unsaid", "weight", (5, 16), (), True, Description()),
        ("compressed", "weight_packed", (33, 48), (1,), False, COMPRESSED),
        ("compressed-scalar", "weight_packed", (128, 64), (), True, COMPRESSED),
    ):
        codes = random.integers(0, 16, (out, into), dtype=np.uint8)
        raw = random.integers(1, 0x7F, (out, into // 16), dtype=np.uint8)
        blocks = np.repeat(decode(raw, "F8_E4M3", raw.shape), 16, axis=1)
        is_modelopt = leaf == "weight"
        whole = "weight_scale_2" if is_modelopt else "weight_global_scale"
        part, one = tensor(np.full(shape, 3.7e-5 if is_modelopt else 21345.0), "F32")
        truth = E2M1[codes] * blocks * one if is_modelopt else E2M1[codes] * (blocks / one)
        tensors = {
            f"{MODULE}.{leaf}": ("U8", (out, into // 2), in_bytes(codes).tobytes()),
            f"{MODULE}.weight_scale": ("F8_E4M3", raw.shape, raw.tobytes()),
            f"{MODULE}.{whole}": part,
            "model.norm.weight": ("BF16", (8,), bytes(16)),
        }
        inputs = f"{MODULE}.{'input_scale' if is_modelopt else 'input_global_scale'}"
        if extra:
            tensors[inputs] = tensor(np.ones(1), "F32")[0]
        yield Sample(
            "nvfp4",
            label,
            tensors,
            said,
            truth,
            scales=(f"{MODULE}.weight_scale", f"{MODULE}.{whole}"),
            optional=frozenset((inputs,)),
        )
