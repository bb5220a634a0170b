"""Adapters that somebody trained and published, on bases of the right architecture.

The files are not part of the project; without them these tests are skipped. The bases are made
from a configuration, with random weights.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import read_all
from safetensors.torch import load_file, save_file
from samples import ROOT
from torch import nn

import loratool

DATA = ROOT.parent / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="the published adapters are not here"),
]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=6))


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig(num_labels=2))


def clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    )


def save(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize(
    ("name", "build", "changed"), [("gpt2-peft", gpt2, 6), ("distilbert-peft", distilbert, 16)]
)
def test_against_peft(name: str, build: Any, changed: int, tmp_path: Path) -> None:
    from peft import PeftModel

    model = build().eval()
    base = save(model, tmp_path / "base")
    assert not [f for f in loratool.validate(DATA / name, base=base, deep=True) if f.is_error]
    report = loratool.merge(base, [DATA / name], tmp_path / "out")
    assert report.merged + report.added == changed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, str(DATA / name)).merge_and_unload()
    ours = read_all(tmp_path / "out")
    theirs = merged.state_dict()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    assert loratool.verify(tmp_path / "out", base=base, adapters=[DATA / name]) == ()


def test_clip_text_encoder_under_the_names_of_transformers_4(tmp_path: Path) -> None:
    model = clip_text()
    base = save(model, tmp_path / "base")
    report = loratool.merge(base, [DATA / "clip-peft"], tmp_path / "out")
    assert report.merged == 24
    factors = load_file(DATA / "clip-peft" / "adapter_model.safetensors")
    before, after = read_all(base), read_all(tmp_path / "out")
    (name,) = [key for key in before if key.endswith("layers.3.self_attn.v_proj.weight")]
    prefix = "base_model.model.text_model.encoder.layers.3.self_attn.v_proj"
    delta = factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
    assert torch.equal(after[name], before[name] + delta)


def test_convnext_without_a_configuration_of_its_base(tmp_path: Path) -> None:
    adapter = loratool.open_adapter(DATA / "convnext-peft")
    weights = {
        f"{site.module}.weight": torch.randn(site.out_features, site.in_features)
        for site in adapter.sites
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    report = loratool.merge(
        tmp_path / "model.safetensors", [DATA / "convnext-peft"], tmp_path / "out.safetensors"
    )
    assert report.merged == len(adapter.sites) == 36


def test_loralib_file_with_a_head(tmp_path: Path) -> None:
    file = DATA / "roberta-loralib" / "roberta_base_lora_mnli.bin"
    adapter = loratool.open_adapter(file)
    assert adapter.scheme == "loralib"
    assert {extra.name for extra in adapter.extras} == {
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    }
    from transformers import RobertaConfig, RobertaForMaskedLM

    base = save(
        RobertaForMaskedLM(RobertaConfig(max_position_embeddings=514, type_vocab_size=1)),
        tmp_path / "base",
    )
    report = loratool.merge(base, [file], tmp_path / "out", alpha=16)
    assert (report.merged, report.added) == (24, 4)
    raw = torch.load(file, weights_only=True, map_location="cpu")
    module = "roberta.encoder.layer.5.attention.self.query"
    before, after = read_all(base), read_all(tmp_path / "out")
    delta = raw[f"{module}.lora_B"].double() @ raw[f"{module}.lora_A"].double()
    expected = before[f"{module}.weight"].double() + 2 * delta
    torch.testing.assert_close(after[f"{module}.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_peft_0_6_files(tmp_path: Path) -> None:
    weights = {
        "peft-0.6-lora-mlp": {"lin0.weight": (20, 10), "lin1.weight": (2, 20)},
        "peft-0.6-lora-mlp-modules-to-save": {
            "lin0.weight": (20, 10),
            "lin1.weight": (2, 20),
            "lin1.bias": (2,),
        },
        "peft-0.6-adalora-mlp": {"lin0.weight": (20, 10)},
        "peft-0.6-lora-conv2d": {"conv2d.weight": (10, 5, 3, 3)},
        "peft-0.6-lora-emb-conv1d": {"emb.weight": (100, 5), "conv1d.weight": (5, 1)},
    }
    for name, shapes in weights.items():
        base = tmp_path / f"{name}.safetensors"
        save_file(
            {key: torch.randn(shape) for key, shape in shapes.items()}, base, {"format": "pt"}
        )
        report = loratool.merge(base, [DATA / name], tmp_path / f"{name}-out.safetensors")
        assert report.merged >= 1


def test_every_readable_one_inspects_and_validates() -> None:
    for folder in sorted(DATA.iterdir()):
        if folder.is_dir():
            info = loratool.inspect(folder)
            assert json.dumps(info.as_json())
            assert not [f for f in loratool.validate(folder, deep=True) if f.is_error]
