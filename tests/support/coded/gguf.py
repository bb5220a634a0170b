"""Samples of all block types of GGUF: random blocks, each weight by its formula, one by one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np

from coded import Sample
from loratool.codecs.codec import Description
from loratool.files.dtypes import DTYPES

NAME = "blk.0.ffn_up"
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALES = {  # where a block has float16 numbers
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS"), (0,)),
    **dict.fromkeys(("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def nibble(block: bytes, at: int, i: int, count: int = 16) -> int:
    """Of ``count`` bytes the low nibbles first, then the high ones."""
    return block[at + i % count] >> 4 * (i // count) & 15


def bit(block: bytes, at: int, i: int) -> int:
    return block[at + i // 8] >> i % 8 & 1


def fp4(code: int) -> float:
    return -FP4[code & 7] if code & 8 else FP4[code]


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte == 0x7F:
        return 0.0
    return mantissa * 2.0**-9 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def q8_k(block: bytes, i: int) -> float:
    return struct.unpack_from("<f", block)[0] * struct.unpack_from("<b", block, 4 + i)[0]


def q2_k(block: bytes, i: int) -> float:
    code = block[16 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    pair = block[i // 16]
    return half(block, 80) * (pair & 15) * code - half(block, 82) * (pair >> 4)


def q3_k(block: bytes, i: int) -> float:
    low = block[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    high = block[i % 32] >> i // 32 & 1
    n = i // 16
    six = (block[96 + n % 8] >> 4 * (n // 8) & 15) | (block[104 + n % 4] >> 2 * (n // 4) & 3) << 4
    return half(block, 108) * (six - 32) * (low - 4 * (1 - high))


def six_bits(block: bytes, n: int) -> tuple[int, int]:
    s = block[4:16]
    if n < 4:
        return s[n] & 63, s[n + 4] & 63
    return s[n + 4] & 15 | s[n - 4] >> 6 << 4, s[n + 4] >> 4 | s[n] >> 6 << 4


def k_with_minimum(block: bytes, i: int, at: int, high: int) -> float:
    code = (block[at + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15) + 16 * high
    scale, minimum = six_bits(block, i // 32)
    return half(block, 0) * scale * code - half(block, 2) * minimum


def q6_k(block: bytes, i: int) -> float:
    part, j = divmod(i, 128)
    low = block[64 * part + j % 64] >> 4 * (j // 64) & 15
    high = block[128 + 32 * part + j % 32] >> 2 * (j // 32) & 3
    scale = struct.unpack_from("<b", block, 192 + i // 16)[0]
    return half(block, 208) * scale * (low + 16 * high - 32)


def iq4_xs(block: bytes, i: int) -> float:
    n = i // 32
    high = struct.unpack_from("<H", block, 2)[0] >> 2 * n & 3
    six = (block[4 + n // 2] >> 4 * (n % 2) & 15) | high << 4
    return half(block, 0) * (six - 32) * UNEVEN[nibble(block, 8 + 16 * n, i % 32)]


def nvfp4(block: bytes, i: int) -> float:
    return e4m3(block[i // 16]) * fp4(nibble(block, 4 + 8 * (i // 16), i % 16, 8))


FORMULAS: dict[str, Callable[[bytes, int], float]] = {
    "Q4_0": lambda b, i: half(b, 0) * (nibble(b, 2, i) - 8),
    "Q4_1": lambda b, i: half(b, 0) * nibble(b, 4, i) + half(b, 2),
    "Q5_0": lambda b, i: half(b, 0) * (nibble(b, 6, i) + 16 * bit(b, 2, i) - 16),
    "Q5_1": lambda b, i: half(b, 0) * (nibble(b, 8, i) + 16 * bit(b, 4, i)) + half(b, 2),
    "Q8_0": lambda b, i: half(b, 0) * struct.unpack_from("<b", b, 2 + i)[0],
    "Q8_K": q8_k,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": lambda b, i: k_with_minimum(b, i, 16, 0),
    "Q5_K": lambda b, i: k_with_minimum(b, i, 48, b[16 + i % 32] >> i // 32 & 1),
    "Q6_K": q6_k,
    "IQ4_NL": lambda b, i: half(b, 0) * UNEVEN[nibble(b, 2, i)],
    "IQ4_XS": iq4_xs,
    "MXFP4": lambda b, i: 2.0 ** (b[0] - 127) * fp4(nibble(b, 1, i)),
    "NVFP4": nvfp4,
}


def blocks(dtype: str, rows: int, per_row: int, seed: int = 0) -> np.ndarray:
    """Return random blocks with scales that weights may have, ``(rows, bytes)``."""
    random = np.random.default_rng([seed, *dtype.encode()])
    _, size = DTYPES[dtype].block or (0, 0)
    raw = random.integers(0, 256, (rows * per_row, size), dtype=np.uint8)
    for at in SCALES.get(dtype, ()):
        values = random.standard_normal(len(raw)).astype("<f2") * np.float16(0.02)
        raw[:, at : at + 2] = values[:, None].view(np.uint8)
    if dtype == "Q8_K":
        raw[:, :4] = random.standard_normal(len(raw)).astype("<f4")[:, None].view(np.uint8)
    if dtype == "MXFP4":
        raw[:, 0] = random.integers(110, 130, len(raw))
        raw[0, 0] = 0
    if dtype == "NVFP4":
        raw[:, :4] &= 0x7F
        raw[0, :2] = (0x7F, 0)
    return raw.reshape(rows, -1)


def truth(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Return what rows of blocks stand for, in float64."""
    elements, size = DTYPES[dtype].block or (0, 0)
    formula = FORMULAS[dtype]
    found = [
        [formula(bytes(block), i) for block in row.reshape(-1, size) for i in range(elements)]
        for row in raw
    ]
    return np.array(found)


