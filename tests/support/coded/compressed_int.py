"""Samples of compressed-tensors' whole numbers, one in a byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description

SAID = Description({"quant_method": "compressed-tensors", "format": "int-quantized"})


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    out, into = 21, 40
    for label, shape, scale, kind in (
        ("channel", (out, 1), "BF16", ""),
        ("channel-flat", (out,), "F32", ""),
        ("tensor", (1,), "F32", ""),
        ("scalar", (), "F16", ""),
        ("group", (out, 5), "BF16", ""),
        ("channel-asymmetric", (out, 1), "BF16", "zeros inputs"),
        ("tensor-asymmetric", (1,), "F32", "zeros"),
        ("group-asymmetric", (out, 5), "F16", "zeros"),
        ("act-order", (out, 5), "BF16", "zeros order"),
    ):
        codes = random.integers(-128, 128, (out, into), dtype=np.int8)
        part, scales = tensor(random.random(shape) * 1e-2 + 1e-4, scale)
        tensors: dict[str, Tensor] = {
            f"{MODULE}.weight": ("I8", (out, into), codes.tobytes()),
            f"{MODULE}.weight_scale": part,
            "model.norm.weight": ("BF16", (8,), bytes(16)),
        }
        zeros = np.zeros(shape, np.int8)
        if "zeros" in kind:
            zeros = random.integers(-128, 128, shape, dtype=np.int8)
            tensors[f"{MODULE}.weight_zero_point"] = ("I8", shape, zeros.tobytes())
        where = np.arange(into) // (into // 5)
        if "order" in kind:
            where = random.permutation(where)
            tensors[f"{MODULE}.weight_g_idx"] = ("I32", (into,), where.astype("<i4").tobytes())
        if "inputs" in kind:
            tensors[f"{MODULE}.input_scale"] = tensor(np.ones(1), "F32")[0]
            tensors[f"{MODULE}.input_zero_point"] = ("I8", (1,), bytes(1))
        wide, high = scales.reshape(-1, *shape[1:]), zeros.reshape(-1, *shape[1:]).astype(float)
        if shape[1:] == (5,):
            wide, high = wide[:, where], high[:, where]
        wide, high = (array.reshape(len(array), -1) for array in (wide, high))
        truth = (codes - high) * wide
        yield Sample(
            "compressed_int",
            label,
            tensors,
            SAID,
            truth,
            dtype="F16" if scale == "F16" else "BF16",
            scales=(f"{MODULE}.weight_scale",),
            optional=frozenset(
                f"{MODULE}.{leaf}"
                for leaf in ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")
            ),
        )
