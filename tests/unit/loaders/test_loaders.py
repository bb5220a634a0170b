"""What each loader refuses or misreads, and what is done to make it right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samples import lora

import loratool
from loratool.adapter.findings import Finding
from loratool.adapter.model import Adapter
from loratool.adapter.part import Part
from loratool.base.model import open_model
from loratool.errors import OptionError, UnsupportedError
from loratool.loaders import builtin_loaders, comfy, loader_named
from loratool.loaders.checks import check_for
from loratool.loaders.loader import Fate, Feature, Mend
from loratool.loaders.preparation import prepare, refusals, uniform_rank
from loratool.schemes import scheme_named, scheme_names
from loratool.schemes.opening import open_adapter
from loratool.values.expr import Stored
from loratool.write.stored import part_of

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
LLM = ("vllm", "sglang", "llamacpp")
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
QKV = "model.layers.0.self_attn.qkv_proj"
GATE_UP = "model.layers.0.mlp.gate_up_proj"
GOOD: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}


def check(path: Path, name: str) -> list[Finding]:
    return list(check_for(open_adapter(path), loader_named(name)))


def codes(path: Path, name: str) -> list[str]:
    return sorted(finding.code for finding in check(path, name))


def only(path: Path, name: str, code: str) -> Finding:
    (found,) = [finding for finding in check(path, name) if finding.code == code]
    return found


def parts_of(adapter: Adapter) -> list[Part]:
    return [part_of(site, adapter) for site in adapter.sites]


def dense(part: Part) -> torch.Tensor:
    up, down = (torch.from_numpy(v.evaluate()) for v in (part.up, part.down))
    return part.scale * (up @ down)


@pytest.fixture
def make_kohya(tmp_path: Path) -> Make:
    """Write a file of kohya's: module to (rank, alpha), and further tensors."""

    def make(modules: dict[str, tuple[int, float | None]], more: Tensors | None = None) -> Path:
        tensors = dict(more or {})
        for module, (rank, alpha) in modules.items():
            tensors[f"{module}.lora_down.weight"] = torch.randn(rank, 16)
            tensors[f"{module}.lora_up.weight"] = torch.randn(16, rank)
            if alpha is not None:
                tensors[f"{module}.alpha"] = torch.tensor(alpha)
        path = tmp_path / "kohya.safetensors"
        save_file(tensors, path)
        return path

    return make


@pytest.fixture
def make_mlx(tmp_path: Path) -> Make:
    """Write mlx-lm's files: module to rank, and lora_parameters."""

    def make(modules: dict[str, int], **parameters: Any) -> Path:
        tensors: Tensors = {}
        for module, rank in modules.items():
            tensors[f"{module}.lora_a"] = torch.randn(16, rank)
            tensors[f"{module}.lora_b"] = torch.randn(rank, 16)
        save_file(tensors, tmp_path / "adapters.safetensors")
        known = {"rank": 4, "scale": 2.0, "dropout": 0.0} | parameters
        known = {name: value for name, value in known.items() if value is not None}
        config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": known}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def test_targets_are_found_by_their_files_and_write_schemes_that_are_written() -> None:
    names = [loader.name for loader in builtin_loaders()]
    assert names == ["comfy", "diffusers", "llamacpp", "mlx", "sglang", "vllm"]
    for loader in builtin_loaders():
        assert loader.scheme in scheme_names()
        assert loader.scheme in loader.reads
        assert loader.source and loader.title and loader.summary
        for name in (*loader.reads, *loader.tolerates):
            scheme_named(name)
        for feature, rule in loader.rules.items():
            assert rule.words[0].isalpha() and not rule.words.endswith("."), feature
    with pytest.raises(OptionError, match="none of comfy"):
        loader_named("exllama")


def test_every_code_of_a_finding_says_how_bad_it_is(make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5), use_rslora=True, **GOOD)
    found = only(path, "sglang", "LT202")
    assert found.is_error and found.hint == "loratool convert ADAPTER --for sglang -o OUT"


# Scales


@pytest.mark.parametrize("name", LLM)
def test_a_plain_adapter_of_one_rank_is_right_everywhere(name: str, make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5) | lora(V, 6, 5), **GOOD)
    assert codes(path, name) == []


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (16, 3)])
def test_rslora_is_right_in_vllm_only(rank: int, alpha: float, make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5, rank), r=rank, lora_alpha=alpha, use_rslora=True, **GOOD)
    assert codes(path, "vllm") == []
    own = alpha / math.sqrt(rank)
    for name in ("sglang", "llamacpp"):
        message = only(path, name, "LT202").message
        assert f"would apply {alpha / rank:g} instead of {own:g} to {Q} (1 module)" in message


