"""Samples of MXFP4: stacks of experts, and matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, tensor
from loratool.codecs.codec import Description

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
PARAMETER = "model.layers.0.mlp.experts.gate_up_proj"


def in_bytes(codes: np.ndarray) -> np.ndarray:
    """Return two codes in each byte, the first one in the low nibble."""
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for label, (experts, out, into), flat, scale in (
        ("stack", (3, 10, 64), False, "U8"),
        ("stack-one-block", (2, 7, 32), False, "F8_E8M0"),
        ("stack-flat", (2, 6, 96), True, "U8"),
    ):
        codes = random.integers(0, 16, (experts, out, into))
        powers = random.integers(110, 131, (experts, out, into // 32), dtype=np.uint8)
        wide = np.repeat(np.ldexp(1.0, powers.astype(int) - 127), 32, axis=2)
        shape = (experts, out, into // 2) if flat else (experts, out, into // 32, 16)
        yield Sample(
            "mxfp4",
            label,
            {
                f"{PARAMETER}_blocks": ("U8", shape, in_bytes(codes).tobytes()),
                f"{PARAMETER}_scales": (scale, powers.shape, powers.tobytes()),
                f"{PARAMETER}_bias": ("BF16", (experts, out), bytes(2 * experts * out)),
            },
            Description({"quant_method": "mxfp4"}),
            (E2M1[codes] * wide).transpose(0, 2, 1).copy(),
            module=PARAMETER,
            name=PARAMETER,
            scales=(f"{PARAMETER}_scales",),
        )
    for label, (out, into), scale in (("pack", (11, 96), "U8"), ("pack-e8m0", (4, 32), "F8_E8M0")):
        codes = random.integers(0, 16, (out, into))
        powers = random.integers(110, 131, (out, into // 32), dtype=np.uint8)
        wide = np.repeat(np.ldexp(1.0, powers.astype(int) - 127), 32, axis=1)
        yield Sample(
            "mxfp4",
            label,
            {
                f"{MODULE}.weight_packed": ("U8", (out, into // 2), in_bytes(codes).tobytes()),
                f"{MODULE}.weight_scale": (scale, powers.shape, powers.tobytes()),
                f"{MODULE}.input_global_scale": tensor(np.ones(1), "F32")[0],
            },
            Description(
                {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, "BF16"
            ),
            E2M1[codes] * wide,
            scales=(f"{MODULE}.weight_scale",),
            optional=frozenset((f"{MODULE}.input_global_scale",)),
        )
