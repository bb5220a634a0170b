"""Names of llama.cpp, and the order in which its tensors have rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loratool.base.config import ModelConfig
from loratool.errors import UnsupportedError
from loratool.names.gguf import (
    Architecture,
    Attention,
    Heads,
    architecture_named,
    architecture_of,
    attention_in_config,
    attention_in_values,
    plain_path,
)
from loratool.names.gguf.rows import FORMS
from loratool.names.gguf.tables import ARCHITECTURES, CLASSES, MODEL_TYPES

H, KV, D = 4, 2, 6
HEADS = Heads(H, KV)
GROUPS = H // KV


def named(name: str) -> Architecture:
    found = architecture_named(name)
    assert found is not None
    return found


def paired(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Halves of each head as neighbours: element by element."""
    size = len(rows) // heads
    made = np.empty_like(rows)
    for head in range(heads):
        for index in range(size // 2):
            for half in range(2):
                made[head * size + 2 * index + half] = rows[head * size + half * size // 2 + index]
    return made


def of_groups(rows: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Queries, keys and values, which each group of heads has together."""
    size = (GROUPS + 2) * D
    groups = [rows[number * size : (number + 1) * size] for number in range(KV)]
    ends = (0, GROUPS * D, (GROUPS + 1) * D, (GROUPS + 2) * D)
    return [np.concatenate([g[ends[n] : ends[n + 1]] for g in groups]) for n in range(3)]


FUSED = np.arange((H + 2 * KV) * D)
MANY = np.arange(3 * H * D)
PLAIN = np.arange(48)

WANTED = {
    "": (HEADS, PLAIN, PLAIN),
    "queries": (HEADS, np.arange(H * D), paired(np.arange(H * D), H)),
    "keys": (HEADS, np.arange(KV * D), paired(np.arange(KV * D), KV)),
    "keys by group": (HEADS, np.arange(KV * D), paired(np.arange(KV * D), H // KV)),
    "sorted": (
        Heads(H, H),
        MANY,
        np.concatenate([MANY.reshape(H, 3, D)[:, n].reshape(-1) for n in range(3)]),
    ),
    "sorted by group": (HEADS, FUSED, np.concatenate(of_groups(FUSED))),
    "queries of groups": (HEADS, FUSED, paired(of_groups(FUSED)[0], H)),
    "keys of groups": (HEADS, FUSED, paired(of_groups(FUSED)[1], KV)),
    "values of groups": (HEADS, FUSED, of_groups(FUSED)[2]),
    "first third": (Heads(H, H), MANY, paired(MANY[: H * D], H)),
    "second third": (Heads(H, H), MANY, paired(MANY[H * D : 2 * H * D], H)),
    "last third": (Heads(H, H), MANY, MANY[2 * H * D :]),
    "queries below": (HEADS, FUSED, FUSED[: H * D]),
    "keys below": (HEADS, FUSED, FUSED[H * D : (H + KV) * D]),
    "values below": (HEADS, FUSED, FUSED[(H + KV) * D :]),
    "first half": (HEADS, PLAIN, PLAIN[:24]),
    "second half": (HEADS, PLAIN, PLAIN[24:]),
    "even": (HEADS, PLAIN, PLAIN[::2]),
    "odd": (HEADS, PLAIN, PLAIN[1::2]),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_where_the_formula_says(form: str) -> None:
    heads, module, wanted = WANTED[form]
    rows = FORMS[form](heads).of_module(len(module), "m")
    assert np.array_equal(module[rows.indices()], wanted)
    assert (rows.module_rows, len(rows.indices())) == (len(module), len(wanted))
    assert rows == FORMS[form](heads).of_tensor(len(wanted), "t")
    assert rows.is_same == np.array_equal(module, wanted)
    if rows.exchanged is not None:
        count, outer, inner = rows.exchanged
        assert np.array_equal(
            module.reshape(count, outer, inner).swapaxes(1, 2).reshape(-1), wanted
        )
    if rows.swapped is not None:
        seen = module.reshape(*rows.swapped, -1).swapaxes(1, 2)
        assert np.array_equal(seen.reshape(-1), wanted)
    assert (rows.exchanged is not None) == (form in ("queries", "keys", "keys by group"))


def test_rows_that_are_no_heads_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no multiple of 8"):
        FORMS["queries"](HEADS).of_module(20, "q")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_lead_there_and_back(name: str) -> None:
    architecture = named(name)
    for template, tensor, _ in architecture.lines:
        module = template.replace("*", "7").replace("#", "3")
        wanted = tensor.replace("*", "7")
        if "kv_b_proj" in module and name == "deepseek2":
            continue
        has_experts = "shared_mlp" not in module or wanted.endswith("_shexp")
        held = Architecture(name, has_experts).held(module)
        assert wanted in [one.tensor for one in held]
        assert all(one.module == module for one in held)
        back = architecture.modules(wanted)
        paths = [one.of_expert(3).module if one.is_stack else one.module for one in back]
        assert module in paths
        assert all(one.tensor == wanted for one in back)


def test_the_first_of_several_names_is_the_families_own() -> None:
    def first(name: str, tensor: str) -> str:
        return named(name).modules(tensor)[0].module

    assert first("llama", "blk.0.ffn_gate") == "model.layers.0.mlp.gate_proj"
    expert = "model.layers.0.block_sparse_moe.experts.#.w1"
    assert first("llama", "blk.0.ffn_gate_exps") == expert
    assert first("qwen3moe", "blk.1.ffn_up_exps") == "model.layers.1.mlp.experts.#.up_proj"
    assert first("granite", "blk.0.ffn_up") == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "prefix",
    ["model.", "model.language_model.", "language_model.model.", "model.text_model.", ""],
)
def test_a_language_model_inside_another_one(prefix: str) -> None:
    path = f"{prefix}layers.2.self_attn.q_proj"
    assert plain_path(path) == "model.layers.2.self_attn.q_proj"
    (held,) = named("llama").held(path)
    assert held.tensor == "blk.2.attn_q"
    assert plain_path("language_model.lm_head") == "lm_head"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "llama"),
        ({"model_type": "mistral"}, "llama"),
        ({"architectures": ["SomethingNew"], "model_type": "qwen3_moe"}, "qwen3moe"),
        (
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "text_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            },
            "qwen2",
        ),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"x": 1}},
            "gemma3",
        ),
        (
            {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["mamba"]},
            "granitehybrid",
        ),
        (
            {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention"]},
            "granite",
        ),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, None),
        ({}, None),
    ],
)
def test_the_architecture_of_a_configuration(config: dict[str, Any], name: str | None) -> None:
    found = architecture_of(ModelConfig(config).language)
    assert (found.name if found else None) == name


def test_classes_and_types_are_of_architectures_that_there_are() -> None:
    assert set(CLASSES.values()) == set(ARCHITECTURES) == set(MODEL_TYPES.values())
    assert architecture_named("rwkv7") is None


def test_heads_of_a_configuration() -> None:
    told = attention_in_config({"num_attention_heads": 8, "num_key_value_heads": 2})
    assert told is not None
    assert told.at(3) == Heads(8, 2)
    inner = attention_in_config(ModelConfig({"text_config": {"num_attention_heads": 4}}).language)
    assert inner is not None
    assert inner.at(0) == Heads(4, 4)
    falcon = {"n_head": 71, "multi_query": True, "model_type": "falcon"}
    one = attention_in_config(falcon)
    assert one is not None
    assert one.at(0) == Heads(71, 1)
    blocks = [
        {"attention": {"n_heads_in_group": 4}},
        {"attention": {"no_op": True, "n_heads_in_group": None}},
    ]
    deci = attention_in_config({"num_attention_heads": 8, "block_configs": blocks})
    assert deci is not None
    assert deci.at(0) == Heads(8, 2)
    assert attention_in_config({"hidden_size": 8}) is None


def test_heads_of_key_values() -> None:
    one = {"llama.attention.head_count": "32", "llama.attention.head_count_kv": "8"}
    assert attention_in_values("llama", one) == Attention((32,), (8,))
    many = {"deci.attention.head_count": "[4, 0]", "deci.attention.head_count_kv": "[2, 0]"}
    found = attention_in_values("deci", many)
    assert found is not None
    assert (found.at(0), found.at(1), found.at(2)) == (Heads(4, 2), None, None)
    assert attention_in_values("llama", {"llama.attention.head_count": "many"}) is None
    assert attention_in_values("llama", {}) is None


def test_what_no_pair_is_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"kv_b_proj: is cut by heads") as caught:
        named("deepseek2").held("model.layers.0.self_attn.kv_b_proj")
    assert "merge" in str(caught.value.hint)
    with pytest.raises(UnsupportedError, match="linear_attn"):
        named("qwen3next").held("model.layers.0.linear_attn.in_proj_qkvz")
    assert named("llama").held("model.layers.0.something") == ()


def test_rows_that_heads_decide_ask_for_the_base() -> None:
    (held,) = named("llama").held("model.layers.0.self_attn.q_proj")
    assert held.needs_heads
    with pytest.raises(UnsupportedError, match="attention heads") as caught:
        held.rows(None)
    assert "--base" in str(caught.value.hint)
    (other,) = named("qwen2").held("model.layers.0.self_attn.q_proj")
    assert other.rows(None).is_same
    assert (named("llama").permutes, named("qwen2").permutes) == (True, False)
    assert (named("llama").pairs_biases, named("olmo").pairs_biases) == (True, False)
