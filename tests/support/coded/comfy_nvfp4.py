"""Samples of ComfyUI's NVFP4, its scales laid out one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from coded import Sample, Tensor, tensor
from loratool.codecs.codec import Description
from loratool.codecs.numbers import decode

MODULE = "model.diffusion_model.double_blocks.0.img_attn.proj"
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
METADATA = "_quantization_metadata"


def tiled(scales: np.ndarray) -> np.ndarray:
    """Return scales where ComfyUI has them, told byte by byte."""
    rows, columns = scales.shape
    wide = -(-columns // 4)
    flat = np.zeros(-(-rows // 128) * wide * 512, np.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * wide + column // 4
            place = (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
            flat[512 * tile + place] = scales[row, column]
    return flat.reshape(-1, 4 * wide)


def marks(kind: str, label: str, module: str = MODULE) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensor, or the metadata, that tells the format of a layer."""
    mark = {"format": kind}
    if label == "tensor":
        data = json.dumps(mark).encode()
        return {f"{module}.comfy_quant": ("U8", (len(data),), data)}, {}
    layer = module if label == "metadata" else module.removeprefix("model.diffusion_model.")
    return {}, {METADATA: json.dumps({"format_version": "1.0", "layers": {layer: mark}})}


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(7)
    for label, (rows, into), out, whole in (
        ("tensor", (16, 32), None, "F32"),
        ("metadata", (144, 80), 141, "F32"),
        ("short names", (256, 128), None, "BF16"),
    ):
        codes = random.integers(0, 16, (rows, into), dtype=np.uint8)
        kept = rows if out is None else out
        codes[kept:] = 0
        scale = random.integers(0, 0x7F, (rows, into // 16), dtype=np.uint8)
        scale[kept:] = 0
        factor, number = tensor(np.array(0.0031), whole)
        signs = np.where(codes & 8, -1.0, 1.0)
        values = signs * np.array(MAGNITUDES)[codes & 7]
        spread = np.repeat(decode(scale, "F8_E4M3", scale.shape), 16, axis=1)
        packed = codes[:, 0::2] << 4 | codes[:, 1::2]
        stored = tiled(scale)
        extra, metadata = marks("nvfp4", label)
        bias = {} if out is None else {f"{MODULE}.bias": tensor(np.ones(out), "BF16")[0]}
        yield Sample(
            "comfy_nvfp4",
            f"{label}-{rows}x{into}",
            {
                f"{MODULE}.weight": ("U8", packed.shape, packed.tobytes()),
                f"{MODULE}.weight_scale": ("F8_E4M3", stored.shape, stored.tobytes()),
                f"{MODULE}.weight_scale_2": factor,
                f"{MODULE}.input_scale": tensor(np.ones(()), "F32")[0],
                **bias,
                **extra,
            },
            Description(metadata=metadata),
            (values * spread * number)[:kept],
            module=MODULE,
            name=f"{MODULE}.weight",
            scales=(f"{MODULE}.weight_scale", f"{MODULE}.weight_scale_2"),
            optional=frozenset((f"{MODULE}.input_scale",)),
        )
