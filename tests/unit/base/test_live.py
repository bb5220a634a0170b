"""Modules by the names of the live model, on files that have others, cut and ordered otherwise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.base.model import Model, open_model
from loratool.base.region import Region
from loratool.base.values import read_place
from loratool.errors import BaseModelError, MissingModuleError, UnsupportedError

HIDDEN, HEADS = 12, 2
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def opened(make_base: Callable[..., Path]) -> Callable[..., Model]:
    """Write a model of a type and open it."""

    def write(tensors: Tensors, model_type: str, name: str = "", **config: Any) -> Model:
        told = {"model_type": model_type, "architectures": [name] if name else [], **config}
        return open_model(make_base(tensors, config=told, name=f"base{next(numbers)}"))

    numbers = count()
    return write


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def halves(paired: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows in pairs as rows in halves, head by head."""
    out = []
    for rows in paired.chunk(heads):
        out += [rows[0::2], rows[1::2]]
    return torch.cat(out)


def test_a_renamed_module_is_found_by_all_its_names(opened: Callable[..., Model]) -> None:
    weight = random(6, HIDDEN)
    disk, live = (
        "model.layers.0.mlp.shared_mlp.up_proj",
        "model.layers.0.mlp.shared_experts.up_proj",
    )
    for stored in (disk, live):
        model = opened({f"{stored}.weight": weight}, "hy_v3", "HYV3ForCausalLM")
        for asked in (disk, live):
            assert np.array_equal(read_place(model.place(asked)), weight.numpy())


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_parts_and_whole_find_each_other(part: str, opened: Callable[..., Model]) -> None:
    whole = random(18, HIDDEN)
    rows = dict(zip(("q_proj", "k_proj", "v_proj"), whole.chunk(3), strict=True))
    disk, live = "encoder.layers.0.attn.Wqkv", "nomic_bert.layers.0.self_attn"
    kind = ("nomic_bert", "NomicBertForMaskedLM")
    name = f"nomic_bert.{disk}"
    fused = opened({f"{name}.weight": whole}, *kind)
    assert np.array_equal(read_place(fused.place(f"{live}.{part}")), rows[part].numpy())
    apart = opened({f"{live}.{k}.weight": v for k, v in rows.items()}, *kind)
    assert np.array_equal(read_place(apart.place(name)), whole.numpy())


def test_pairs_of_the_files_are_halves_of_the_live_model(opened: Callable[..., Model]) -> None:
    whole = random(3 * HIDDEN, HIDDEN)
    disk = "vision_tower.encoder.blocks.0.wqkv"
    live = "model.vision_tower.layers.0.attn"
    kind = ("kimi_k25", "Kimi_K25ForConditionalGeneration")
    config = {"vision_config": {"num_attention_heads": HEADS, "model_type": "kimi_k25_vision"}}
    q, k, v = whole.chunk(3)
    truth = {"q_proj": halves(q, HEADS), "k_proj": halves(k, HEADS), "v_proj": v}
    model = opened({f"{disk}.weight": whole}, *kind, **config)
    for part, values in truth.items():
        assert np.array_equal(read_place(model.place(f"{live}.{part}")), values.numpy())
    apart = opened({f"{live}.{p}.weight": w for p, w in truth.items()}, *kind, **config)
    assert np.array_equal(read_place(apart.place(disk)), whole.numpy())


