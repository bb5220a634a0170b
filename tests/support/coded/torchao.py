"""Samples of torchao's plain classes: rows, blocks and whole weights, stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode


def sample(
    kind: str,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    *,
    codes: str = "I8",
    scale: str = "F32",
    dtype: str = "bfloat16",
    shift: str | None = None,
    module: str = MODULE,
    parameter: str = "weight",
) -> Sample:
    random = np.random.default_rng([*shape, *grid])
    raw = random.integers(0, 120, shape, dtype=np.uint8)
    raw |= random.integers(0, 2, shape, dtype=np.uint8) << 7
    values = raw.view(np.int8).astype(float) if codes == "I8" else decode(raw, codes, shape)
    stem = f"{module}._{parameter}_"
    tensors: dict[str, Tensor] = {f"{stem}qdata": (codes, shape, raw.tobytes())}
    tensors[f"{stem}scale"], factors = tensor(random.random(grid), scale)
    names = ["qdata", "scale"]
    if shift is not None:
        width = {"I8": "i1", "I32": "<i4"}[shift]
        zeros = random.integers(-8, 8, grid)
        tensors[f"{stem}zero_point"] = (shift, grid, zeros.astype(width).tobytes())
        names.insert(0, "zero_point")
        values = values - spread(zeros, shape)
    told = {
        "_type": kind,
        "_data": {"block_size": [1], "dtype": {"_type": "torch.dtype", "_data": dtype}},
        "_tensor_data_names": names,
    }
    plain = json.dumps({"_type": "Tensor"})
    name = f"{module}.{parameter}"
    listed = json.dumps([name, "model.norm.weight"])
    return Sample(
        "torchao",
        f"{kind}-{'x'.join(map(str, shape))}-{'x'.join(map(str, grid))}-{codes}-{scale}",
        tensors | {"model.norm.weight": ("BF16", (8,), bytes(16))},
        Description(
            {"quant_method": "torchao"},
            metadata={name: json.dumps(told), "model.norm.weight": plain, "tensor_names": listed},
        ),
        values * spread(factors, shape),
        module=name.removesuffix(".weight"),
        name=name,
        dtype={"float16": "F16"}.get(dtype, "BF16"),
        scales=(f"{stem}scale",),
    )


def spread(grid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    wide = grid.reshape(grid.shape or (1,) * len(shape)).astype(float)
    if wide.size == 1:
        return wide.reshape((1,) * len(shape))
    for axis, size in enumerate(shape):
        wide = np.repeat(wide, size // wide.shape[axis], axis=axis)
    return wide


def samples() -> Iterator[Sample]:
    yield sample("Float8Tensor", (9, 14), (9, 1), codes="F8_E4M3")
    yield sample("Float8Tensor", (9, 14), (1, 1), codes="F8_E5M2", dtype="float16")
    yield sample("Float8Tensor", (8, 16), (), codes="F8_E4M3", scale="BF16")
    yield sample("Float8Tensor", (8, 12), (4, 3), codes="F8_E4M3")
    yield sample("Float8Tensor", (9, 14), (1, 14), codes="F8_E4M3")
    yield sample(
        "Float8Tensor",
        (3, 4, 6),
        (3, 2, 1),
        codes="F8_E4M3",
        module="model.layers.0.mlp.experts",
        parameter="down_proj",
    )
    yield sample("Int8Tensor", (9, 15), (9, 1), shift="I8")
    yield sample("Int8Tensor", (9, 64), (9, 2), scale="BF16")
    yield sample("IntxUnpackedToInt8Tensor", (9, 64), (9, 2), scale="BF16", shift="I8")
    yield sample("IntxUnpackedToInt8Tensor", (5, 6), (5, 1), scale="F16", shift="I32")
