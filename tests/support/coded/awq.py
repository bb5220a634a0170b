"""Samples of AWQ in its two plain layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, tensor
from coded.gptq import integers, packed
from loratool.codecs.codec import Description

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def interleaved(codes: np.ndarray) -> np.ndarray:
    """Return columns of codes in words, eight each, in AutoAWQ's order."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), "<u4")
    for nibble, column in enumerate(ORDER):
        words |= codes[:, column::8].astype("<u4") << (4 * nibble)
    return words


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for label, (out, into), size, scale, config in (
        ("gemm", (64, 96), 32, "F16", {"quant_method": "awq", "version": "gemm", "bits": 4}),
        ("gemm-one-group", (24, 33), 33, "F16", {"quant_method": "awq", "group_size": -1}),
        ("gemm-bfloat16", (16, 32), 16, "BF16", {"quant_method": "awq", "version": "GEMM"}),
        ("gemm-unsaid", (32, 64), 32, "F16", {}),
        ("gemm-of-auto-round", (32, 64), 32, "F32",
         {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    ):  # fmt: skip
        groups = into // size
        codes = random.integers(0, 16, (out, into))
        zeros = random.integers(0, 16, (groups, out))
        part, scales = tensor(random.random((groups, out)) * 1e-2 + 1e-4, scale)
        where = np.arange(into) // size
        yield Sample(
            "awq",
            label,
            {
                f"{MODULE}.qweight": integers(interleaved(codes.T)),
                f"{MODULE}.qzeros": integers(interleaved(zeros)),
                f"{MODULE}.scales": part,
                "model.norm.weight": ("BF16", (8,), bytes(16)),
            },
            Description(config),
            (codes - zeros.T[:, where]) * scales.T[:, where],
            dtype="F16" if scale == "F16" else "BF16",
            scales=(f"{MODULE}.scales",),
        )
    for (out, into), size in (((16, 256), 128), ((24, 192), 64), ((8, 96), 32)):
        groups, step = into // size, {128: 1, 64: 2, 32: 4}[size]
        words = math.ceil(math.ceil(groups / 8) / step) * step
        codes = random.integers(0, 16, (out, into))
        zeros = random.integers(0, 16, (out, groups))
        padded = np.zeros((out, 8 * words))
        padded[:, :groups] = random.random((out, groups)) * 1e-2 + 1e-4
        part, scales = tensor(padded, "F16")
        where = np.arange(into) // size
        yield Sample(
            "awq",
            f"gemv-{size}",
            {
                f"{MODULE}.qweight": integers(packed(codes, 4)),
                f"{MODULE}.qzeros": integers(packed(zeros, 4, words)),
                f"{MODULE}.scales": part,
            },
            Description({"quant_method": "awq", "version": "gemv", "group_size": size}),
            (codes - zeros[:, where]) * scales[:, where],
            dtype="F16",
            scales=(f"{MODULE}.scales",),
        )