def test_rows_of_unequal_parts_are_those_of_the_heads(opened: Callable[..., Model]) -> None:
    whole = random(16, HIDDEN)
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": 12}
    base = {"model.layers.0.self_attn.qkv_proj.weight": whole}
    model = opened(base, "phi3", "Phi3ForCausalLM", **config)
    parts = {"q_proj": whole[:8], "k_proj": whole[8:12], "v_proj": whole[12:]}
    for part, rows in parts.items():
        place = model.place(f"model.layers.0.self_attn.{part}")
        assert np.array_equal(read_place(place), rows.numpy())
    with pytest.raises(BaseModelError, match="16 rows, which are not those of"):
        opened(base, "phi3", "Phi3ForCausalLM").find("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("model_type", ["gpt_neox", "codegen", "minimax", "phi4_multimodal"])
def test_what_others_have_in_one_is_mixed_and_not_guessed(
    model_type: str, opened: Callable[..., Model]
) -> None:
    base = {f"model.layers.0.mlp.{leaf}.weight": random(12, 4) for leaf in ("gate_up_proj", "x")}
    model = opened(base, model_type, num_attention_heads=1, hidden_size=4)
    with pytest.raises(MissingModuleError, match="has no such module"):
        model.place("model.layers.0.mlp.gate_proj")


def test_experts_without_a_gate_are_a_stack(opened: Callable[..., Model]) -> None:
    ups = [random(5, HIDDEN) for _ in range(3)]
    base = {f"backbone.layers.0.mixer.experts.{i}.up_proj.weight": up for i, up in enumerate(ups)}
    model = opened(base, "nemotron_h", "NemotronHForCausalLM")
    place = model.place("model.layers.0.mixer.experts.up_proj")
    assert (place.shape, place.experts, len(place.pieces)) == ((5, HIDDEN), 3, 3)


def test_experts_of_which_one_is_missing_are_refused(opened: Callable[..., Model]) -> None:
    base = {f"model.layers.0.mixer.experts.{i}.up_proj.weight": random(5, 4) for i in (0, 2)}
    model = opened(base, "nemotron_h", "NemotronHForCausalLM")
    with pytest.raises(BaseModelError, match="do not have all of its experts"):
        model.place("model.layers.0.mixer.experts.up_proj")


def test_experts_stored_as_in_by_out_are_turned(opened: Callable[..., Model]) -> None:
    base = {"llm.model.layers.0.mixer.experts.gate_and_up_projs": random(2, 7, 7)}
    model = opened(base, "nemo_speechlm")
    place = model.place("model.language_model.layers.0.mixer.experts.up_proj")
    assert place.is_transposed
    assert (
        not opened({"model.layers.0.mixer.experts.up_proj": random(2, 7, 7)}, "nemotron_h")
        .place("model.layers.0.mixer.experts.up_proj")
        .is_transposed
    )


def test_gate_and_up_row_by_row_are_no_single_expert_s(opened: Callable[..., Model]) -> None:
    base = {"model.llm.layers.0.mlp.experts.w13_weight": random(2, 8, HIDDEN)}
    model = opened(base, "inkling2_text", "Inkling2ForCausalLM")
    place = model.place("model.layers.0.mlp.experts.gate_up_proj")
    assert [piece.region.exchanged for piece in place.pieces] == [(1, 2, 4)]


def test_what_the_files_hold_in_shards_is_refused(opened: Callable[..., Model]) -> None:
    base = {f"model.ngram_embedding.shard_{i}.weight": random(4, 3) for i in range(2)}
    model = opened(base, "qwen4_exp_text", "Qwen4ExpForCausalLM")
    with pytest.raises(UnsupportedError, match="in shards"):
        model.find("model.ngram_embedding")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_an_exchange_of_rows_undoes_itself(heads: int, outer: int, inner: int, width: int) -> None:
    rows = heads * outer * inner
    values = np.arange(rows * width).reshape(rows, width)
    region = Region(rows, width, exchanged=(heads, outer, inner))
    assert np.array_equal(region.ordered(region.stored(values)), values)
    stored = region.stored(values).reshape(heads, inner, outer, width)
    seen = values.reshape(heads, outer, inner, width)
    assert np.array_equal(stored[0, inner - 1, 0], seen[0, 0, inner - 1])


def test_flattened_names_may_be_those_of_either(opened: Callable[..., Model]) -> None:
    base = {
        "nomic_bert.encoder.layers.0.attn.Wqkv.weight": random(18, HIDDEN),
        "nomic_bert.encoder.layers.0.mlp.fc2.weight": random(HIDDEN, 5),
    }
    paths = opened(base, "nomic_bert", "NomicBertForMaskedLM").paths
    for path in (
        "encoder.layers.0.attn.Wqkv",
        "layers.0.self_attn.k_proj",
        "layers.0.mlp.down_proj",
    ):
        assert f"nomic_bert.{path}" in paths
    assert len(set(paths)) == len(paths)


def test_pairs_without_the_number_of_heads_are_refused(opened: Callable[..., Model]) -> None:
    disk = {"vision_tower.encoder.blocks.0.wqkv.weight": random(36, HIDDEN)}
    live = {
        f"model.vision_tower.layers.0.attn.{part}_proj.weight": random(HIDDEN, HIDDEN)
        for part in "qkv"
    }
    kind = ("kimi_k25", "Kimi_K25ForConditionalGeneration")
    with pytest.raises(UnsupportedError, match="does not tell the heads"):
        opened(disk, *kind).find("model.vision_tower.layers.0.attn.q_proj")
    with pytest.raises(UnsupportedError, match="does not tell the heads"):
        opened(live, *kind).find("vision_tower.encoder.blocks.0.wqkv")


def test_a_parameter_that_the_files_have_twice_is_refused(opened: Callable[..., Model]) -> None:
    layer = "model.layers.0.mlp"
    names = (f"{layer}.shared_mlp.up_proj", f"{layer}.shared_experts.up_proj")
    both = {f"{name}.weight": random(3, 4) for name in names}
    model = opened(both, "hy_v3", "HYV3ForCausalLM")
    for name in names:  # each by the name that it has
        (piece,) = model.place(name).pieces
        assert piece.name == f"{name}.weight"
    kind = ("kimi_linear", "KimiLinearForCausalLM")
    blocks = ("block_sparse_moe", "mlp")
    twice = {f"model.layers.1.{b}.experts.0.w2.weight": random(3, 4) for b in blocks}
    with pytest.raises(UnsupportedError, match="an expert of it twice"):
        opened(twice, *kind).find("model.layers.1.mlp.experts.down_proj")


@pytest.mark.parametrize("kind", ["files", "live"])
def test_experts_of_text_and_images_are_in_one_list(
    kind: str, opened: Callable[..., Model]
) -> None:
    text, image = random(2, 5, HIDDEN), random(2, 5, HIDDEN)
    layer = "model.language_model.layers.1.mlp"
    base = {f"{layer}.text_moe.experts.down_proj": text}
    base[f"{layer}.vision_moe.experts.down_proj"] = image
    if kind == "files":
        listed = [*text, *image]
        base = {f"model.layers.1.mlp.experts.{i}.down_proj.weight": w for i, w in enumerate(listed)}
    model = opened(base, "ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration")
    for first, part in enumerate(("text_moe", "vision_moe")):
        place = model.place(f"{layer}.{part}.experts.down_proj")
        assert (place.experts, place.shape) == (2, (5, HIDDEN))
        if kind == "files":
            found = [piece.name.split(".")[-3] for piece in place.pieces]
            assert found == [str(2 * first), str(2 * first + 1)]
    for expert, values in enumerate((*text, *image)):
        place = model.place(f"model.layers.1.mlp.experts.{expert}.down_proj")
        assert np.array_equal(read_place(place), values.numpy())