def samples() -> Iterator[Sample]:
    other = {"blk.0.ffn_norm.weight": ("F32", (8,), bytes(32))}
    for dtype in FORMULAS:
        raw = blocks(dtype, 5, 2)
        values = truth(raw, dtype)
        yield sample(dtype, dtype, {**other, f"{NAME}.weight": (dtype, values.shape, raw)}, values)
    # A stack of experts, one scale for each of them, and a kernel whose shape GGUF does not have.
    raw = blocks("Q4_0", 6, 2)
    values = truth(raw, "Q4_0").reshape(3, 2, 64)
    yield sample("Q4_0", "stack", {f"{NAME}.weight": ("Q4_0", values.shape, raw)}, values)
    for count in (1, 3):
        raw = blocks("NVFP4", 6, 1)
        scales = np.linspace(0.25, 0.75, count).astype("<f4")
        values = truth(raw, "NVFP4").reshape(3, 2, 64) * scales.astype("f8")[:, None, None]
        tensors = {
            f"{NAME}.input_scale": ("F32", (1,), np.ones(1, "<f4")),
            f"{NAME}.scale": ("F32", (count,), scales),
            f"{NAME}.weight": ("NVFP4", values.shape, raw),
        }
        yield sample("NVFP4", f"scale-{count}", tensors, values, scales=(f"{NAME}.scale",))
    raw = blocks("Q8_0", 9, 1)
    values = truth(raw, "Q8_0").reshape(2, 4, 2, 2, 9)
    key = f"comfy.gguf.orig_shape.{NAME}.weight"
    said = Description(metadata={key: "[2, 4, 2, 2, 9]"})
    yield sample("Q8_0", "kernel", {f"{NAME}.weight": ("Q8_0", (9, 32), raw)}, values, said=said)


def sample(
    dtype: str,
    label: str,
    tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray | bytes]],
    values: np.ndarray,
    *,
    scales: tuple[str, ...] = (),
    said: Description | None = None,
) -> Sample:
    raw = {name: (kind, shape, bytes(data)) for name, (kind, shape, data) in tensors.items()}
    return Sample(
        "gguf",
        f"{dtype}-{label}",
        raw,
        said or Description(),
        values,
        module=NAME,
        name=f"{NAME}.weight",
        dtype="F16",
        scales=scales,
        optional=frozenset((f"{NAME}.scale", f"{NAME}.input_scale")),
    )
