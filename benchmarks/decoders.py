"""One weight in each of several codecs, and the library that each comes from decoding it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

SHAPE: Final = (4096, 4096)
MODULE: Final = "model.layers.0.mlp.up_proj"
Library = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A weight in one codec.

    Attributes:
        name: Of the codec.
        library: What decodes it too.
        make: Writes a model of the weight alone into a folder; returns it and the library's call.
    """

    name: str
    library: str
    make: Callable[[Path], tuple[Path, Library]]


def _weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator) * 0.02


def _save(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    named = {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _four_bits(kind: str, *, nested: bool) -> Callable[[Path], tuple[Path, Library]]:
    def make(folder: Path) -> tuple[Path, Library]:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(
            _weight(), quant_type=kind, blocksize=64, compress_statistics=nested
        )
        tensors = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
        model = _save(folder, {"weight": codes, **tensors}, {"quant_method": "bitsandbytes"})
        return model, lambda: functional.dequantize_4bit(codes, state)

    return make


def _eight_bits(folder: Path) -> tuple[Path, Library]:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(_weight().half())
    model = _save(folder, {"weight": codes, "SCB": scales}, {"quant_method": "bitsandbytes"})
    return model, lambda: functional.int8_vectorwise_dequant(codes, scales)


def _fp8_block(folder: Path) -> tuple[Path, Library]:
    blocks = _weight().reshape(32, 128, 32, 128)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(SHAPE).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale_inv": scales}
    model = _save(folder, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})

    def library() -> torch.Tensor:
        spread = codes.float().reshape(32, 128, 32, 128) * scales[:, None, :, None]
        return spread.reshape(SHAPE)

    return model, library


def _packed(folder: Path) -> tuple[Path, Library]:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = torch.randint(0, 1 << 32, (SHAPE[0], SHAPE[1] // 8)).to(torch.uint32)
    codes = codes.view(torch.int32)
    scales = (torch.rand(SHAPE[0], SHAPE[1] // 128) * 0.01).bfloat16()
    tensors = {
        "weight_packed": codes,
        "weight_scale": scales,
        "weight_shape": torch.tensor(SHAPE),
    }
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    model = _save(folder, tensors, {**said, "config_groups": groups})

    def library() -> torch.Tensor:
        unpacked = unpack_from_int32(codes, 4, torch.Size(SHAPE))
        return unpacked.float() * scales.float().repeat_interleave(128, dim=1)

    return model, library


def _experts(folder: Path) -> tuple[Path, Library]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, out, into = 4, 1440, 2880
    blocks = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
    scales = torch.randint(115, 125, (experts, out, into // 32), dtype=torch.uint8)
    folder.mkdir(parents=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, lambda: convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def _gguf(kind: str) -> Callable[[Path], tuple[Path, Library]]:
    def make(folder: Path) -> tuple[Path, Library]:
        import gguf

        quantised = getattr(gguf.GGMLQuantizationType, kind)
        try:
            data = gguf.quantize(_weight().numpy(), quantised)
        except NotImplementedError:
            block, size = gguf.GGML_QUANT_SIZES[quantised]
            random = np.random.default_rng(0)
            rows = random.integers(0, 256, (SHAPE[0] * SHAPE[1] // block, size), dtype=np.uint8)
            # Scales are halves at either end of a block; these are small and positive.
            for place in [0, 2] if kind in ("Q4_K", "Q5_K") else [size - 2]:
                rows[:, place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
            data = rows.reshape(SHAPE[0], -1)
        folder.mkdir(parents=True)
        path = folder / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, lambda: gguf.dequantize(data, quantised)

    return make


CASES: Final = (
    Case("NF4", "bitsandbytes", _four_bits("nf4", nested=False)),
    Case("NF4, nested", "bitsandbytes", _four_bits("nf4", nested=True)),
    Case("FP4", "bitsandbytes", _four_bits("fp4", nested=False)),
    Case("int8", "bitsandbytes", _eight_bits),
    Case("block FP8", "torch", _fp8_block),
    Case("INT4, packed", "compressed-tensors", _packed),
    Case("MXFP4 of experts", "transformers", _experts),
    *(
        Case(kind, "gguf", _gguf(kind))
        for kind in ("Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
    ),
)