def test_rslora_of_experts_is_wrong_in_vllm(make_adapter: Make) -> None:
    module = "model.layers.0.mlp.experts.3.down_proj"
    path = make_adapter(
        lora(Q, 6, 5) | lora(module, 6, 5),
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
    )
    message = only(path, "vllm", "LT202").message
    assert f"{8 / 4:g} instead of {8 / math.sqrt(4):g} to {module} (1 module)" in message


def test_ranks_by_pattern_without_alphas_are_right_in_llamacpp_only(make_adapter: Make) -> None:
    path = make_adapter(
        lora(Q, 6, 5, rank=2) | lora(V, 6, 5, rank=4),
        r=4,
        lora_alpha=8,
        rank_pattern={"q_proj": 2},
        **GOOD,
    )
    assert codes(path, "llamacpp") == []
    message = only(path, "vllm", "LT202").message
    assert f"vLLM would apply {8 / 4:g} instead of {8 / 2:g} to {Q} (1 module)" in message
    assert codes(path, "sglang") == ["LT201", "LT201", "LT202"]  # pattern, ranks, scale
    refused = [finding for finding in check(path, "sglang") if finding.code == "LT201"]
    assert any("2 (1 module), 4 (1 module)" in finding.message for finding in refused)
    assert any("rank_pattern" in finding.message for finding in refused)


def test_mergekits_patterns_are_right_in_vllm_by_luck_and_wrong_in_llamacpp(
    make_adapter: Make,
) -> None:
    path = make_adapter(
        lora(Q, 6, 5, rank=2) | lora(V, 6, 5, rank=4),
        r=4,
        lora_alpha=4,
        rank_pattern={Q: 2},
        alpha_pattern={Q: 2},
        **GOOD,
    )
    assert codes(path, "vllm") == []
    message = only(path, "llamacpp", "LT202").message
    assert f"{4 / 2:g} instead of {2 / 2:g} to {Q}" in message


def test_alphas_by_pattern_are_wrong_and_grouped(make_adapter: Make) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(24)]
    tensors: Tensors = {}
    for name in names:
        tensors |= lora(name, 6, 5)
    path = make_adapter(tensors, alpha_pattern={"q_proj": 2}, target_modules=["q_proj"])
    for name in ("vllm", "llamacpp", "sglang"):
        message = only(path, name, "LT202").message
        assert f"would apply {8 / 4:g} instead of {2 / 4:g} to model.layers.0" in message
        assert "(24 modules)" in message
    assert "lora_alpha / r" in only(path, "vllm", "LT202").message


def test_patterns_that_change_nothing_are_nothing(make_adapter: Make) -> None:
    path = make_adapter(
        lora(Q, 6, 5), rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8}, **GOOD
    )
    for name in LLM:
        assert codes(path, name) == []


def test_many_wrong_scales_are_summed_up(make_adapter: Make) -> None:
    tensors: Tensors = {}
    for i in range(8):
        tensors |= lora(f"model.layers.{i}.self_attn.q_proj", 6, 5)
    pattern = {f"layers.{i}.self_attn.q_proj": i + 1 for i in range(8)}
    path = make_adapter(tensors, alpha_pattern={f".*{k}": v for k, v in pattern.items()}, **GOOD)
    found = [finding.message for finding in check(path, "vllm") if finding.code == "LT202"]
    assert len(found) == 6  # 7 of 8 are wrong: 5 of them named
    assert "2 more wrong scales to 2 modules" in found[-1]


def test_an_alpha_of_zero_is_one_in_llamacpp(make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5), lora_alpha=0, **GOOD)
    assert codes(path, "vllm") == []
    assert "would apply 1 instead of 0" in only(path, "llamacpp", "LT202").message


# Ranks


@pytest.mark.parametrize(("rank", "setting"), [(17, 32), (32, 32), (300, 320), (512, 512)])
def test_ranks_that_vllm_has_to_be_told(rank: int, setting: int, make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5, rank), r=rank, **GOOD)
    found = only(path, "vllm", "LT204")
    assert found.severity == "info"
    assert f"--max-lora-rank {setting}," in found.message
    assert codes(path, "sglang") == []


