"""bitsandbytes' own codes, stored as its modules store them, against its own numbers.

Its kernel for processors begins a block anew in each row, so it is no witness where rows are no
whole number of blocks; there the codes of the flattened weight, which it makes rightly, are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratool.base.model import open_model
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import read_matrix
from loratool.files.inputs import InputFiles

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional
NAME = "model.layers.0.mlp.up_proj.weight"


def decoded(tensors: dict[str, torch.Tensor], folder: Path) -> np.ndarray:
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    weight = open_model(folder).tensors[NAME]
    assert isinstance(weight, CodedTensor)
    files = InputFiles({})
    found = read_matrix(weight, files)
    files.close()
    return found


def in_four_bits(
    weight: torch.Tensor, **settings: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor, Any]:
    codes, state = functional.quantize_4bit(weight, **settings)
    parts = {f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}
    return {NAME: codes, **parts}, codes, state


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 128), (96, 256)])
def test_whole_blocks_are_what_the_library_makes_of_them(
    kind: str, nested: bool, storage: torch.dtype, shape: tuple[int, int], tmp_path: Path
) -> None:
    weight = torch.randn(shape).mul(0.05)
    tensors, codes, state = in_four_bits(
        weight, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    expected = functional.dequantize_4bit(codes, state).double().numpy()
    assert np.abs(decoded(tensors, tmp_path) - expected).max() <= 2e-8


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((48, 32), 64), ((64, 96), 64), ((33, 31), 64), ((40, 320), 128)]
)
def test_ragged_blocks_are_those_of_the_flattened_weight(
    kind: str, nested: bool, shape: tuple[int, int], blocksize: int, tmp_path: Path
) -> None:
    weight = torch.randn(shape).mul(0.05)
    settings = {"quant_type": kind, "compress_statistics": nested, "blocksize": blocksize}
    tensors, _, state = in_four_bits(weight, **settings)
    found = decoded(tensors, tmp_path)
    # As one row, whole blocks wide, the library is right.
    flat = weight.reshape(1, -1)
    wide = torch.nn.functional.pad(flat, (0, -flat.shape[1] % blocksize))
    codes, padded = functional.quantize_4bit(wide, **settings)
    expected = functional.dequantize_4bit(codes, padded).double().numpy()
    tolerance = 2e-8 if not nested else 2e-3  # the mean of the scales is another one
    assert np.abs(found.reshape(-1) - expected[0, : math.prod(shape)]).max() <= tolerance
    largest = np.abs(found).max()
    assert np.linalg.norm(found - weight.numpy()) <= 0.2 * np.linalg.norm(weight.numpy()), largest
    assert state.shape == shape


@pytest.mark.parametrize("shape", [(64, 128), (33, 31)])
def test_eight_bits_are_what_the_library_makes_of_them(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    weight = torch.randn(shape).mul(0.05).half()
    codes, scale, _ = functional.int8_vectorwise_quant(weight)
    layer.weight = bnb.nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale
    )
    prefix = NAME.removesuffix("weight")
    tensors = {f"{prefix}{key}": value for key, value in layer.state_dict().items()}
    assert sorted(tensors) == [f"{prefix}{key}" for key in ("SCB", "weight", "weight_format")]
    expected = functional.int8_vectorwise_dequant(codes, scale).double().numpy()
    assert np.abs(decoded(tensors, tmp_path) - expected).max() <= 2e-8
