"""Adapters: patterns as PEFT matches them, scaling, sites, schemes, opening."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from samples import lora

from loratool import open_adapter
from loratool.adapter.build import strip_wrappers
from loratool.adapter.config import parse_config
from loratool.adapter.model import ExtraKind, Kind
from loratool.adapter.patterns import matches_target, pattern_value
from loratool.adapter.scaling import Scaling
from loratool.errors import AdapterError, LoratoolError, UnsupportedError

Make = Callable[..., Path]
MODULES = [
    "q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.xq_proj",
    "model.layers.0.mlp.experts.down_proj",
]
PATTERNS = [
    "q_proj",
    "proj",
    "self_attn",
    "layers.1.self_attn.q_proj",
    r"^model\.layers\.1\.self_attn\.q_proj",
    "^q_proj",
    ".*_proj",
    "q_proj|down_proj",
    "q_proj$",
    "layers.[01]",
    "base_model.model.q_proj",
    "mlp.experts.down_proj",
    "",
]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_patterns_match_as_in_peft(module: str) -> None:
    from peft.utils.other import get_pattern_key

    for pattern in PATTERNS:
        is_hit = get_pattern_key([pattern], module) == pattern
        assert (pattern_value({pattern: 1}, module, 0) == 1) == is_hit, pattern


def test_first_pattern_in_file_order_wins() -> None:
    assert pattern_value({".*_proj": 30, "q_proj": 40}, "a.q_proj", 8) == 30
    assert pattern_value({"q_proj": 40, ".*_proj": 30}, "a.q_proj", 8) == 40


def test_targets_are_suffixes_in_lists_and_expressions_in_strings() -> None:
    assert matches_target(("q_proj",), "a.q_proj")
    assert not matches_target(("attn.q_proj",), "self_attn.q_proj")
    assert not matches_target("q_proj", "a.q_proj")
    assert matches_target(r".*\.q_proj", "a.q_proj")


def test_bad_patterns_are_one_clear_error() -> None:
    with pytest.raises(AdapterError, match="regular expression"):
        pattern_value({"(": 1}, "a", 0)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (Scaling(16, 8), 2.0),
        (Scaling(16, 4, rank_stabilised=True), 8.0),
        (Scaling(None, 4), 1.0),
        (Scaling(0, 4), 0.0),
        (Scaling(-4, 8), -0.5),
        (Scaling(8, 12, epsilon=1e-5), 8 / (12 + 1e-5)),
    ],
)
def test_scale(scaling: Scaling, factor: float) -> None:
    assert math.isclose(scaling.factor, factor, rel_tol=1e-15)


def test_sites_of_every_kind(make_adapter: Make) -> None:
    adapter = open_adapter(
        make_adapter(
            lora("a.q", 6, 5)
            | {
                "a.conv.lora_A.weight": torch.ones(4, 3, 2, 2),
                "a.conv.lora_B.weight": torch.ones(7, 4, 1, 1),
                "a.emb.lora_embedding_A": torch.ones(4, 10),
                "a.emb.lora_embedding_B": torch.ones(8, 4),
                "a.d.lora_A.weight": torch.ones(4, 5),
                "a.d.lora_B.weight": torch.ones(6, 4),
                "a.d.lora_magnitude_vector": torch.ones(6),
                "score.weight": torch.ones(2, 3),
                "a.emb2.token_adapter.trainable_tokens_delta": torch.ones(2, 3),
                "a.q.base_layer.bias": torch.ones(6),
                "a.emb.base_layer.weight": torch.ones(10, 8),
            }
        )
    )
    sites = {site.module: site for site in adapter.sites}
    assert sites["a.q"].kind is Kind.LINEAR
    assert (sites["a.q"].in_features, sites["a.q"].out_features) == (5, 6)
    assert sites["a.conv"].kind is Kind.CONV
    assert sites["a.emb"].kind is Kind.EMBEDDING
    assert sites["a.d"].variant.name == "dora"
    extras = {extra.name: extra.kind for extra in adapter.extras}
    assert extras == {
        "score.weight": ExtraKind.FULL,
        "a.emb2": ExtraKind.ROWS,
        "a.q.bias": ExtraKind.FULL,
        "a.emb.weight": ExtraKind.BASE_COPY,
    }


def test_wrappers_are_stripped() -> None:
    assert strip_wrappers("base_model.model.a.b") == "a.b"
    assert strip_wrappers("_orig_mod.base_model.model.module.a") == "a"
    assert strip_wrappers("model.layers.0._orig_mod.q") == "model.layers.0.q"


def test_adapter_names_inside_keys(make_adapter: Make) -> None:
    tensors = {}
    for name in ("one", "two"):
        tensors |= {
            f"a.lora_A.{name}.weight": torch.ones(4, 3),
            f"a.lora_B.{name}.weight": torch.ones(5, 4),
        }
    path = make_adapter(tensors)
    with pytest.raises(AdapterError, match="one, two"):
        open_adapter(path)
    with pytest.raises(AdapterError, match="no adapter 'three'"):
        open_adapter(path, adapter_name="three")
    chosen = open_adapter(path, adapter_name="two")
    assert chosen.name == "two"
    assert len(chosen.tensors) == 2


def test_keys_that_mean_the_same_are_refused(make_adapter: Make) -> None:
    path = make_adapter(lora("a", 3, 3) | lora("base_model.model.a", 3, 3))
    with pytest.raises(AdapterError, match="two tensors"):
        open_adapter(path)


def test_skip_leaves_keys_out_and_reports_them(make_adapter: Make) -> None:
    path = make_adapter(lora("a", 3, 3) | lora("b", 3, 3))
    adapter = open_adapter(path, skip=[r"\.b\."])
    assert [site.module for site in adapter.sites] == ["a"]
    assert len(adapter.skipped) == 2


def test_safetensors_win_over_bin_and_it_is_said(make_adapter: Make) -> None:
    path = make_adapter(lora("a", 3, 3))
    torch.save({}, path / "adapter_model.bin")
    adapter = open_adapter(path)
    assert adapter.weights.suffix == ".safetensors"
    assert any("adapter_model.bin" in note for note in adapter.notes)


def test_weights_under_another_name(make_adapter: Make) -> None:
    path = make_adapter(lora("a", 3, 3))
    (path / "adapter_model.safetensors").rename(path / "Copy of adapter_model.safetensors")
    assert len(open_adapter(path).sites) == 1


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("layers.0.attn.q_proj.lora_q_a.weight", "under names of their own"),
        ("lycoris_q.lambda_layer", "timestep"),
        ("x.adapter_down.weight", "bottleneck"),
        ("model.layers.0.q_proj.weight", "none of its"),
    ],
)
def test_unknown_schemes_are_described(key: str, words: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=words):
        open_adapter(tmp_path)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "XLORA", "LILY", "SOMETHING_NEW"])
def test_other_peft_types_are_refused_by_name(kind: str, make_adapter: Make) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        open_adapter(make_adapter(lora("a", 3, 3), peft_type=kind))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": "8"},
        {"r": -1},
        {"r": 2.5},
        {"lora_alpha": "x"},
        {"lora_alpha": float("nan")},
        {"rank_pattern": ["x"]},
        {"rank_pattern": {"a": "4"}},
        {"alpha_pattern": {"a": None}},
        {"target_modules": 7},
        {"modules_to_save": [1]},
        {"peft_type": 3},
    ],
)
def test_wrong_configurations_are_one_clear_error(settings: dict[str, Any]) -> None:
    with pytest.raises(LoratoolError):
        parse_config(settings, where="adapter_config.json")


def test_configurations_as_real_files_have_them() -> None:
    config = parse_config(
        {
            "peft_type": "LORA",
            "use_rslora": 0,
            "use_dora": None,
            "init_lora_weights": 1,
            "rank_pattern": None,
            "modules_to_save": ["classifier", "classifier"],
            "lora_alpha": 0.5,
            "target_modules": "all-linear",
        },
        where="x",
    )
    assert (config.rank, config.alpha, config.use_rslora) == (8, 0.5, False)
    assert config.modules_to_save == ("classifier",)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.|.)*Y", "((a|b)*)*", "(?:x*)*", ".*" * 20])
def test_patterns_that_backtracking_could_take_for_ever_to_match(pattern: str) -> None:
    expected = 1 if pattern in ("((a|b)*)*", "(?:x*)*", ".*" * 20) else 0
    name = "model.layers.0.self_attn.q_proj"
    assert pattern_value({f"{pattern}.?q_proj": 1}, name, 0) == expected
    assert pattern_value({f"{pattern}b": 1}, name, 0) == 0


def test_long_patterns_of_real_tools_are_fine() -> None:
    parts = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    names = "(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)"
    pattern = (
        rf"(?:.*?(?:language|text).*?{parts}.*?{names}.*?)"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.{parts}\.(?:{names}))"
    )
    assert matches_target(pattern, "model.layers.11.self_attn.q_proj")
    assert matches_target(pattern, "model.language_model.layers.3.mlp.down_proj")
    assert not matches_target(pattern, "model.vision_tower.layers.3.mlp.fc9")


def test_places_that_are_neither_file_nor_folder(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    for place in (tmp_path / "pipe.safetensors", Path("/dev/null")):
        with pytest.raises(AdapterError, match="neither"):
            open_adapter(place)


def test_an_expression_of_any_length_is_refused_a_name_is_not() -> None:
    assert pattern_value({"a" * 3000: 1}, "a" * 3000, 0) == 1
    with pytest.raises(AdapterError, match="characters long"):
        pattern_value({"a|" * 3000: 1}, "a", 0)