def test_ranks_that_vllm_refuses(make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5, 513), r=513, **GOOD)
    found = only(path, "vllm", "LT201")
    assert "rank 513" in found.message and "--rank 512" in str(found.hint)
    with pytest.raises(UnsupportedError, match="at most 512") as caught:
        uniform_rank(parts_of(open_adapter(path)), loader_named("vllm"))
    assert "--rank 512" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((2, 4), {"vllm": 8, "sglang": 4, "llamacpp": 4, "mlx": 4, "comfy": None}),
        ((8, 8), {"vllm": None, "sglang": None, "llamacpp": None, "mlx": None}),
        ((3, 3), {"vllm": 8, "sglang": None, "llamacpp": None}),
        ((8, 65), {"vllm": 128, "sglang": 65, "diffusers": None}),
    ],
)
def test_the_rank_that_all_modules_get(
    ranks: tuple[int, int], expected: dict[str, int | None], make_adapter: Make
) -> None:
    tensors = lora(Q, 6, 5, ranks[0]) | lora(V, 6, 5, ranks[1])
    path = make_adapter(tensors, r=ranks[1], rank_pattern={"q_proj": ranks[0]}, **GOOD)
    parts = parts_of(open_adapter(path))
    for name, rank in expected.items():
        assert uniform_rank(parts, loader_named(name)) == rank


def test_stacked_experts_are_not_filled_up(make_adapter: Make) -> None:
    factors = lora("model.layers.0.mlp.experts", 6, 5, rank=6)  # two experts of rank 3
    path = make_adapter(
        factors, r=3, target_modules=[], target_parameters=["mlp.experts.down_proj"]
    )
    adapter = open_adapter(path)
    assert adapter.sites[0].experts == 2
    with pytest.raises(UnsupportedError, match="stacks 2 experts of rank 3"):
        uniform_rank(parts_of(adapter), loader_named("vllm"))
    assert uniform_rank(parts_of(adapter), loader_named("sglang")) is None


# Names and files


def test_keys_without_the_prefix(make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5), prefix="", **GOOD)
    for name in LLM:
        found = only(path, name, "LT203")
        assert found.severity == "warning" and "base_model.model." in found.message


def test_keys_with_the_prefix_of_a_wrapper(make_adapter: Make) -> None:
    path = make_adapter(lora(f"_orig_mod.{Q}", 6, 5), **GOOD)
    assert "serves the base" in only(path, "vllm", "LT203").message
    assert "no such tensors" in only(path, "llamacpp", "LT201").message
    twice = make_adapter(lora(f"base_model.model.{Q}", 6, 5), name="twice", **GOOD)
    assert codes(twice, "vllm") == []  # vLLM removes every such prefix


def test_keys_with_the_name_of_the_adapter(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.{key.replace('.weight', '.default.weight')}": tensor
        for key, tensor in lora(Q, 6, 5).items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **GOOD}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name in ("vllm", "llamacpp"):
        assert "'default'" in only(tmp_path, name, "LT201").message
    assert codes(tmp_path, "sglang") == []


@pytest.mark.parametrize("name", ["comfy", "diffusers", "mlx"])
def test_other_schemes_are_refused_with_the_scheme_that_is_read(
    name: str, make_adapter: Make
) -> None:
    path = make_adapter(lora(Q, 6, 5), use_rslora=True, alpha_pattern={"q_proj": 2}, **GOOD)
    found = only(path, name, "LT201")
    assert "'peft'" in found.message and f"--for {name}" in str(found.hint)
    assert codes(path, name) == ["LT201"]


def test_kohyas_file_given_to_vllm(make_kohya: Make) -> None:
    assert codes(make_kohya({"lora_unet_mid_block_attentions_0_proj_in": (4, 2.0)}), "vllm") == [
        "LT201"
    ]


def test_names_of_files_and_fields_that_are_needed(make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5))
    assert "does not say target_modules" in only(path, "vllm", "LT201").message
    assert codes(path, "llamacpp") == []
    (path / "adapter_config.json").unlink()
    assert "no adapter_config.json" in only(path, "sglang", "LT201").message
    other = make_adapter(lora(Q, 6, 5), name="other", **GOOD)
    (other / "adapter_model.safetensors").rename(other / "weights.safetensors")
    assert "adapter_model.safetensors or" in only(other, "vllm", "LT201").message


def test_targets_by_regular_expression(make_adapter: Make) -> None:
    path = make_adapter(lora(Q, 6, 5), target_modules=r".*\.q_proj")
    assert codes(path, "vllm") == []
    assert "'all-linear'" in only(path, "sglang", "LT201").message
    linear = make_adapter(lora(Q, 6, 5), name="all", target_modules="all-linear")
    assert codes(linear, "sglang") == []


# Features: what it is, the tensors, the configuration, and the fate in each loader


