"""The rules of transformers' names, applied to names alone; the oracle tests know the library."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.names.transformers import LiveParameters, Naming, naming_of

LAYER = "model.layers.3"


def naming(model_type: str, *classes: str, **parts: dict[str, Any]) -> Naming:
    found = naming_of({"model_type": model_type, "architectures": list(classes), **parts})
    assert found is not None
    return found


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "no such model", "architectures": ["NoSuchModel"]},
        {"model_type": ["mixtral"], "architectures": "x"},
        {"model_type": "llama", "architectures": [3]},
    ],
)
def test_a_model_without_rules_has_no_naming(config: dict[str, Any]) -> None:
    assert naming_of(config) is None


@given(expert=st.integers(0, 10**6), part=st.sampled_from(["w1", "w3"]))
def test_an_expert_of_the_files_is_a_part_of_one_parameter(expert: int, part: str) -> None:
    live = naming("mixtral").live(f"{LAYER}.block_sparse_moe.experts.{expert}.{part}.weight")
    assert live == LiveParameters(
        (f"{LAYER}.mlp.experts.gate_up_proj",),
        source=("w1", "w3").index(part),
        sources=2,
        expert=expert,
        operations=("list", "join 1"),
    )


@given(st.text(st.characters(categories=["L", "N"], include_characters="._"), max_size=40))
def test_what_no_rule_is_for_keeps_its_name(name: str) -> None:
    name = f"adapter.{name}"
    assert naming("mixtral", "MixtralForCausalLM").live(name).names[0] in (
        name,
        name.replace(".block_sparse_moe.", ".mlp."),
        name.replace("LayerNorm.gamma", "LayerNorm.weight"),
    )


def test_rules_of_a_part_are_for_that_part_alone() -> None:
    found = naming(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        text_config={"model_type": "mistral_large4_text"},
    )
    text = found.live("layers.0.attention.wo.weight")
    vision = found.live("vision_encoder.transformer.layers.0.attention.wo.weight")
    assert text.names == ("model.language_model.layers.0.self_attn.o_proj.weight",)
    assert vision.names == ("model.vision_tower.transformer.layers.0.attention.o_proj.weight",)


def test_the_configuration_says_what_is_inside() -> None:
    inside = {"vision_config": {"model_type": "siglip_vision_model"}}
    name = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    shorter = name.replace("vision_model.", "")
    plain = naming("llava", "LlavaForConditionalGeneration").live(name)
    other = naming("llava", "LlavaForConditionalGeneration", **inside).live(name)
    assert plain.names == other.names == (shorter,)
    unknown = {"vision_config": {"model_type": "a model of one's own"}}
    kept = naming("llava", "LlavaForConditionalGeneration", **unknown).live(name)
    assert kept.names == (name,)


def test_a_name_of_the_live_model_stays() -> None:
    found = naming("qwen2_moe", "Qwen2MoeForCausalLM")
    for leaf in ("self_attn.q_proj.weight", "mlp.experts.gate_up_proj", "mlp.gate.weight"):
        assert found.live(f"{LAYER}.{leaf}") == LiveParameters((f"{LAYER}.{leaf}",))
