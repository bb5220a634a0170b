"""Samples of FP8 with a scale for each block, ragged edges included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import MODULE, Sample
from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode

EXPERTS = "model.layers.0.mlp.experts"
NORM = {"model.norm.weight": ("BF16", (8,), bytes(16))}


def fp8(block: tuple[int, int]) -> Description:
    return Description({"quant_method": "fp8", "weight_block_size": list(block)})


def structured(block: object) -> Description:
    groups = {"group_0": {"weights": {"block_structure": block}}, "group_1": {"weights": None}}
    return Description({"quant_method": "compressed-tensors", "config_groups": groups})


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for shape, block, scale in (
        ((256, 384), (128, 128), "F32"),
        ((200, 150), (128, 128), "F32"),
        ((200, 150), (128, 128), "BF16"),
        ((37, 50), (16, 8), "F8_E8M0"),
        ((37, 50), (16, 8), "U8"),
        ((3, 5), (128, 128), "F32"),
    ):
        yield _sample(random, shape, block, scale, fp8(block))
    for label, block, leaf, said in (
        ("deepseek", (128, 128), "scale", Description({"quant_method": "fp8"})),
        ("ct", (64, 32), "weight_scale", structured("64x32")),
        ("ct-list", (64, 32), "weight_scale", structured([64, 32])),
        ("modelopt", (128, 128), "weight_scale", Description({"quant_method": "modelopt"})),
    ):
        yield _sample(random, (200, 150), block, "F32", said, label, leaf=leaf)
    yield _sample(random, (9, 96), (1, 32), "U8", fp8((128, 128)), "micro")
    yield _sample(random, (9, 96), (1, 32), "F8_E8M0", fp8((128, 128)), "micro", leaf="scale")
    for name, suffix, shape, block, scale in (
        ("down_proj", "_scale_inv", (3, 40, 50), (16, 8), "F32"),
        ("down_proj", "_weight_scale", (3, 32, 50), (16, 8), "F32"),
        ("down_proj", "_scale_inv", (2, 5, 96), (1, 32), "F8_E8M0"),
        ("gate_up_proj", "_scale_inv", (2, 64, 50), (16, 8), "F32"),
    ):
        whole = f"{EXPERTS}.{name}"
        yield _sample(random, shape, block, scale, fp8(block), name, whole=whole, suffix=suffix)
    yield _gate_up(random, (2, 36, 20), (16, 8), 2)  # two blocks for each half of 18 rows
    yield _gate_up(random, (2, 12, 20), None, 1)


def _sample(
    random: np.random.Generator,
    shape: tuple[int, ...],
    block: tuple[int, int],
    scale: str,
    said: Description,
    label: str = "",
    *,
    leaf: str = "weight_scale_inv",
    whole: str | None = None,
    suffix: str = "",
) -> Sample:
    *first, out, into = shape
    grid = (*first, -(-out // block[0]), -(-into // block[1]))
    codes, values = _codes(random, shape)
    raw, numbers = _scales(random, grid, scale)
    spread = np.repeat(np.repeat(numbers, block[0], axis=-2), block[1], axis=-1)
    module = MODULE if whole is None else whole
    names = (
        (f"{module}.weight", f"{module}.{leaf}") if whole is None else (module, f"{module}{suffix}")
    )
    stored = (grid[0], 1, grid[1], 1) if label == "modelopt" else grid
    return Sample(
        "fp8_block",
        f"{label}{'-' * bool(label)}{'x'.join(map(str, shape))}-{scale}{suffix}",
        {
            names[0]: ("F8_E4M3", shape, codes.tobytes()),
            names[1]: (scale, stored, raw.tobytes()),
            **NORM,
        },
        said,
        values * spread[..., :out, :into],
        module=module,
        name=names[0],
        scales=(names[1],),
    )


def _gate_up(
    random: np.random.Generator,
    shape: tuple[int, int, int],
    block: tuple[int, int] | None,
    count: int,
) -> Sample:
    """Return a stack whose halves were quantised by themselves, and then joined."""
    experts, rows, into = shape
    half = rows // 2
    height, breadth = block or (half, into)
    grid = (experts, 2, count, -(-into // breadth))
    codes, values = _codes(random, shape)
    raw, numbers = _scales(random, grid, "F32")
    spread = np.repeat(np.repeat(numbers, height, axis=2), breadth, axis=3)[:, :, :half, :into]
    name = f"{EXPERTS}.gate_up_proj"
    return Sample(
        "fp8_block",
        f"halves-{'x'.join(map(str, shape))}-{count}",
        {
            name: ("F8_E4M3", shape, codes.tobytes()),
            f"{name}_scale_inv": ("F32", (experts, 2 * count, grid[3]), raw.tobytes()),
            **NORM,
        },
        fp8(block) if block else Description({"quant_method": "fp8"}),
        values * spread.reshape(shape),
        module=name,
        name=name,
        scales=(f"{name}_scale_inv",),
    )


def _codes(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    codes = random.integers(0, 0x7F, shape, dtype=np.uint8)
    codes |= random.integers(0, 2, shape, dtype=np.uint8) << 7
    return codes, decode(codes, "F8_E4M3", shape)


def _scales(
    random: np.random.Generator, grid: tuple[int, ...], scale: str
) -> tuple[np.ndarray, np.ndarray]:
    kind = "F8_E8M0" if scale == "U8" else scale
    numbers = random.integers(100, 130, grid) if kind == "F8_E8M0" else random.random(grid)
    raw = numbers.astype("u1") if kind == "F8_E8M0" else (numbers * 1e-3).astype("<f4")
    if scale == "BF16":
        raw = (raw.view("<u4") >> 16).astype("<u2")
    return raw, decode(raw, kind, grid)