EMBED = {
    "model.embed_tokens.lora_embedding_A": torch.ones(4, 9),
    "model.embed_tokens.lora_embedding_B": torch.ones(5, 4),
}
CASES: dict[str, tuple[Tensors, dict[str, Any], dict[str, str | None]]] = {
    "dora": (
        lora(Q, 6, 5) | {f"{Q}.lora_magnitude_vector": torch.ones(6)},
        {"use_dora": True},
        {"vllm": "LT201", "sglang": "LT201", "llamacpp": "LT201", "diffusers": "LT203"},
    ),
    "lora bias": (
        lora(Q, 6, 5) | {f"{Q}.lora_B.bias": torch.ones(6)},
        {"lora_bias": True},
        {"vllm": "LT201", "sglang": "LT203", "llamacpp": "LT201", "mlx": "LT201"},
    ),
    "biases": (
        lora(Q, 6, 5) | {f"{Q}.bias": torch.ones(6)},
        {"bias": "all"},
        {"vllm": "LT201", "sglang": "LT203", "llamacpp": "LT201"},
    ),
    "saved head": (
        lora(Q, 6, 5) | {"lm_head.weight": torch.ones(9, 5)},
        {"modules_to_save": ["lm_head"]},
        {"vllm": "LT201", "sglang": "LT203", "llamacpp": "LT201", "mlx": "LT201"},
    ),
    "norms": (
        lora(Q, 6, 5) | {"model.layers.0.input_layernorm.weight": torch.ones(5)},
        {},
        {"vllm": "LT201", "sglang": "LT203", "llamacpp": "LT203"},
    ),
    "tokens": (
        lora(Q, 6, 5)
        | {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 5)},
        {"trainable_token_indices": [1, 2]},
        {"vllm": "LT201", "sglang": "LT203", "llamacpp": "LT201", "mlx": "LT201"},
    ),
    "embedding": (
        EMBED,
        {"target_modules": ["embed_tokens"]},
        {"vllm": "LT204", "sglang": "LT204", "llamacpp": None},
    ),
    "head": (
        lora("lm_head", 9, 5),
        {"target_modules": ["lm_head"]},
        {"vllm": "LT204", "sglang": "LT204", "llamacpp": "LT204"},
    ),
    "parameters": (
        lora("model.layers.0.mlp.experts", 6, 5),
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {"vllm": "LT204", "sglang": "LT204", "llamacpp": "LT201", "mlx": "LT201"},
    ),
    "convolution": (
        {"c.lora_A.weight": torch.ones(4, 5, 3, 3), "c.lora_B.weight": torch.ones(6, 4, 1, 1)},
        {"target_modules": ["c"]},
        {"vllm": "LT201", "sglang": "LT201", "llamacpp": "LT201", "mlx": "LT201"},
    ),
    "adalora": (
        {
            f"{Q}.lora_A": torch.ones(4, 5),
            f"{Q}.lora_B": torch.ones(6, 4),
            f"{Q}.lora_E": torch.ones(4, 1),
        },
        {"peft_type": "ADALORA", "init_r": 4},
        {"vllm": "LT201", "sglang": "LT201", "llamacpp": "LT201"},
    ),
    "kasa": (
        lora(Q, 6, 5) | {f"{Q}.lora_diag": torch.ones(4)},
        {"kasa_config": {}},
        {"vllm": "LT201", "sglang": "LT201", "llamacpp": "LT201"},
    ),
    "pissa": (
        lora(Q, 6, 5),
        {"init_lora_weights": "pissa"},
        {"vllm": "LT203", "sglang": "LT203", "llamacpp": "LT203"},
    ),
    "activated": (
        lora(Q, 6, 5),
        {"alora_invocation_tokens": [1]},
        {"vllm": "LT203", "sglang": "LT203", "llamacpp": None},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_loaders_have_no_place_for(case: str, make_adapter: Make) -> None:
    tensors, config, fates = CASES[case]
    path = make_adapter(tensors, **(GOOD | config))
    for name, code in fates.items():
        found = codes(path, name)
        is_read = "peft" in loader_named(name).reads
        expected = ([] if is_read else ["LT201"]) + ([code] if code else [])
        assert found == sorted(expected), (name, check(path, name))


@pytest.mark.parametrize("case", ["dora", "lora bias", "saved head", "tokens", "kasa", "norms"])
def test_what_no_conversion_mends_is_refused_with_what_does(case: str, make_adapter: Make) -> None:
    tensors, config, _ = CASES[case]
    adapter = open_adapter(make_adapter(tensors, **(GOOD | config)))
    for name in LLM:
        with pytest.raises(UnsupportedError) as caught:
            refusals(adapter, loader_named(name))
        assert "loratool merge" in str(caught.value.hint)
        refusals(adapter, loader_named(name), drop=["."])


@pytest.mark.parametrize("case", ["embedding", "head", "adalora"])
def test_what_conversion_mends_or_a_base_may_take_is_not_refused(
    case: str, make_adapter: Make
) -> None:
    tensors, config, _ = CASES[case]
    adapter = open_adapter(make_adapter(tensors, **(GOOD | config)))
    for name in LLM:
        refusals(adapter, loader_named(name))


def test_what_is_dropped_is_not_refused(make_adapter: Make) -> None:
    tensors, config, _ = CASES["saved head"]
    adapter = open_adapter(make_adapter(tensors, **(GOOD | config)))
    refusals(adapter, loader_named("vllm"), drop=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight"):
        refusals(adapter, loader_named("vllm"), drop=["q_proj"])
    with pytest.raises(OptionError, match="regular expression"):
        refusals(adapter, loader_named("vllm"), drop=["("])


def test_dora_may_be_approximated(make_adapter: Make) -> None:
    tensors, config, _ = CASES["dora"]
    adapter = open_adapter(make_adapter(tensors, **(GOOD | config)))
    refusals(adapter, loader_named("vllm"), to_lora=True)
    refusals(adapter, loader_named("mlx"))
    refusals(adapter, loader_named("comfy"))


# Diffusion


UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
TEXT = "lora_te_text_model_encoder_layers_0_"


def test_mixed_alphas_of_attention_are_lost_in_diffusers(make_kohya: Make) -> None:
    path = make_kohya(
        {
            f"{UNET}attn1_to_q": (4, 4.0),
            f"{UNET}attn1_to_k": (4, 4.0),
            f"{UNET}attn2_to_k": (4, 4.0),
            f"{UNET}attn1_to_out_0": (4, 1.0),
            f"{UNET}ff_net_0_proj": (4, 2.0),
            f"{TEXT}self_attn_q_proj": (4, 8.0),
            f"{TEXT}self_attn_k_proj": (4, 8.0),
            f"{TEXT}self_attn_v_proj": (4, 2.0),
            f"{TEXT}mlp_fc1": (4, 1.0),
        }
    )
    found = {item.message for item in check(path, "diffusers") if item.code == "LT202"}
    assert len(found) == 2
    assert any(f"{4 / 4:g} instead of {1 / 4:g} to unet" in message for message in found)
    assert any(f"{8 / 4:g} instead of {2 / 4:g} to text_encoder" in message for message in found)
    assert codes(path, "comfy") == []


def test_missing_alphas_get_the_commonest_in_diffusers(make_kohya: Make) -> None:
    path = make_kohya(
        {
            f"{UNET}attn1_to_q": (4, 2.0),
            f"{UNET}attn1_to_k": (4, 2.0),
            f"{UNET}ff_net_0_proj": (8, None),
        }
    )
    assert f"{2 / 8:g} instead of 1" in only(path, "diffusers", "LT202").message
    assert codes(path, "comfy") == []


def test_uniform_alphas_and_none_at_all_are_right_in_diffusers(make_kohya: Make) -> None:
    path = make_kohya({f"{UNET}attn1_to_q": (4, 2.0), f"{UNET}ff_net_0_proj": (4, 2.0)})
    assert codes(path, "diffusers") == []
    path = make_kohya({f"{UNET}attn1_to_q": (4, None), f"{UNET}ff_net_0_proj": (8, None)})
    assert codes(path, "diffusers") == []


def test_what_diffusers_drops_of_flux(make_kohya: Make) -> None:
    path = make_kohya(
        {
            "lora_unet_double_blocks_0_img_attn_proj": (4, 1.0),
            "lora_unet_single_blocks_0_linear2": (4, 2.0),
            "lora_unet_final_layer_linear": (4, 2.0),
            "lora_unet_img_in": (4, 2.0),
        }
    )
    found = only(path, "diffusers", "LT203")
    assert "final_layer" in found.message and "2 in all" in found.message
    assert codes(path, "diffusers") == ["LT203"]  # alphas are folded


def test_sd3_has_no_converter_in_diffusers(make_kohya: Make) -> None:
    adapter = open_adapter(make_kohya({"lora_unet_joint_blocks_0_x_block_attn_proj": (4, 2.0)}))
    named = replace(adapter, family="sd3-medium")
    found = list(check_for(named, loader_named("diffusers")))
    assert any("Stable Diffusion 3" in item.message for item in found)


def test_lycoris_in_diffusers_and_comfy(make_kohya: Make) -> None:
    module = f"{UNET}attn1_to_q"
    hada = {
        f"{module}.hada_w1_a": torch.randn(16, 4),
        f"{module}.hada_w1_b": torch.randn(4, 16),
        f"{module}.hada_w2_a": torch.randn(16, 4),
        f"{module}.hada_w2_b": torch.randn(4, 16),
        f"{module}.alpha": torch.tensor(2.0),
    }
    path = make_kohya({}, hada)
    found = only(path, "diffusers", "LT201")
    assert "LoHa" in found.message and "--to-lora" in str(found.hint)
    assert codes(path, "comfy") == []
    adapter = open_adapter(path)
    with pytest.raises(UnsupportedError, match="LoHa"):
        refusals(adapter, loader_named("diffusers"))
    refusals(adapter, loader_named("diffusers"), to_lora=True)
    refusals(adapter, loader_named("comfy"))


def test_lokr_lora_mid_and_dora_in_diffusers(make_kohya: Make) -> None:
    lokr = {
        f"{UNET}attn1_to_q.lokr_w1": torch.randn(4, 4),
        f"{UNET}attn1_to_q.lokr_w2": torch.randn(4, 4),
    }
    assert "LoKr" in only(make_kohya({}, lokr), "diffusers", "LT201").message
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    mid = {
        f"{module}.lora_down.weight": torch.randn(4, 16, 1, 1),
        f"{module}.lora_mid.weight": torch.randn(4, 4, 3, 3),
        f"{module}.lora_up.weight": torch.randn(16, 4, 1, 1),
    }
    assert "lora_mid" in only(make_kohya({}, mid), "diffusers", "LT201").message
    dora = {f"{UNET}attn1_to_q.dora_scale": torch.ones(16, 1)}
    path = make_kohya({f"{UNET}attn1_to_q": (4, 2.0)}, dora)
    assert "strips the magnitudes" in only(path, "diffusers", "LT203").message
    assert codes(path, "comfy") == []


def test_alphas_outside_the_tensors_are_lost_in_comfy(tmp_path: Path) -> None:
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    fields = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["net.2"]}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(lora(module, 16, 16), path, {"lora_adapter_metadata": json.dumps(fields)})
    assert f"would apply 1 instead of {2 / 4:g}" in only(path, "comfy", "LT202").message
    assert codes(path, "diffusers") == []


def test_alpha_tensors_under_pefts_names_are_lost_in_diffusers(tmp_path: Path) -> None:
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(lora(module, 16, 16) | {f"{module}.alpha": torch.tensor(2.0)}, path)
    assert f"would apply 1 instead of {2 / 4:g}" in only(path, "diffusers", "LT202").message
    assert codes(path, "comfy") == []


@pytest.mark.parametrize(
    ("module", "ending", "family", "unknown"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", ".lora_A.weight", "", True),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
            ".lora_A.weight",
            "",
            True,
        ),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", ".lora.down.weight", "", True),
        ("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2", ".lora_A.weight", "", False),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q",
            *("_lora.down.weight", "", False),
        ),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", ".lora_A.weight", "", False),
        ("transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight", "flux", False),
        ("transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight", "sd3", False),
        ("transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight", "hunyuan-video", True),
        ("transformer.double_blocks.0.img_attn_qkv", ".lora_A.weight", "hunyuan-video", False),
        ("transformer.blocks.0.attn1.to_q", ".lora_A.weight", "wan", True),
        ("transformer_2.blocks.0.attn1.to_q", ".lora_A.weight", "wan", True),
        ("transformer.transformer_blocks.0.attn1.to_q", ".lora_A.weight", "ltx-video", True),
    ],
)
def test_names_that_comfy_does_not_look_for(
    module: str, ending: str, family: str, unknown: bool
) -> None:
    """As ``model_lora_keys_unet`` and ``LoRAAdapter.load`` of ComfyUI make and ask its list."""
    assert comfy._is_unknown(f"{module}{ending}", family) is unknown


