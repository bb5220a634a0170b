"""The cut of the adapter × the cut of the base × tie × codec: ``find`` alone answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.finding import find_fakes

from loratool.base.model import Model, open_model
from loratool.base.values import read_place
from loratool.errors import BaseModelError, UnsupportedError

ATTENTION = "model.layers.0.self_attn"
EXPERTS = "model.layers.0.mlp.experts"
HIDDEN, HEADS, GROUPS, SIZE = 14, 4, 1, 3
Q, KV = HEADS * SIZE, GROUPS * SIZE
ROWS = {"q_proj": (0, Q), "k_proj": (Q, Q + KV), "v_proj": (Q + KV, Q + 2 * KV)}
CONFIG = {
    "model_type": "trifold",
    "architectures": ["TrifoldForCausalLM"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "hidden_size": HIDDEN,
    "dtype": "bfloat16",
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


@pytest.fixture
def opened(make_base: Callable[..., Path]) -> Callable[..., Model]:
    """Write a model and open it."""
    return lambda *args, **options: open_model(make_base(*args, **options))


def coded(name: str, weight: torch.Tensor) -> Tensors:
    """Return a weight as the fake codec stores it: its values change to those of the codes."""
    rows, columns = weight.shape
    grid = (-(-rows // 5), -(-columns // 7))
    scales, shifts = torch.rand(grid) + 0.5, torch.randn(grid)
    codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
    spread = [g.repeat_interleave(5, 0).repeat_interleave(7, 1)[:rows, :columns].double()
              for g in (scales, shifts)]  # fmt: skip
    weight.copy_(codes.double() * spread[0] + spread[1])
    module = name.removesuffix(".weight")
    parts = {"codes": codes, "scales": scales, "shifts": shifts}
    return {f"{module}.blocked_{part}": value for part, value in parts.items()}


def base(*, fused: bool, codec: bool, transposed: bool = False) -> tuple[Tensors, Tensors]:
    """Return the tensors of a model, and the float64 truth of the attention's parts."""
    whole = torch.randn(Q + 2 * KV, HIDDEN, dtype=torch.float64)
    stored: Tensors = {}
    if fused:
        name = f"{ATTENTION}.wqkv.weight"
        stored |= coded(name, whole) if codec else {name: whole.clone()}
    for part, (start, stop) in ROWS.items() if not fused else ():
        name, rows = f"{ATTENTION}.{part}.weight", whole[start:stop]
        stored |= coded(name, rows) if codec else {name: rows.clone()}
    truth = {part: whole[start:stop] for part, (start, stop) in ROWS.items()}
    return stored, truth | {"wqkv": whole}


