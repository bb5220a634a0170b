"""Adapters of different models are told by name; parts of one model go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import lora

import loratool
from loratool.adapter.model import Adapter
from loratool.errors import BaseModelError, UnsupportedError
from loratool.names.one_model import check_one_model
from loratool.schemes.opening import open_adapter

SDXL = "lora_unet_input_blocks_8_1_transformer_blocks_0_attn1_to_q"
SDXL_LATE = "lora_unet_output_blocks_0_1_transformer_blocks_9_attn1_to_q"
SDXL_HUB = "unet.up_blocks.0.attentions.1.transformer_blocks.9.attn2.to_k"
SDXL_TEXT = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
SD_HUB = "unet.up_blocks.3.attentions.1.transformer_blocks.0.attn2.to_k"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
FLUX_HUB = "transformer.single_transformer_blocks.37.proj_out"
CLIP = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
WAN = "diffusion_model.blocks.0.cross_attn.k"
LLAMA = "model.layers.0.self_attn.q_proj"
LLAMA_MLP = "model.layers.5.mlp.up_proj"
LLAMA_VISION = "model.vision_tower.encoder.layers.0.mlp.fc1"
GPT2 = "transformer.h.0.attn.c_attn"
T5_ENCODER, T5_DECODER = (
    f"{side}.block.0.layer.0.SelfAttention.q" for side in ("encoder", "decoder")
)


def opened(folder: Path, name: str, module: str, base: str | None = None) -> Adapter:
    tensors = lora(module, 8, 8)
    if module.startswith("lora_"):
        tensors = {
            f"{module}.lora_down.weight": torch.ones(1, 8),
            f"{module}.lora_up.weight": torch.ones(8, 1),
        }
    if base is None:
        save_file(tensors, folder / f"{name}.safetensors")
        return open_adapter(folder / f"{name}.safetensors")
    (folder / name).mkdir()
    tensors = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(tensors, folder / name / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": base}
    (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return open_adapter(folder / name)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (SDXL, FLUX, ("sdxl", "flux")),
        (SDXL_LATE, FLUX, ("sdxl", "flux")),
        (SDXL_HUB, FLUX_HUB, ("sdxl", "flux")),
        (SDXL_LATE, FLUX_HUB, ("sdxl", "flux")),
        (FLUX, WAN, ("flux", "wan")),
        (SDXL_LATE, SD_HUB, ("sdxl", "sd1")),
        (SDXL_LATE, LLAMA, ("sdxl", "a language model with 'layers'")),
        (LLAMA, FLUX, ("a language model with 'layers'", "flux")),
    ],
)
@pytest.mark.parametrize("verb", ["compose", "compare", "merge"])
def test_two_families_are_refused_by_both_their_names(
    tmp_path: Path, one: str, other: str, words: tuple[str, str], verb: str
) -> None:
    paths = [opened(tmp_path, name, m).path for name, m in (("one", one), ("other", other))]
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"a.weight": torch.ones(8, 8)}, base)
    verbs: dict[str, Callable[[], object]] = {
        "compose": lambda: loratool.compose(paths, out),
        "compare": lambda: loratool.compare(paths),
        "merge": lambda: loratool.merge(base, paths, out),
    }
    if verb == "merge" and LLAMA in (one, other):
        with pytest.raises(BaseModelError, match="no such module"):
            verbs[verb]()
        return
    with pytest.raises(UnsupportedError, match="are for different models") as error:
        verbs[verb]()
    assert all(str(path) in str(error.value) for path in paths)
    told = error.value.what.partition("(")[2].partition(")")[0].split("; ")
    assert all(word in each.split(" or ") for word, each in zip(words, told, strict=True))
    assert not out.exists()


def test_a_base_tells_whether_a_language_model_is_of_a_pipeline(tmp_path: Path) -> None:
    adapters = [opened(tmp_path, "one", FLUX_HUB), opened(tmp_path, "other", LLAMA)]
    check_one_model(adapters, has_base=True)
    with pytest.raises(UnsupportedError, match="for different models"):
        check_one_model(adapters)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SDXL, SDXL_TEXT),
        (SDXL, SDXL_LATE),
        (SDXL, SDXL_HUB),
        (FLUX, CLIP),
        (FLUX, FLUX_HUB),
        (SDXL, CLIP),
        (LLAMA, LLAMA_MLP),
        (LLAMA, GPT2),  # nothing says that they are of different bases
    ],
)
def test_parts_of_one_model_go_together(tmp_path: Path, one: str, other: str) -> None:
    check_one_model([opened(tmp_path, "one", one), opened(tmp_path, "other", other)])


@pytest.mark.parametrize(
    ("one", "other", "is_one"),
    [
        ((LLAMA, "org/llama-7b"), (GPT2, "gpt2"), False),
        ((LLAMA, "org/llama-7b"), (GPT2, "llama-7b/"), True),
        ((LLAMA, "org/llama-7b"), (LLAMA_MLP, "/data/mine"), True),
        ((LLAMA, "org/a"), (LLAMA_VISION, "org/a"), True),
        ((T5_ENCODER, "org/t5"), (T5_DECODER, "ORG/T5"), True),
    ],
)
def test_language_models_differ_where_base_and_blocks_do(
    tmp_path: Path, one: tuple[str, str], other: tuple[str, str], is_one: bool
) -> None:
    adapters = [opened(tmp_path, name, *each) for name, each in (("one", one), ("other", other))]
    if is_one:
        check_one_model(adapters)
        return
    with pytest.raises(UnsupportedError, match="llama-7b; gpt2"):
        check_one_model(adapters)
