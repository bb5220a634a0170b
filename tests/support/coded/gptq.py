"""Samples of GPTQ, packed one code after the other into Python's integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description

WORDS = np.dtype("<u4")


def packed(codes: np.ndarray, bits: int, words: int | None = None) -> np.ndarray:
    """Return rows of codes as rows of words, lowest bits first."""
    rows = []
    for row in codes:
        stream = 0
        for number, code in enumerate(row):
            stream |= int(code) << (bits * number)
        count = words or -(-len(row) * bits // 32)
        rows.append(np.frombuffer(stream.to_bytes(4 * count, "little"), WORDS))
    return np.array(rows, WORDS)


def integers(array: np.ndarray) -> Tensor:
    """Return words as a tensor of I32."""
    return ("I32", array.shape, array.astype(WORDS).tobytes())


def made(
    shape: tuple[int, int],
    bits: int,
    groups: int,
    *,
    version: int = 1,
    index: np.ndarray | None = None,
    scale: str = "F16",
    words: tuple[int, int] | None = None,
    seed: int = 0,
    largest_zero: int | None = None,
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Return the tensors of one module, and its weight."""
    random = np.random.default_rng(seed)
    out, into = shape
    codes = random.integers(0, 1 << bits, shape)
    smallest = 1 if largest_zero is None else 0
    zeros = random.integers(smallest, largest_zero or 1 << bits, (groups, out))
    stored = (zeros - 1) % (1 << bits) if version == 1 else zeros
    part, scales = tensor(random.random((groups, out)) * 1e-2 + 1e-4, scale)
    where = np.arange(into) // -(-into // groups) if index is None else index
    rows, columns = words or (None, None)
    tensors = {
        f"{MODULE}.qweight": integers(packed(codes, bits, rows).T),
        f"{MODULE}.qzeros": integers(packed(stored, bits, columns)),
        f"{MODULE}.scales": part,
    }
    if index is not None:
        tensors[f"{MODULE}.g_idx"] = ("I32", (into,), index.astype("<i4").tobytes())
    truth = (codes - zeros.T[:, where]) * scales.T[:, where]
    return tensors, truth


def said(bits: int, size: int, version: int = 1, **more: Any) -> Description:
    told = {"quant_method": "gptq", "bits": bits, "group_size": size}
    if version == 2:
        told["checkpoint_format"] = "gptq_v2"
    return Description(told | more)


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(1)

    def shuffled(into: int, groups: int) -> np.ndarray:
        return random.permutation(np.arange(into) * groups // into)

    cases: list[tuple[str, dict[str, Any], Description]] = []
    for bits in (2, 3, 4, 8):
        cases += [
            (
                f"{bits}bits-v{version}",
                {"shape": (64, 96), "bits": bits, "groups": 3, "version": version},
                said(bits, 32, version),
            )
            for version in (1, 2)
        ]
        cases.append(
            (
                f"{bits}bits-act-order",
                {"shape": (32, 64), "bits": bits, "groups": 4, "index": shuffled(64, 4)},
                said(bits, 16, desc_act=True),
            )
        )
    # Neither outputs nor inputs fill words, and rules give this module bits of its own.
    cases += [
        (
            "padded",
            {"shape": (50, 43), "bits": 4, "groups": 1, "index": np.zeros(43, int)},
            said(8, -1, desc_act=False, dynamic={"+:.*up.*": {"bits": 4}}),
        ),
        (
            "padded-runs",
            {"shape": (40, 70), "bits": 3, "groups": 3, "words": (9, 6)}
            | {"index": np.arange(70) // 32},
            said(3, 32),
        ),
        ("bfloat16", {"shape": (16, 32), "bits": 4, "groups": 2, "scale": "BF16"}, said(4, 16)),
        ("float32", {"shape": (16, 32), "bits": 8, "groups": 2, "scale": "F32"}, said(8, 16)),
        ("of-auto-round", {"shape": (32, 64), "bits": 4, "groups": 2, "version": 2},
         Description({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"})),
        ("of-auto-round-v1", {"shape": (32, 64), "bits": 4, "groups": 2},
         Description({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"})),
        ("of-auto-round-5bits", {"shape": (32, 64), "bits": 5, "groups": 2, "version": 2},
         Description({"quant_method": "auto-round", "packing_format": "auto_round"})),
        ("unsaid", {"shape": (32, 64), "bits": 4, "groups": 2}, Description()),
        ("zeros-of-0", {"shape": (32, 64), "bits": 4, "groups": 2, "largest_zero": 3}, said(4, 32)),
    ]  # fmt: skip
    for label, arguments, told in cases:
        tensors, truth = made(**arguments)
        index = f"{MODULE}.g_idx"
        is_needed = told.quantization.get("desc_act") is True
        yield Sample(
            "gptq",
            label,
            tensors | {"model.norm.weight": ("BF16", (8,), bytes(16))},
            told,
            truth,
            dtype="F16" if arguments.get("scale", "F16") == "F16" else "BF16",
            scales=(f"{MODULE}.scales",),
            optional=frozenset(() if is_needed else (index,)),
        )
