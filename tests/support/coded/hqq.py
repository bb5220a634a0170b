"""Samples of HQQ: all bits along both axes, codes declared as floats, groups across rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description

PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return rows packed: the first part of them in the highest bits of a byte or word."""
    slots = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
    height = -(-len(codes) // slots)
    whole = np.zeros((height * slots, codes.shape[1]), np.int64)
    whole[: len(codes)] = codes
    words = sum(
        whole[k * height : (k + 1) * height] << bits * (slots - 1 - k) for k in range(slots)
    )
    return np.asarray(words).astype("<i4" if bits == 3 else "u1")


def scalar(value: int | float, dtype: str) -> Tensor:
    kind = {"I32": "<i4", "F32": "<f4", "U8": "u1"}[dtype]
    return (dtype, (), np.array(value, kind).tobytes())


def word(text: str) -> Tensor:
    return ("U8", (len(text),), text.encode())


def sample(
    shape: tuple[int, int],
    bits: int,
    axis: int,
    group: int,
    *,
    scale: str = "F32",
    storage: str | None = None,
    said: float | None = None,
    is_bare: bool = False,
) -> Sample:
    random = np.random.default_rng([*shape, bits, axis, group])
    count = math.prod(shape)
    grid = (count // group, group) if axis == 1 else (group, count // group)
    codes = random.integers(0, 1 << bits if said is None else round(2**said), grid)
    stored = packed(codes, bits)
    wanted = (len(codes), 1) if axis == 1 else (1, codes.shape[1])
    scales, factors = tensor(random.random(wanted) + 0.01, scale)
    zeros, shifts = tensor(random.random(wanted) * (1 << bits), scale)
    itemsize = {"F16": 2, "BF16": 2, "F32": 4, None: stored.itemsize}[storage]
    dtype = storage or ("I32" if bits == 3 else "U8")
    columns = stored.shape[1] * stored.itemsize // itemsize
    tensors: dict[str, Tensor] = {
        f"{MODULE}.W_q": (dtype, (len(stored), columns), stored.tobytes()),
        f"{MODULE}.scale": scales,
        f"{MODULE}.zero": zeros,
        f"{MODULE}.shape": ("I64", (2,), np.array(shape, "<i8").tobytes()),
        f"{MODULE}.nbits": scalar(said or bits, "I32" if said in (None, 5, 6) else "F32"),
        f"{MODULE}.axis": scalar(axis, "I32"),
    }
    more = {
        "group_size": scalar(group, "I32"),
        "packing": word(PACKINGS[bits]),
        "view_as_float": scalar(storage is not None, "U8"),
        "unpack_view_dtype": word("torch.int32" if bits == 3 else "torch.uint8"),
        "quant_scale": scalar(0, "U8"),
        "quant_zero": scalar(0, "U8"),
        "compute_dtype": word("torch.bfloat16"),
        "encoded_state_dict": scalar(1, "U8"),
        "stores_quant_config": scalar(1, "U8"),
        "channel_wise": scalar(1, "U8"),
        "optimize": scalar(1, "U8"),
        "round_zero": scalar(0, "U8"),
        "offload_meta": scalar(0, "U8"),
    }
    if not is_bare:
        tensors |= {f"{MODULE}.{name}": value for name, value in more.items()}
    return Sample(
        "hqq",
        f"{shape[0]}x{shape[1]}-{said or bits}-{axis}-{group}-{scale}-{dtype}",
        tensors | {"model.norm.weight": ("BF16", (8,), bytes(16))},
        Description({"quant_method": "hqq"}),
        ((codes - shifts) * factors).reshape(shape),
        dtype="F16" if scale == "F16" else "BF16",
        scales=(f"{MODULE}.scale", f"{MODULE}.zero"),
        optional=frozenset(f"{MODULE}.{name}" for name in more),
    )


def samples() -> Iterator[Sample]:
    for bits in (8, 4, 3, 2, 1):
        yield sample((16, 64), bits, 1, 32, is_bare=bits != 4)
        yield sample((16, 64), bits, 0, 16, is_bare=bits != 3)
    yield sample((6, 40), 4, 1, 60, scale="BF16", is_bare=True)  # a row and a half a group
    yield sample((6, 40), 3, 0, 24, scale="F16", is_bare=True)  # strips of ten columns
    yield sample((7, 20), 3, 1, 20, is_bare=True)
    yield sample((16, 64), 4, 1, 64, storage="BF16")
    yield sample((16, 60), 4, 0, 16, storage="F32")
    yield sample((16, 64), 3, 1, 32, storage="F16")
    yield sample((16, 64), 2, 1, 64, said=1.58)
    yield sample((16, 64), 8, 1, 64, said=6)
