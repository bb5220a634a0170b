"""Samples of Quanto: 8 bits, whole and float, and 4 and 2 bits in groups with a shift."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode

NAME = f"{MODULE}.weight"
ORDINARY = {
    "model.norm.weight": ("BF16", (8,), bytes(16)),
    f"{MODULE}.input_scale": ("F32", (), bytes(4)),
}


def of_bytes(shape: tuple[int, ...], dtype: str, scale: str, wanted: tuple[int, ...]) -> Sample:
    random = np.random.default_rng(shape)
    codes = random.integers(0, 120, shape, dtype=np.uint8)
    codes |= random.integers(0, 2, shape, dtype=np.uint8) << 7
    values = codes.view(np.int8) if dtype == "I8" else decode(codes, dtype, shape)
    stored, factors = tensor(random.random(wanted), scale)
    factors = factors.reshape(-1, *(1 for _ in shape[1:]))
    return Sample(
        "quanto",
        f"{'x'.join(map(str, shape))}-{dtype}-{scale}",
        {f"{NAME}._data": (dtype, shape, codes.tobytes()), f"{NAME}._scale": stored, **ORDINARY},
        Description({"quant_method": "quanto"}),
        values * factors,
        dtype="F16" if scale == "F16" else "BF16",
        scales=(f"{NAME}._scale",),
    )


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return rows packed, the first ones in the low bits."""
    slots = 8 // bits
    height = -(-len(codes) // slots)
    whole = np.zeros((height * slots, codes.shape[1]), np.uint8)
    whole[: len(codes)] = codes
    found = np.zeros((height, codes.shape[1]), np.uint8)
    for slot in range(slots):
        found |= whole[slot * height : (slot + 1) * height] << bits * slot
    return found


def in_groups(
    shape: tuple[int, int], bits: int, group: int, scale: str, shift: str, *, has_bias: bool = True
) -> Sample:
    random = np.random.default_rng([*shape, bits])
    groups = shape[0] * shape[1] // group
    codes = random.integers(0, 1 << bits, (groups, group), dtype=np.uint8)
    data = packed(codes, bits)
    scales, factors = tensor(random.random((groups, 1)) + 0.1, scale)
    if shift in ("I8", "U8"):
        zeros = random.integers(0, 1 << bits, (groups, 1), dtype=np.uint8)
        shifts: Tensor = (shift, (groups, 1), zeros.tobytes())
        truth = (codes.astype(float) - zeros) * factors
    else:
        shifts, numbers = tensor(random.random((groups, 1)) + 0.05, shift)
        truth = codes * factors - numbers
    tensors: dict[str, Tensor] = {
        f"{NAME}._data._data": ("U8", data.shape, data.tobytes()),
        f"{NAME}._scale": scales,
        f"{NAME}._shift": shifts,
    }
    if has_bias:
        tensors[f"{MODULE}.bias"] = ("BF16", (shape[0],), bytes(2 * shape[0]))
    nan = (f"{NAME}._scale",) if shift in ("I8", "U8") else (f"{NAME}._scale", f"{NAME}._shift")
    return Sample(
        "quanto",
        f"{shape[0]}x{shape[1]}-{bits}-{group}-{scale}-{shift}",
        tensors | ORDINARY,
        Description({"quant_method": "quanto"}),
        truth.reshape(shape),
        dtype="F16" if scale == "F16" else "BF16",
        scales=nan,
    )


def samples() -> Iterator[Sample]:
    yield of_bytes((9, 14), "I8", "BF16", (9, 1))
    yield of_bytes((9, 15), "F8_E4M3", "F32", (9, 1))
    yield of_bytes((9, 16), "F8_E5M2", "F16", ())
    yield of_bytes((4, 3, 2, 2), "I8", "F32", (4, 1, 1, 1))
    yield in_groups((6, 256), 4, 128, "BF16", "BF16")
    yield in_groups((5, 96), 4, 96, "BF16", "I8")
    yield in_groups((5, 192), 2, 96, "F16", "U8")
    yield in_groups((3, 64), 2, 32, "F16", "F16")
    yield in_groups((7, 20), 4, 20, "BF16", "BF16", has_bias=False)
