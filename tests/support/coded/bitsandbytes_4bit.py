"""Samples of NF4 and FP4: blocks across rows, odd rows, nested scales, every storage."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description

NAME = f"{MODULE}.weight"
NF4 = (
    *(-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
)
FP4 = (0.0, 0.00520833, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
MAPS = {"nf4": NF4, "fp4": (*FP4, *(-x for x in FP4))}


def packed(codes: np.ndarray, size: int) -> bytes:
    """Return codes in bytes, the first in the high bits, filled up to elements of some bytes."""
    flat = codes.reshape(-1)
    flat = np.concatenate([flat, np.zeros(-flat.size % (2 * size), flat.dtype)])
    return (flat[::2] << 4 | flat[1::2]).astype("u1").tobytes()


def sample(
    shape: tuple[int, ...],
    kind: str = "nf4",
    blocksize: int = 64,
    *,
    nested: int = 0,
    storage: str = "U8",
    dtype: str = "bfloat16",
    name: str = NAME,
    scale: str = "F32",
) -> Sample:
    random = np.random.default_rng([*shape, blocksize, nested])
    count = math.prod(shape)
    blocks = -(-count // blocksize)
    codes = random.integers(0, 16, count)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    size = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}[storage]
    data = packed(codes, size)
    tensors: dict[str, Tensor] = {name: (storage, (len(data) // size, 1), data)}
    tensors[f"{name}.quant_map"], values = tensor(np.array(MAPS[kind]), "F32")
    scales = [f"{name}.quant_map"]
    if nested:
        small = random.integers(0, 256, blocks, dtype=np.uint8)
        tensors[f"{name}.absmax"] = ("U8", (blocks,), small.tobytes())
        of_nested, table = tensor(np.linspace(-1, 1, 256) ** 3, "F32")
        outer, factors = tensor(random.random(-(-blocks // nested)), "F32")
        tensors[f"{name}.nested_quant_map"] = of_nested
        tensors[f"{name}.nested_absmax"] = outer
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 1.375}
        absmax = np.array(
            [table[code] * factors[n // nested] + 1.375 for n, code in enumerate(small)]
        )
        scales += [f"{name}.nested_quant_map", f"{name}.nested_absmax"]
    else:
        tensors[f"{name}.absmax"], absmax = tensor(random.random(blocks), scale)
        scales.append(f"{name}.absmax")
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = ("U8", (len(text),), text)
    truth = np.array([values[code] * absmax[n // blocksize] for n, code in enumerate(codes)])
    label = "x".join(map(str, shape))
    return Sample(
        "bitsandbytes_4bit",
        f"{label}-{kind}-{blocksize}-{nested}-{storage}-{dtype}-{scale}",
        tensors | {"model.norm.weight": ("BF16", (8,), bytes(16))},
        Description({"quant_method": "bitsandbytes", "load_in_4bit": True}),
        truth.reshape(shape),
        module=name.removesuffix(".weight"),
        name=name,
        dtype={"float16": "F16"}.get(dtype, "BF16"),
        scales=tuple(scales),
    )


def samples() -> Iterator[Sample]:
    yield sample((64, 128))
    yield sample((64, 128), nested=256)
    yield sample((48, 32), "fp4", nested=16)  # two rows a block
    yield sample((32, 96), nested=4, dtype="float16")  # a row and a half a block
    yield sample((33, 31), "fp4", dtype="float32")  # rows begin within a byte
    yield sample((33, 31), blocksize=7, nested=5)
    yield sample((5, 4), blocksize=4096)
    for storage in ("BF16", "F16", "F32"):
        yield sample((33, 32), storage=storage)
        yield sample((33, 31), storage=storage, nested=3)
    yield sample((3, 8, 20), nested=2, name="model.layers.0.mlp.experts.down_proj")
    yield sample((6, 10), scale="F16", blocksize=16)
    yield sample((7,), blocksize=2)
