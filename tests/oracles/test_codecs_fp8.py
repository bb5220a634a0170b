"""FP8 as transformers, fbgemm's layout and compressed-tensors read and write it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coded_files import matrix_of, weight_in, written_again

transformers = pytest.importorskip("transformers")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

BLOCK = (16, 8)


def quantised(shape: tuple[int, ...], scale_fmt: str = "float") -> dict[str, torch.Tensor]:
    """Return what transformers stores of random numbers, by ``weight`` and ``weight_scale_inv``."""
    torch.manual_seed(sum(shape))
    config = SimpleNamespace(weight_block_size=BLOCK, scale_fmt=scale_fmt)
    made = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    return made.convert({"m.weight": torch.randn(shape) * 0.05})


def given_back(weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    made = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    return made.double().numpy()


CONFIG = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("shape", [(48, 40), (16, 8)])
def test_blocks_are_what_transformers_makes_of_them(
    shape: tuple[int, int], scale_fmt: str, tmp_path: Path
) -> None:
    stored = quantised(shape, scale_fmt)
    truth = given_back(stored["m.weight"], stored["m.weight_scale_inv"])
    found = matrix_of(weight_in(tmp_path, stored, CONFIG, "m.weight"))
    np.testing.assert_allclose(found, truth, rtol=2.0**-23, atol=0)


def test_scales_of_32_numbers_beside_larger_blocks(tmp_path: Path) -> None:
    """Their bytes are exponents."""
    codes = torch.randn(24, 96).to(torch.float8_e4m3fn)
    scale = torch.randint(100, 130, (24, 3), dtype=torch.uint8)
    stored = {"m.weight": codes, "m.weight_scale_inv": scale}
    config = CONFIG | {"weight_block_size": [128, 128]}
    found = matrix_of(weight_in(tmp_path, stored, config, "m.weight"))
    assert np.array_equal(found, given_back(codes, scale))


@pytest.mark.parametrize("shape", [(24, 96), (3, 8, 64)])
def test_fp4_in_bytes_is_what_transformers_makes_of_it(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    *first, into = shape
    codes = torch.randint(-128, 128, (*first, into // 2), dtype=torch.int8)
    powers = torch.randint(100, 130, (*first, into // 32), dtype=torch.uint8)
    scale = powers.view(torch.float8_e8m0fnu)
    name = "experts.down_proj"
    names = ("m.weight", "m.scale") if len(shape) == 2 else (name, f"{name}_scale_inv")
    stored = dict(zip(names, (codes, scale), strict=True))
    found = matrix_of(weight_in(tmp_path, stored, CONFIG, names[0]))
    assert np.array_equal(found, given_back(codes, scale))


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_stacks_are_what_transformers_makes_of_them(
    name: str, scale_fmt: str, tmp_path: Path
) -> None:
    made = quantised((3, 32, 24), scale_fmt)
    parameter = f"model.layers.0.mlp.experts.{name}"
    stored = {
        parameter: made["m.weight"],
        f"{parameter}_scale_inv": made["m.weight_scale_inv"],
    }
    found = matrix_of(weight_in(tmp_path, stored, CONFIG, parameter))
    truth = given_back(made["m.weight"], made["m.weight_scale_inv"])
    np.testing.assert_allclose(found, truth, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_what_is_written_again_is_what_transformers_writes(scale_fmt: str, tmp_path: Path) -> None:
    """But for its scales, which it divides twice, by one unit in the last place."""
    stored = quantised((48, 40), scale_fmt)
    weight = weight_in(tmp_path, stored, CONFIG, "m.weight")
    values = np.random.default_rng(0).standard_normal((48, 40)).astype(np.float32) * 0.05
    again = written_again(weight, values)
    config = SimpleNamespace(weight_block_size=BLOCK, scale_fmt=scale_fmt)
    made = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    theirs = made.convert({"m.weight": torch.from_numpy(values)})
    scales = theirs["m.weight_scale_inv"]
    if scale_fmt == "ue8m0":
        assert np.array_equal(again["scale"], scales.view(torch.uint8).numpy())
    else:
        np.testing.assert_allclose(again["scale"], scales.numpy(), rtol=2.0**-22)
    codes = theirs["m.weight"].view(torch.uint8).numpy()
    assert (again["weight"] != codes).mean() <= (0 if scale_fmt == "ue8m0" else 0.001)
    back = given_back(
        torch.from_numpy(again["weight"]).view(torch.float8_e4m3fn),
        torch.from_numpy(again["scale"]).view(scales.dtype),
    )
    assert np.linalg.norm(back - values) < 0.027 * np.linalg.norm(values)


def per_row(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what fbgemm's kernel does, which needs a GPU: a scale for each row."""
    scale = value.abs().amax(dim=-1) / 448
    return (value / scale[..., None]).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("hidden", [12, 20])  # the latter makes down_proj square
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_of_llama_4_are_turned_as_in_fbgemm_fp8(
    name: str, hidden: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import Llama4TextConfig, integrations
    from transformers.integrations import fbgemm_fp8

    monkeypatch.setattr(fbgemm_fp8, "quantize_fp8_per_row", per_row, raising=False)
    config = Llama4TextConfig(hidden_size=hidden, intermediate_size=20, num_local_experts=3)
    model = torch.nn.Module()
    model.experts = integrations.FbgemmFp8Llama4TextExperts(config)
    shape = getattr(model.experts, name).shape
    weight = torch.randn(shape) * torch.rand(shape[0], 1, shape[2]).exp() * 0.05
    key = f"experts.{name}"
    convert = fbgemm_fp8.FbgemmFp8Quantize(None).convert
    stored = {k: v.data for k, v in convert({key: [weight]}, model).items()}
    found = weight_in(tmp_path, stored, {"quant_method": "fbgemm_fp8"}, key)
    assert found.spec.shape == shape
    error = np.abs(matrix_of(found) - weight.double().numpy())
    assert (error <= weight.abs().double().numpy() / 16 + 1e-5).all()


def test_linear_layers_of_fbgemm_fp8(tmp_path: Path) -> None:
    weight = torch.randn(24, 16)
    codes, scale = per_row(weight)
    stored = {"m.weight": codes, "m.weight_scale": scale[:, None]}
    found = matrix_of(weight_in(tmp_path, stored, {"quant_method": "fbgemm_fp8"}, "m.weight"))
    assert np.array_equal(found, codes.double().numpy() * scale[:, None].double().numpy())


CASES: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "block": {"strategy": "block", "block_structure": [16, 8]},
}


