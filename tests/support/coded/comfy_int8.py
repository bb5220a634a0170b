"""Samples of ComfyUI's whole numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coded import Sample, tensor
from coded.comfy_nvfp4 import MODULE, marks
from loratool.codecs.codec import Description


def samples() -> Iterator[Sample]:
    random = np.random.default_rng(9)
    for label, shape, scale in (
        ("tensor", (13, 17), ()),
        ("metadata", (13, 17), (13, 1)),
        ("short names", (13, 17), (13,)),
        ("tensor", (3, 5, 7), (3, 5)),
    ):
        codes = random.integers(-128, 128, shape, dtype=np.int8)
        factor, numbers = tensor(0.001 + random.random(scale) / 100, "F32")
        spread = numbers.reshape((*shape[:-1], 1)) if scale else numbers
        extra, metadata = marks("int8_tensorwise", label)
        yield Sample(
            "comfy_int8",
            f"{label}-{len(shape)}d-{len(scale)}d",
            {
                f"{MODULE}.weight": ("I8", shape, codes.tobytes()),
                f"{MODULE}.weight_scale": factor,
                **extra,
            },
            Description(metadata=metadata),
            codes * spread,
            module=MODULE,
            name=f"{MODULE}.weight",
            scales=(f"{MODULE}.weight_scale",),
            # Those that nothing is said of are compressed-tensors', with the same numbers.
            optional=frozenset((f"{MODULE}.comfy_quant",)),
        )
