"""Samples of MLX's modes: all bits, stacks, every dtype of scales."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
DEFAULTS = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Return a stream of bits through each row, the lowest first."""
    digits = codes[..., None] >> np.arange(bits) & 1
    rows = digits.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    return np.packbits(rows, axis=-1, bitorder="little").tobytes()


def e4m3(code: int) -> float:
    sign = -1.0 if code & 128 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    return sign * (
        mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


def sample(
    shape: tuple[int, ...],
    bits: int,
    group: int,
    scale: str = "BF16",
    *,
    mode: str = "affine",
    own: bool = False,
    module: str = MODULE,
) -> Sample:
    random = np.random.default_rng([*shape, bits, group])
    codes = random.integers(0, 1 << bits, shape)
    if mode == "mxfp8":
        codes &= 0xBF  # no NaN
    groups = (*shape[:-1], shape[-1] // group)
    tensors: dict[str, Tensor] = {
        f"{module}.weight": ("U32", (*shape[:-1], shape[-1] * bits // 32), packed(codes, bits))
    }
    if mode == "affine":
        tensors[f"{module}.scales"], factors = tensor(random.standard_normal(groups), scale)
        tensors[f"{module}.biases"], biases = tensor(random.standard_normal(groups), scale)
        truth = codes * np.repeat(factors, group, axis=-1) + np.repeat(biases, group, axis=-1)
        nan = (f"{module}.scales", f"{module}.biases")
    else:
        low, high = (100, 140) if mode != "nvfp4" else (0, 0x7F)
        raw = random.integers(low, high, groups, dtype=np.uint8)
        tensors[f"{module}.scales"] = ("U8", groups, raw.tobytes())
        if mode == "nvfp4":
            factors = np.array([e4m3(int(code)) for code in raw.flat]).reshape(groups)
        else:
            factors = 2.0 ** (raw.astype(int) - 127)
        if mode == "mxfp8":
            values = np.array([e4m3(int(code)) for code in codes.flat]).reshape(shape)
        else:
            values = np.where(codes & 8, -1.0, 1.0) * FP4[codes & 7]
        truth = values * np.repeat(factors, group, axis=-1)
        nan = (f"{module}.scales",)
    settings = {"group_size": group, "bits": bits, "mode": mode}
    said = {"group_size": 64, "bits": 4, module: settings} if own else settings
    label = f"{'x'.join(map(str, shape))}-{mode}-{bits}-{group}-{scale}{'-own' if own else ''}"
    return Sample(
        "mlx",
        label,
        tensors | {"model.norm.weight": ("BF16", (8,), bytes(16))},
        Description(said),
        truth,
        module=module,
        name=f"{module}.weight",
        dtype="F16" if scale == "F16" else "BF16",
        scales=nan,
    )


def samples() -> Iterator[Sample]:
    for bits in (1, 2, 3, 4, 5, 6, 8):
        yield sample((5, 128), bits, 64)
    for scale in ("F32", "F16"):
        yield sample((7, 96), 4, 32, scale)
    yield sample((3, 256), 4, 128)
    yield sample((3, 64), 8, 32, own=True)
    yield sample((2, 5, 64), 3, 32, module="model.layers.0.mlp.switch_mlp.up_proj")
    for mode, (group, bits) in DEFAULTS.items():
        yield sample((5, 96), bits, group, mode=mode)
        yield sample((2, 3, 32), bits, group, mode=mode, own=True)