def test_diffusers_names_of_attention_are_not_loaded_by_comfy(tmp_path: Path) -> None:
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    path, mended = tmp_path / "new.safetensors", tmp_path / "mended.safetensors"
    save_file(lora(module, 640, 640), path)
    found = only(path, "comfy", "LT203")
    assert module in found.message and "convert ADAPTER --for comfy" in str(found.hint)
    assert codes(path, "diffusers") == []
    loratool.convert(path, None, mended, target="comfy")
    assert codes(mended, "comfy") == []
    loratool.convert(path, "diffusers-legacy", tmp_path / "old.safetensors")
    assert codes(tmp_path / "old.safetensors", "comfy") == []


def test_native_names_are_read_by_diffusers_for_some_models(tmp_path: Path) -> None:
    path = tmp_path / "comfy.safetensors"
    module = "diffusion_model.double_blocks.0.img_attn.proj"
    save_file(
        {
            f"{module}.lora_down.weight": torch.ones(4, 16),
            f"{module}.lora_up.weight": torch.ones(16, 4),
        },
        path,
    )
    assert only(path, "diffusers", "LT203").severity == "warning"
    assert codes(path, "comfy") == []


# mlx


def test_mlx_files_are_right_in_mlx(make_mlx: Make) -> None:
    path = make_mlx({Q: 4, V: 4}, keys=["self_attn.q_proj", "self_attn.v_proj"])
    assert codes(path, "mlx") == []


