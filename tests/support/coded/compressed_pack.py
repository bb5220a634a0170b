"""Samples of compressed-tensors' packed whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from coded.gptq import integers, packed
from loratool.codecs.codec import Description


def said(bits: int, **more: Any) -> Description:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, **more}
    group = {"weights": weights, "targets": ["Linear"]}
    return Description(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
        }
    )


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    cases: list[tuple[str, int, tuple[int, int], int, str, str]] = []
    for bits in range(1, 9):
        cases.append((f"int{bits}", bits, (12, 96), 3, "symmetric", "BF16"))
        cases.append((f"int{bits}-asymmetric", bits, (37, 64), 2, "asymmetric", "F16"))
    cases += [
        ("int4-channel", 4, (9, 50), 1, "symmetric", "F32"),
        ("int3-channel", 3, (9, 50), 1, "asymmetric", "BF16"),
        ("int4-tensor", 4, (9, 50), 0, "symmetric", "BF16"),
        ("int4-tensor-asymmetric", 4, (9, 50), 0, "unpacked", "BF16"),
        ("int4-unpacked-zeros", 4, (9, 64), 2, "unpacked", "BF16"),
        ("int4-act-order", 4, (9, 64), 4, "order", "BF16"),
        ("int4-act-order-asymmetric", 4, (33, 64), 4, "order asymmetric", "BF16"),
        ("int8-one-row", 8, (1, 64), 2, "symmetric", "BF16"),
    ]
    for label, bits, (out, into), groups, kind, scale in cases:
        half = 1 << (bits - 1)
        codes = random.integers(-half, half, (out, into))
        shape = (out, groups) if groups else (1,)
        part, scales = tensor(random.random(shape) * 1e-2 + 1e-4, scale)
        tensors: dict[str, Tensor] = {
            f"{MODULE}.weight_packed": integers(packed(codes + half, bits)),
            f"{MODULE}.weight_scale": part,
            f"{MODULE}.weight_shape": ("I64", (2,), np.array([out, into], "<i8").tobytes()),
        }
        where = np.arange(into) // (into // max(1, groups))
        zeros = np.zeros(shape, int)
        if "order" in kind:
            where = random.permutation(where)
            tensors[f"{MODULE}.weight_g_idx"] = ("I32", (into,), where.astype("<i4").tobytes())
        if "asymmetric" in kind or kind == "unpacked":
            zeros = random.integers(-half, half, shape)
        if "asymmetric" in kind:
            tensors[f"{MODULE}.weight_zero_point"] = integers(packed(zeros.T + half, bits).T)
        elif kind == "unpacked":
            data = zeros.astype("i1").tobytes()
            tensors[f"{MODULE}.weight_zero_point"] = ("I8", shape, data)
        if not groups:
            truth = (codes - zeros) * scales
        else:
            truth = (codes - zeros[:, where]) * scales[:, where]
        yield Sample(
            "compressed_pack",
            label,
            tensors | {"model.norm.weight": ("BF16", (8,), bytes(16))},
            said(bits),
            truth,
            dtype="F16" if scale == "F16" else "BF16",
            scales=(f"{MODULE}.weight_scale",),
            optional=frozenset((f"{MODULE}.weight_zero_point", f"{MODULE}.weight_g_idx")),
        )
