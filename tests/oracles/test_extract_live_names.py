"""What is extracted has the names of the live model: PEFT applies it, and it merges back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_transformers as tiny
import torch
import transformers_sweep as sweep
from peft import PeftModel

import loratool

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODELS = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "swin": "SwinForImageClassification",
    "detr": "DetrForObjectDetection",
    "nomic_bert": "NomicBertForMaskedLM",
    "mixtral": "MixtralForCausalLM",
}
WITHOUT_PEFT = ("mixtral",)
"""Whose experts PEFT has as parameters, and an adapter one by one."""


def pair(
    kind: str, folder: Path, *, table: bool = False
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write a tiny model and a finetuned one; return the first, and the weights of the second."""
    torch.manual_seed(3)
    config = tiny.tiny_config(kind)
    for part in (config, getattr(config, "text_config", None)):
        if table and part is not None:
            part.tie_word_embeddings = True
    tiny.build(MODELS[kind], config).save_pretrained(folder / "base")
    model = sweep.load(MODELS[kind], folder / "base")
    first = copy.deepcopy(model)
    head = model.get_output_embeddings() if table else None
    with torch.no_grad():
        if head is not None:
            head.weight += torch.randn(len(head.weight), 1) @ torch.randn(1, head.in_features)
        for name in sweep._linear(model):
            weight = model.get_submodule(name).weight
            if head is None or weight is not head.weight:
                weight += torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
    model.save_pretrained(folder / "tuned")
    return first, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(found: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for key, value in found.state_dict().items():
        if value.is_floating_point() and value.numel():
            assert torch.allclose(value, expected[key], atol=2e-3), key


@pytest.mark.parametrize("kind", list(MODELS))
def test_all_of_it_is_applied(kind: str, tmp_path: Path) -> None:
    first, expected = pair(kind, tmp_path)
    loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=8)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert_same(sweep.load(MODELS[kind], tmp_path / "out"), expected)
    if kind not in WITHOUT_PEFT:
        adapted = PeftModel.from_pretrained(first, str(tmp_path / "adapter"))
        assert_same(adapted.merge_and_unload(), expected)


@pytest.mark.parametrize("kind", ["qwen2_vl", "gemma3"])
def test_a_tied_table_changes_on_both_sides(kind: str, tmp_path: Path) -> None:
    _, expected = pair(kind, tmp_path, table=True)
    adapter = tmp_path / "adapter"
    loratool.extract(tmp_path / "base", tmp_path / "tuned", adapter, rank=8, embeddings=True)
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    assert_same(sweep.load(MODELS[kind], tmp_path / "out"), expected)
