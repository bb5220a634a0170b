"""compressed-tensors' own compressors, for every way in which they pack weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_files import matrix_of, weight_in, written_again

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
)

OUT, INTO = 40, 96
ROUNDED = 2.0**-8
"""Its products are rounded to the scales' dtype, which is bfloat16."""


def compressed(
    kind: str, arguments: dict[str, Any], order: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """Return what the library stores, what it makes of it again, and its configuration."""
    torch.manual_seed(len(arguments) + arguments["num_bits"])
    args = QuantizationArgs(**arguments)
    inputs = QuantizationArgs(num_bits=8, dynamic=True) if kind == "int-quantized" else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    bits, size = args.num_bits, args.group_size
    weight = torch.randn(OUT, INTO, dtype=torch.float32) * 0.05
    state: dict[str, torch.Tensor] = {"weight": weight}
    if args.strategy == "tensor":
        peaks = weight.abs().amax().reshape(1)
    elif args.strategy == "channel":
        peaks = weight.abs().amax(dim=1, keepdim=True)
    else:
        peaks = weight.reshape(OUT, -1, size).abs().amax(dim=2)
    if args.type == "int":
        state["weight_scale"] = (peaks * 2 / (2**bits - 1)).bfloat16()
        if not args.symmetric:
            half = 1 << (bits - 1)
            shape = state["weight_scale"].shape
            state["weight_zero_point"] = torch.randint(-half, half, shape).to(torch.int8)
    elif size == 16:
        whole = 448 * 6 / weight.abs().amax()
        state["weight_global_scale"] = whole.reshape(1)
        state["weight_scale"] = (
            (peaks / 6 * whole).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
        )
    else:
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(peaks)) - 2)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(dict(state), scheme)
    back = compressor.decompress(dict(stored), scheme)["weight"]
    group = {"weights": args.model_dump(mode="json", exclude_none=True), "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": kind}
    return stored, back, config | {"config_groups": {"group_0": group}}


def group(bits: int, size: int = 32, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "group", "group_size": size, **more}


CASES = {
    **{f"pack-{bits}": ("pack-quantized", group(bits)) for bits in range(2, 9)},
    **{
        f"pack-{bits}-asymmetric": ("pack-quantized", group(bits, symmetric=False))
        for bits in range(2, 9)
    },
    "pack-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "pack-channel-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "channel", "symmetric": False},
    ),
    "pack-tensor": ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
    "int-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int-channel-asymmetric": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int-tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "naive-group-asymmetric": ("naive-quantized", group(8, symmetric=False)),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": ("mxfp4-pack-quantized", group(4, type="float", scale_dtype=torch.uint8)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_weight_is_what_the_library_makes_of_it(case: str, tmp_path: Path) -> None:
    stored, truth, config = compressed(*CASES[case])
    tensors = {f"m.{leaf}": part for leaf, part in stored.items()}
    found = matrix_of(weight_in(tmp_path, tensors, config, "m.weight"))
    expected = truth.double().numpy()
    bound = ROUNDED * np.abs(expected).max() if "asymmetric" in case else ROUNDED * np.abs(expected)
    assert found.shape == (OUT, INTO)
    assert (np.abs(found - expected) <= bound + 1e-12).all(), np.abs(found - expected).max()


@pytest.mark.parametrize("case", ["nvfp4", "mxfp4"])
def test_the_library_reads_what_is_written_again(case: str, tmp_path: Path) -> None:
    kind, arguments = CASES[case]
    stored, _, config = compressed(kind, arguments)
    weight = weight_in(
        tmp_path, {f"m.{leaf}": part for leaf, part in stored.items()}, config, "m.weight"
    )
    values = matrix_of(weight) + np.random.default_rng(0).standard_normal((OUT, INTO)) * 0.03
    again = {}
    for role, array in written_again(weight, values).items():
        part = weight.parts[role]
        leaf = part.spec.name.removeprefix("m.")
        again[leaf] = torch.from_numpy(array.copy()).view(stored[leaf].dtype)
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)
    back = compressor.decompress(again, scheme)["weight"].double().numpy()
    error = np.linalg.norm(back - values) / np.linalg.norm(values)
    assert error < 0.13