def test_mixed_ranks_in_mlx(make_mlx: Make) -> None:
    message = only(make_mlx({Q: 2, V: 4}), "mlx", "LT201").message
    assert "2 (1 module), 4 (1 module)" in message


def test_the_configuration_of_mlx(make_mlx: Make) -> None:
    assert "rank 8" in only(make_mlx({Q: 4}, rank=8), "mlx", "LT201").message
    assert "say scale" in only(make_mlx({Q: 4}, scale=None), "mlx", "LT201").message
    path = make_mlx({Q: 4, V: 4}, keys=["self_attn.q_proj"])
    assert V in only(path, "mlx", "LT203").message


def test_modules_outside_the_blocks_and_in_some_of_them(make_mlx: Make) -> None:
    head = only(make_mlx({Q: 4, "lm_head": 4}), "mlx", "LT204")
    assert "lm_head" in head.message
    other = "model.layers.1.self_attn.q_proj"
    found = only(make_mlx({Q: 4, other: 4, V: 4}), "mlx", "LT203")
    assert found.severity == "warning" and "v_proj in some of the 2 blocks" in found.message


# Preparing


def _fused(out: int, into: int, module: str, make: Make, **config: Any) -> Adapter:
    settings = {"target_modules": [module.rpartition(".")[2]], "lora_alpha": 3, **config}
    return open_adapter(make(lora(module, out, into), **settings))


