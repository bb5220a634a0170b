"""Samples of FP8 without any scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, tensor
from coded.fp8_scaled import codes
from loratool.codecs.codec import Description


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(6)
    for shape, dtype, name, said in (
        ((13, 17), "F8_E4M3", f"{MODULE}.weight", Description()),
        ((130, 70), "F8_E5M2", f"{MODULE}.weight", Description(dtype="F16")),
        ((8, 3, 3, 3), "F8_E4M3", "model.diffusion_model.input_blocks.0.0.weight", Description()),
        ((21,), "F8_E4M3", f"{MODULE}.bias", Description()),
    ):
        weight, values = codes(random, shape, dtype)
        yield Sample(
            "fp8_plain",
            f"{'x'.join(map(str, shape))}-{dtype}",
            {name: weight, "model.norm.weight": tensor(np.ones(4), "F32")[0]},
            said,
            values,
            module=name.removesuffix(".weight"),
            name=name,
            dtype=said.dtype or "BF16",
        )
