"""(IA)³ against the real PEFT: merges of tiny seeded models, in every kind of layer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loratool

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A model, and the targets of its adapter: those of ``inputs`` are feed-forward."""

    build: Callable[[], nn.Module]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    task: str | None = None


def llama(kind: str = "LlamaForCausalLM") -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
    )
    model: nn.Module = getattr(transformers, kind)(config)
    return model


def gpt2() -> nn.Module:
    """Conv1D layers, stored ``(in, out)``; ``attn.c_proj`` is square."""
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2
        )
    )


def t5() -> nn.Module:
    import transformers

    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(8, 12, 3)
        self.grouped = nn.Conv2d(12, 8, (3, 1), groups=4)
        self.fed = nn.Conv2d(8, 6, 3)
        self.fed_groups = nn.Conv2d(6, 8, 1, groups=2)
        self.deep = nn.Conv3d(4, 6, 3, bias=False)
        self.fed_deep = nn.Conv3d(4, 6, (1, 2, 3))
        self.linear = nn.Linear(12, 1)
        self.fed_linear = nn.Linear(1, 12)


CASES = {
    "llama": Case(llama, ("k_proj", "v_proj", "down_proj"), ("down_proj",), "CAUSAL_LM"),
    "gpt2": Case(gpt2, ("c_attn", "attn.c_proj", "mlp.c_proj"), ("mlp.c_proj",), "CAUSAL_LM"),
    "t5": Case(t5, ("k", "v", "wo"), ("wo",), "SEQ_2_SEQ_LM"),
    "head": Case(
        lambda: llama("LlamaForSequenceClassification"),
        ("q_proj", "gate_proj"),
        ("gate_proj",),
        "SEQ_CLS",
    ),
    "convolutions": Case(
        Convolutions,
        (*Convolutions()._modules,),
        ("fed", "fed_groups", "fed_deep", "fed_linear"),
    ),
}


def trained(case: Case, folder: Path, dtype: torch.dtype, count: int = 1) -> Any:
    """Write a base and adapters on it; return the model that PEFT has them on."""
    from peft import IA3Config, get_peft_model

    torch.manual_seed(3)
    model = case.build().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "base")
    else:
        (folder / "base").mkdir()
        save_file(model.state_dict(), folder / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {
            "target_modules": list(case.outputs),
            "feedforward_modules": list(case.inputs),
            "task_type": case.task,
        }
        peft = get_peft_model(model, IA3Config(**settings), "a0")
        for index in range(1, count):
            peft.add_adapter(f"a{index}", IA3Config(**settings))
        peft.base_model.set_adapter([f"a{index}" for index in range(count)])
    for name, parameter in peft.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        elif "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter)
    peft.save_pretrained(folder / "adapters")
    return peft


def compare(found: Path, model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Compare with the tensors of a merged model, saved as it saves itself."""
    tensors = load_file(found / "model.safetensors")
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "wanted")
        wanted = load_file(folder / "wanted" / "model.safetensors")
    else:
        wanted = model.state_dict()
    assert tensors.keys() == wanted.keys()
    differing = 0
    for name, value in wanted.items():
        unit = torch.finfo(dtype).eps * value.abs()
        assert bool(((tensors[name] - value).abs() <= unit).all()), name
        differing += int((tensors[name] != value).sum())
    assert differing <= 1e-3 * sum(value.numel() for value in wanted.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_it_merges_as_peft_does(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peft = trained(CASES[name], tmp_path, dtype)
    adapter = tmp_path / "adapters" / "a0"
    assert {m["variant"] for m in loratool.inspect(adapter).as_json()["modules"]} == {"ia3"}
    if CASES[name].task:
        findings = loratool.validate(adapter, base=tmp_path / "base")
        assert [str(finding) for finding in findings if finding.severity != "info"] == []
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    assert loratool.verify(tmp_path / "out", base=tmp_path / "base", adapters=[adapter]) == ()
    compare(tmp_path / "out", peft.merge_and_unload(), dtype, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_several_merge_as_peft_does(name: str, tmp_path: Path) -> None:
    peft = trained(CASES[name], tmp_path, torch.float32, count=2)
    adapters = [tmp_path / "adapters" / f"a{index}" for index in range(2)]
    loratool.merge(tmp_path / "base", adapters, tmp_path / "out")
    merged = peft.merge_and_unload(adapter_names=["a0", "a1"])
    merged.save_pretrained(tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        # PEFT rounds between the two.
        assert torch.allclose(value, wanted[key], rtol=3 * torch.finfo(value.dtype).eps, atol=0)


def test_a_weight_is_that_of_peft_for_one(tmp_path: Path) -> None:
    """``1 + w (l - 1)`` is ``w · l + (1 - w) · 1``: PEFT's weighted sum with one that is 1."""
    peft = trained(CASES["llama"], tmp_path, torch.float32, count=2)
    for name, parameter in peft.named_parameters():
        if "ia3_l.a1" in name:
            parameter.data = torch.ones_like(parameter)
    peft.base_model.add_weighted_adapter(["a0", "a1"], [0.3, 0.7], "both")
    merged = peft.merge_and_unload(adapter_names=["both"])
    loratool.merge(
        tmp_path / "base", [tmp_path / "adapters" / "a0"], tmp_path / "out", weights=[0.3]
    )
    merged.save_pretrained(tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(value, wanted[key], rtol=1e-6, atol=1e-8)


def test_a_plain_lora_of_full_rank_computes_the_same(tmp_path: Path) -> None:
    """Biases included: PEFT merges what loratool wrote."""
    from peft import PeftModel

    peft = trained(CASES["gpt2"], tmp_path, torch.float32)
    adapter = tmp_path / "adapters" / "a0"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["feedforward_modules"]
    loratool.convert(
        adapter, "peft", tmp_path / "plain", base=tmp_path / "base", to_lora=True, rank=96
    )
    wanted = peft.merge_and_unload().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = type(CASES["gpt2"].build()).from_pretrained(tmp_path / "base")
        plain = PeftModel.from_pretrained(model, str(tmp_path / "plain")).merge_and_unload()
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, wanted[key], rtol=1e-4, atol=1e-6), key