def _check_rows(parts: list[Part], whole: torch.Tensor, names: list[str], sizes: list[int]) -> None:
    assert [part.module.rpartition(".")[2] for part in parts] == names
    assert [part.up.shape[0] for part in parts] == sizes
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        assert torch.equal(dense(part), whole[start : start + size])
        assert part.down == parts[0].down and isinstance(part.up, Stored)
        start += size
    assert start == len(whole)


@pytest.mark.parametrize("name", LLM)
def test_equal_thirds_need_no_base(name: str, make_adapter: Make) -> None:
    adapter = _fused(24, 8, QKV, make_adapter)
    (part,) = parts_of(adapter)
    parts = prepare([part], loader_named(name), None)
    _check_rows(parts, dense(part), ["q_proj", "k_proj", "v_proj"], [8, 8, 8])
    assert all(made.alpha == 3 and made.scale == 3 / 4 for made in parts)
    assert all("split from qkv_proj" in made.notes[-1] for made in parts)


CONFIGS = [
    {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": 99},
    {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_grouped_queries_take_their_sizes_from_the_base(
    config: dict[str, Any], make_adapter: Make, make_base: Make
) -> None:
    adapter = _fused(16, 8, QKV, make_adapter)
    base = open_model(make_base({"model.norm.weight": torch.ones(8)}, config))
    (part,) = parts_of(adapter)
    parts = prepare([part], loader_named("vllm"), base)
    _check_rows(parts, dense(part), ["q_proj", "k_proj", "v_proj"], [8, 4, 4])


def test_shapes_of_the_base_say_it_too(make_adapter: Make, make_base: Make) -> None:
    adapter = _fused(24, 8, QKV, make_adapter)  # three times its inputs, but not in thirds
    parent = QKV.rpartition(".")[0]
    sizes = {"q_proj": 16, "k_proj": 4, "v_proj": 4}
    tensors = {f"{parent}.{leaf}.weight": torch.ones(size, 8) for leaf, size in sizes.items()}
    (part,) = parts_of(adapter)
    parts = prepare([part], loader_named("vllm"), open_model(make_base(tensors)))
    _check_rows(parts, dense(part), list(sizes), list(sizes.values()))


def test_what_the_base_has_in_one_stays_in_one(make_adapter: Make, make_base: Make) -> None:
    adapter = _fused(24, 8, QKV, make_adapter)
    base = open_model(make_base({f"{QKV}.weight": torch.ones(24, 8)}))
    (part,) = parts_of(adapter)
    (made,) = prepare([part], loader_named("vllm"), base)
    assert made.module == QKV and torch.equal(dense(made), dense(part))


def test_sizes_that_nothing_tells(make_adapter: Make, make_base: Make) -> None:
    parts = parts_of(_fused(16, 8, QKV, make_adapter))
    with pytest.raises(UnsupportedError, match="sizes") as caught:
        prepare(parts, loader_named("vllm"), None)
    assert "--base" in str(caught.value.hint)
    silent = open_model(make_base({"model.norm.weight": torch.ones(8)}))
    with pytest.raises(UnsupportedError, match="tells no sizes"):
        prepare(parts, loader_named("vllm"), silent)
    config = {"num_attention_heads": 4, "hidden_size": 8}
    other = open_model(make_base({"model.norm.weight": torch.ones(8)}, config, name="other"))
    with pytest.raises(UnsupportedError, match=r"16 outputs, but .* have 8, 8, 8"):
        prepare(parts, loader_named("vllm"), other)


def test_gates_are_halves_and_take_their_magnitudes_and_biases_along(make_adapter: Make) -> None:
    more = {
        f"{GATE_UP}.lora_magnitude_vector": torch.randn(12),
        f"{GATE_UP}.lora_B.bias": torch.randn(12),
    }
    path = make_adapter(
        lora(GATE_UP, 12, 8) | more,
        use_dora=True,
        lora_bias=True,
        target_modules=["gate_up_proj"],
    )
    (part,) = parts_of(open_adapter(path))
    parts = prepare([part], loader_named("sglang"), None)
    _check_rows(parts, dense(part), ["gate_proj", "up_proj"], [6, 6])
    for slot, value in part.values.items():
        if slot not in part.slots:
            both = np.concatenate([made.values[slot].evaluate() for made in parts])
            assert np.array_equal(both, value.evaluate())
    odd = parts_of(_fused(7, 8, GATE_UP, make_adapter, name="odd"))
    with pytest.raises(UnsupportedError, match="7 outputs"):
        prepare(odd, loader_named("vllm"), None)


def test_other_modules_and_experts_are_left_alone(make_adapter: Make) -> None:
    experts = "model.layers.0.mlp.experts"
    path = make_adapter(
        lora("transformer.h.0.attn.c_attn", 24, 8) | lora(experts, 6, 5),
        target_modules=["c_attn"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    parts = parts_of(open_adapter(path))
    assert prepare(parts, loader_named("vllm"), None) == parts
    fused = parts_of(_fused(24, 8, QKV, make_adapter, name="fused"))
    for name in ("comfy", "diffusers", "mlx"):
        assert prepare(fused, loader_named(name), None) == fused


def test_fused_modules_are_noted(make_adapter: Make) -> None:
    path = make_adapter(lora(QKV, 24, 8), target_modules=["qkv_proj"])
    found = only(path, "vllm", "LT204")
    assert "q_proj, k_proj, v_proj" in found.message and "--base" in str(found.hint)


@pytest.mark.parametrize("name", LLM)
@pytest.mark.slow
def test_one_rank_and_a_folded_scale_are_right(
    name: str, make_adapter: Make, tmp_path: Path
) -> None:
    path = make_adapter(
        lora(Q, 6, 5, rank=2) | lora(V, 6, 5, rank=4),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3},
        use_rslora=True,
        **GOOD,
    )
    before = open_adapter(path)
    rank = uniform_rank(parts_of(before), loader_named(name))
    loratool.convert(path, "peft", tmp_path / "out", fold=True, pad=rank)
    assert codes(tmp_path / "out", name) == []
    after = open_adapter(tmp_path / "out")
    assert [site.scaling.factor for site in after.sites] == [1, 1]
    for one, two in zip(parts_of(before), parts_of(after), strict=True):
        assert two.rank == rank
        torch.testing.assert_close(dense(one), dense(two), rtol=1e-6, atol=1e-6)


# Commands


RULES = [(loader.name, feature) for loader in builtin_loaders() for feature in loader.rules]


@pytest.mark.parametrize(("name", "feature"), RULES)
def test_only_what_is_read_otherwise_is_mended_by_conversion_alone(
    name: str, feature: Feature
) -> None:
    rule = loader_named(name).rules[feature]
    if rule.mend is Mend.CONVERT:
        assert feature in (Feature.PATTERNS, Feature.COMPACT)
    if rule.fate is Fate.NOTED:
        assert rule.mend is Mend.MERGE


@pytest.mark.slow
def test_validate_for_a_loader(make_adapter: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_adapter(lora(Q, 6, 5), use_rslora=True, target_modules=["q_proj"])
    assert loratool.validate(path) == ()
    assert loratool.validate(path, target="vllm") == ()
    (found,) = loratool.validate(path, target="sglang")
    assert found.code == "LT202"
    with pytest.raises(OptionError, match="none of"):
        loratool.validate(path, target="ollama")
    command = [sys.executable, "-m", "loratool", "validate", str(path), "--json", "--for"]
    for name, status, found_codes in (("llamacpp", 1, ["LT202"]), ("vllm", 0, [])):
        done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
        assert done.returncode == status
        findings = json.loads(done.stdout)["findings"]
        assert [item["code"] for item in findings] == found_codes