@pytest.mark.parametrize("codec", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("asked", ["q_proj", "k_proj", "v_proj", "wqkv"])
def test_a_projection_is_found_whichever_way_it_is_cut(
    asked: str, fused: bool, codec: bool, opened: Callable[..., Model]
) -> None:
    stored, truth = base(fused=fused, codec=codec)
    place = opened(stored, CONFIG).find(f"{ATTENTION}.{asked}")

    assert place is not None
    assert place.shape == tuple(truth[asked].shape)
    assert place.codec == ("blocked" if codec else None)
    assert place.dtype == ("BF16" if codec else "F64")
    assert len(place.pieces) == (3 if asked == "wqkv" and not fused else 1)
    assert place.is_whole == (fused == (asked == "wqkv"))
    assert np.array_equal(read_place(place), truth[asked].numpy())


def test_rows_of_a_fused_projection_that_do_not_add_up_are_refused(
    opened: Callable[..., Model],
) -> None:
    stored, _ = base(fused=True, codec=False)
    model = opened(stored, CONFIG | {"head_dim": SIZE + 1})
    with pytest.raises(BaseModelError, match=r"wqkv: has 18 rows"):
        model.find(f"{ATTENTION}.q_proj")


def experts(*, fused: bool, transposed: bool) -> tuple[Tensors, Tensors]:
    """Return two experts of 4 → 6 → 4, and the truth of each projection."""
    gate_up, down = torch.randn(2, 12, 4), torch.randn(2, 4, 6)
    truth = {f"{EXPERTS}.{e}.down_proj": down[e] for e in range(2)}
    for e in range(2):
        truth |= {
            f"{EXPERTS}.{e}.gate_proj": gate_up[e, :6],
            f"{EXPERTS}.{e}.up_proj": gate_up[e, 6:],
        }
    if not fused:
        return {f"{name}.weight": weight.clone() for name, weight in truth.items()}, truth
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    return {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": down}, truth


@pytest.mark.parametrize(("fused", "transposed"), [(False, False), (True, False), (True, True)])
def test_an_expert_is_found_in_a_stack_and_alone(
    fused: bool, transposed: bool, opened: Callable[..., Model]
) -> None:
    stored, truth = experts(fused=fused, transposed=transposed)
    model = opened(stored, {"model_type": "aria" if transposed else "qwen3_moe"})
    for module, weight in truth.items():
        place = model.find(module)
        assert place is not None
        assert place.shape == tuple(weight.shape)
        found = read_place(place)
        assert np.array_equal(found.T if transposed else found, weight.double().numpy())


@pytest.mark.parametrize("fused", [False, True])
def test_a_stack_is_found_in_one_parameter_and_in_a_tensor_for_each_expert(
    fused: bool, opened: Callable[..., Model]
) -> None:
    stored, _ = experts(fused=fused, transposed=False)
    place = opened(stored, {"model_type": "qwen3_moe"}).find(f"{EXPERTS}.gate_up_proj")
    assert place is not None
    assert (place.shape, place.experts) == ((12, 4), 2)
    names = [piece.name.removeprefix(f"{EXPERTS}.") for piece in place.pieces]
    assert names == (
        ["gate_up_proj"]
        if fused
        else [f"{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up")]
    )


def test_interleaved_experts_are_refused_by_name(opened: Callable[..., Model]) -> None:
    stored, _ = experts(fused=True, transposed=True)
    model = opened(stored, {"model_type": "gpt_oss"})
    with pytest.raises(UnsupportedError, match="interleaves"):
        model.find(f"{EXPERTS}.0.gate_proj")
    assert model.find(f"{EXPERTS}.0.down_proj") is not None


CAUSAL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("codec", [False, True])
@pytest.mark.parametrize(
    ("config", "head", "is_tied"),
    [
        (CAUSAL | {"tie_word_embeddings": True}, None, True),
        (CAUSAL | {"tie_word_embeddings": True}, "same", True),
        (CAUSAL | {"tie_word_embeddings": True}, "other", False),
        (CAUSAL | {"tie_word_embeddings": False}, "same", False),
        (CAUSAL, None, True),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": False}}, "same", False),
    ],
)
def test_a_tied_head_is_the_embedding_the_other_way_round(
    config: dict[str, Any],
    head: str | None,
    is_tied: bool,
    codec: bool,
    opened: Callable[..., Model],
) -> None:
    table = torch.randn(9, 4)
    stored = {"model.embed_tokens.weight": table}
    if head is not None:
        stored["lm_head.weight"] = table.clone() if head == "same" else table + 1
    if codec:  # a coded layer beside them changes nothing
        stored |= coded("model.layers.0.mlp.up_proj.weight", torch.empty(6, 4, dtype=torch.float64))
    model = opened(stored, config)
    places = [model.find(module) for module in ("model.embed_tokens", "lm_head")]
    embedding, output = places
    assert embedding is not None and embedding.is_transposed and embedding.shape == (4, 9)
    assert output is not None and not output.is_transposed and output.shape == (9, 4)
    assert (embedding.tie is not None) == (output.tie is not None) == is_tied
    assert output.pieces[0].name == "lm_head.weight"
    wanted = stored.get("lm_head.weight", table)
    assert np.array_equal(read_place(output), wanted.double().numpy())


@pytest.mark.parametrize(
    ("shapes", "config", "expected"),
    [
        ({"c_attn": (8, 24), "c_proj": (8, 8)}, None, True),
        ({"c_attn": (24, 8), "c_proj": (8, 8)}, None, False),
        ({"c_attn": (24, 8), "c_proj": (8, 8)}, {"model_type": "gpt2"}, False),
        ({"c_attn": (8, 24), "c_proj": (8, 8)}, {"model_type": "unknown"}, True),
        ({"c_proj": (8, 8)}, {"model_type": "gpt2"}, True),
        ({"c_proj": (8, 8)}, {"model_type": "x", "text_config": {"model_type": "gpt2"}}, True),
        ({"c_proj": (8, 8)}, {"model_type": "llama"}, False),
        ({"c_proj": (8, 8)}, None, None),
        ({"q_proj": (8, 8)}, {"model_type": "llama"}, False),
        ({"q_proj": (8, 8)}, None, None),
    ],
)
def test_a_conv1d_is_told_by_its_like_and_then_by_the_model_type(
    shapes: dict[str, tuple[int, int]],
    config: dict[str, Any] | None,
    expected: bool | None,
    opened: Callable[..., Model],
) -> None:
    stored = {f"h.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    model = opened(stored, config)
    square = next(name for name, shape in shapes.items() if shape == (8, 8))
    assert model.is_conv1d(f"h.0.{square}") is expected
    place = model.find(f"h.0.{square}")
    assert place is not None and place.is_transposed == bool(expected)


def test_a_module_that_is_nowhere_names_the_nearest(opened: Callable[..., Model]) -> None:
    model = opened({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)})
    assert model.find("model.layers.0.mlp.down_proj") is None
    with pytest.raises(BaseModelError, match="no such module") as error:
        model.place("model.layers.3.mlp.up_proj")
    assert "model.layers.0.mlp.up_proj" in (error.value.hint or "")


def test_modules_go_by_the_names_that_a_layout_gives_them(opened: Callable[..., Model]) -> None:
    model = opened({"blk.0.mlp.up_proj.weight": torch.zeros(2, 3)}, CONFIG)
    place = model.find("model.layers.0.mlp.up_proj")
    assert place is not None
    assert (place.module, place.pieces[0].name) == (
        "model.layers.0.mlp.up_proj",
        "blk.0.mlp.up_proj.weight",
    )
    assert model.layout.name == "trifold"
    assert list(model.modules) == ["model.layers.0.mlp.up_proj"]


def test_a_pipeline_is_found_by_component(make_base: Callable[..., Path]) -> None:
    root = make_base({"unused.weight": torch.zeros(1, 1)}, name="pipeline")
    (root / "model.safetensors").unlink()
    make_base({"mid_block.attn.to_q.weight": torch.ones(4, 3)}, name="pipeline/unet")
    make_base({"encoder.layers.0.q_proj.weight": torch.zeros(2, 2)}, name="pipeline/text_encoder")
    model = open_model(root)
    assert model.layout.name == "diffusers"
    assert model.components == ("unet", "text_encoder")
    for asked in ("unet.mid_block.attn.to_q", "mid_block.attn.to_q"):
        place = model.find(asked)
        assert place is not None and place.module == "unet.mid_block.attn.to_q"
    with pytest.raises(BaseModelError, match="a pipeline of unet, text_encoder"):
        _ = model.checkpoint
