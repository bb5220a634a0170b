"""Samples of FP8 with few scales: of a tensor, rows, halves, experts, columns of experts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod

import numpy as np

from coded import MODULE, Sample, Tensor, tensor
from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode

FBGEMM = Description({"quant_method": "fbgemm_fp8"})
EXPERTS = "model.layers.0.feed_forward.experts"
COMFY = "model.diffusion_model.blocks.0.attn"


def codes(
    random: np.random.Generator, shape: tuple[int, ...], dtype: str = "F8_E4M3"
) -> tuple[Tensor, np.ndarray]:
    """Return codes of any sign and size, NaN and infinity left out."""
    largest = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}[dtype]
    raw = random.integers(0, largest, shape, dtype=np.uint8)
    raw |= random.integers(0, 2, shape, dtype=np.uint8) << 7
    return (dtype, shape, raw.tobytes()), decode(raw, dtype, shape)


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(2)
    for shape, scale, leaf, dtype, kind in (
        ((13, 17), (), "weight_scale", "F8_E4M3", "F32"),
        ((13, 17), (), "weight_scale_inv", "F8_E4M3", "F32"),
        ((13, 17), (1,), "weight_scale", "F8_E5M2", "F32"),
        ((13, 17), (1, 1), "weight_scale", "F8_E4M3", "BF16"),
        ((13, 17), (1,), "qscale_weight", "F8_E4M3", "BF16"),
        ((13, 17), (), "scale_weight", "F8_E5M2", "F16"),
        ((200, 70), (200,), "weight_scale", "F8_E4M3", "F32"),
        ((200, 70), (200, 1), "weight_scale", "F8_E4M3", "BF16"),
        ((200, 70), (200, 1), "weight_scale", "F8_E5M2", "F32"),
        ((8, 6, 3, 3), (8, 1, 1, 1), "scale_weight", "F8_E4M3", "F32"),
        ((8, 6, 3, 3), (), "scale_weight", "F8_E4M3", "F32"),
        ((40,), (1,), "weight_scale", "F8_E4M3", "F32"),
    ):
        yield _plain(random, shape, scale, leaf, dtype, kind)
    yield _halves(random)
    yield from _stacks(random)
    yield from _of_comfy(random)


def _plain(
    random: np.random.Generator,
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    leaf: str,
    dtype: str,
    kind: str,
) -> Sample:
    weight, values = codes(random, shape, dtype)
    factor, numbers = tensor(0.001 + random.random(scale) / 100, kind)
    rows = prod(scale)
    spread = numbers.reshape((rows, *[1] * (len(shape) - 1))) if rows > 1 else numbers.item()
    return Sample(
        "fp8_scaled",
        f"{leaf}-{'x'.join(map(str, scale)) or 'scalar'}-{len(shape)}d-{dtype}-{kind}",
        {
            f"{MODULE}.weight": weight,
            f"{MODULE}.{leaf}": factor,
            f"{MODULE}.input_scale": tensor(np.ones(1), "F32")[0],
            f"{MODULE}.bias": tensor(np.ones(3), "BF16")[0],
        },
        Description(),
        values * spread,
        dtype=kind if kind == "F16" else "BF16",
        scales=(f"{MODULE}.{leaf}",),
        optional=frozenset((f"{MODULE}.input_scale",)),
    )


def _halves(random: np.random.Generator) -> Sample:
    module = "model.layers.0.mlp.gate_up_proj"
    weight, values = codes(random, (26, 9))
    factor, numbers = tensor(np.array([0.25, 0.003]), "F32")
    return Sample(
        "fp8_scaled",
        "gate and up in one",
        {f"{module}.weight": weight, f"{module}.weight_scale": factor},
        Description({"quant_method": "modelopt"}),
        values * np.repeat(numbers, 13)[:, None],
        module=module,
        name=f"{module}.weight",
        scales=(f"{module}.weight_scale",),
    )


def _stacks(random: np.random.Generator) -> Iterator[Sample]:
    for name, suffix, shape, scale, said in (
        ("gate_up_proj", "_scale", (3, 5, 8), (3, 1, 8), FBGEMM),
        ("down_proj", "_scale", (3, 4, 5), (3, 5, 1), FBGEMM),
        ("down_proj", "_scale", (3, 5, 5), (3, 5, 1), FBGEMM),
        ("down_proj", "_scale", (3, 5, 5), (3, 1, 5), Description()),
        ("down_proj", "_weight_scale", (3, 4, 5), (3, 4, 1), Description()),
        ("down_proj", "_scale_inv", (3, 4, 5), (3, 4), Description()),
        ("gate_up_proj", "_weight_scale", (3, 4, 6), (), Description()),
        ("gate_up_proj", "_weight_scale", (3, 4, 6), (3,), Description()),
        ("gate_up_proj", "_scale_inv", (3, 4, 6), (3, 1, 1), Description()),
    ):
        whole = f"{EXPERTS}.{name}"
        weight, values = codes(random, shape)
        factor, numbers = tensor(0.001 + random.random(scale) / 100, "F32")
        if scale == (3, 5, 1):
            numbers = numbers.transpose(0, 2, 1)
        elif len(scale) in (1, 2):
            numbers = numbers.reshape((*scale, *[1] * (3 - len(scale))))
        yield Sample(
            "fp8_scaled",
            f"stack{suffix}-{'x'.join(map(str, shape))}-{'x'.join(map(str, scale))}-{said.method}",
            {
                whole: weight,
                f"{whole}{suffix}": factor,
                f"{whole}_input_scale": tensor(np.ones(()), "F32")[0],
            },
            said,
            values * numbers,
            module=whole,
            name=whole,
            scales=(f"{whole}{suffix}",),
            optional=frozenset((f"{whole}_input_scale",)),
        )


def _of_comfy(random: np.random.Generator) -> Iterator[Sample]:
    mark = json.dumps({"format": "float8_e4m3fn"}).encode()
    header = {COMFY.removeprefix("model.diffusion_model."): {"format": "float8_e4m3fn"}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": header})}
    for label, leaf, extra, said in (
        ("old", "scale_weight", {"model.diffusion_model.scaled_fp8": ("F8_E4M3", (0,), b"")}, {}),
        ("tensor", "weight_scale", {f"{COMFY}.comfy_quant": ("U8", (len(mark),), mark)}, {}),
        ("metadata", "weight_scale", {}, metadata),
    ):
        weight, values = codes(random, (16, 12))
        factor, numbers = tensor(np.array(0.0123), "F32")
        yield Sample(
            "fp8_scaled",
            f"comfy-{label}",
            {
                f"{COMFY}.weight": weight,
                f"{COMFY}.{leaf}": factor,
                f"{COMFY}.{'scale_input' if label == 'old' else 'input_scale'}": factor,
                **extra,
            },
            Description(metadata=said),
            values * numbers,
            module=COMFY,
            name=f"{COMFY}.weight",
            scales=(f"{COMFY}.{leaf}",),
            optional=frozenset(
                f"{COMFY}.{leaf}" for leaf in ("scale_input", "input_scale", "comfy_quant")
            ),
        )
