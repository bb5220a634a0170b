"""Models of an encoder and a decoder of any class: ties of the decoder, against the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import loratool

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**BERT, "is_decoder": True, "add_cross_attention": True}),
    "roberta": ("RobertaConfig", {**BERT, "is_decoder": True, "add_cross_attention": True}),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 8,
            "n_layer": 1,
            "n_head": 2,
            "vocab_size": 30,
            "n_positions": 16,
            "is_decoder": True,
            "add_cross_attention": True,
        },
    ),
    "trocr": (
        "TrOCRConfig",
        {
            "d_model": 8,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
            "vocab_size": 30,
            "max_position_embeddings": 16,
            "cross_attention_hidden_size": 8,
        },
    ),
}
VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}


def build(decoder: str, *, sees: bool) -> tuple[type, torch.nn.Module]:
    kind = "VisionEncoderDecoder" if sees else "EncoderDecoder"
    encoder = transformers.ViTConfig(**VIT) if sees else transformers.BertConfig(**BERT)
    name, options = DECODERS[decoder]
    config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(
        encoder, getattr(transformers, name)(**options)
    )
    model_class = getattr(transformers, f"{kind}Model")
    torch.manual_seed(4)
    return model_class, model_class(config).eval()


@pytest.mark.parametrize("side", ["table", "head", "both"])
@pytest.mark.parametrize(
    ("decoder", "sees"), [("bert", False), ("roberta", False), ("gpt2", True), ("trocr", True)]
)
def test_each_side_changes_alone(decoder: str, sees: bool, side: str, tmp_path: Path) -> None:
    model_class, model = build(decoder, sees=sees)
    model.save_pretrained(tmp_path / "base")
    paths = {id(module): name for name, module in model.named_modules()}
    table, head = model.decoder.get_input_embeddings(), model.decoder.get_output_embeddings()
    assert head.weight is table.weight
    sides = {"table": [table], "head": [head], "both": [table, head]}[side]
    config = LoraConfig(r=2, target_modules=[paths[id(each)] for each in sides])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = model_class.from_pretrained(tmp_path / "out").eval()
    inputs: dict[str, torch.Tensor] = {"decoder_input_ids": torch.tensor([[3, 7, 1]])}
    if sees:
        inputs["pixel_values"] = torch.randn(1, 3, 8, 8)
    else:
        inputs["input_ids"] = torch.tensor([[2, 9, 4]])
    with torch.no_grad():
        expected, found = adapted(**inputs).logits, merged(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5)