@pytest.mark.parametrize("case", list(CASES))
def test_compressed_tensors_in_fp8(case: str, tmp_path: Path) -> None:
    """Its products are rounded to the scales' dtype, which is float32 here."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", **CASES[case])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    torch.manual_seed(1)
    weight = torch.randn(48, 40) * 0.05
    if case == "block":
        peaks = weight.abs().reshape(3, 16, 5, 8).amax(dim=(1, 3))
    else:
        peaks = weight.abs().amax(dim=1, keepdim=True) if case == "channel" else weight.abs().max()
    state = {"weight": weight, "weight_scale": (peaks / 448).reshape(peaks.shape or (1,))}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    stored = compressor.compress(dict(state), scheme)
    truth = compressor.decompress(dict(stored), scheme)["weight"].double().numpy()
    groups = {"weights": args.model_dump(mode="json", exclude_none=True), "targets": ["Linear"]}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": groups},
    }
    tensors = {f"m.{leaf}": part for leaf, part in stored.items()}
    coded = weight_in(tmp_path, tensors, config, "m.weight")
    np.testing.assert_allclose(matrix_of(coded), truth, rtol=2.0**-23, atol=0)
    again = written_again(coded, weight.numpy())
    assert np.array_equal(again["weight"], stored["weight"].view(torch.uint8).numpy())
    assert np.array_equal(again["scale"], stored["weight_scale"].numpy())
