"""Finding the one module that a path means: each step leaves one candidate, or is an error."""

from __future__ import annotations

import re

import pytest

from loratool.base.modules import ModuleIndex
from loratool.errors import BaseModelError

LLAMA = tuple(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 10) for p in "qk")
VISION = (
    "vision_tower.encoder.layers.0.self_attn.q_proj",
    "language_model.model.layers.0.self_attn.q_proj",
)
TOWERS = ("text_model.encoder.layers.0.fc1", "vision_model.encoder.layers.0.fc1")
ENCODERS = ("encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q")
BERT = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.output.dense")


def index(*modules: str, types: frozenset[str] = frozenset()) -> ModuleIndex:
    return ModuleIndex([f"{module}.weight" for module in modules], types)


@pytest.mark.parametrize(
    ("modules", "asked", "found"),
    [
        (LLAMA, LLAMA[0], LLAMA[0]),
        (LLAMA, "base_model.model." + LLAMA[0], LLAMA[0]),
        (LLAMA, "layers.0.self_attn.q_proj", LLAMA[0]),
        (LLAMA, "self_attn.q_proj", AssertionError),
        (LLAMA, "q_proj", AssertionError),
        (LLAMA, "layers.0.self_attn", "model.layers.0.self_attn"),
        (LLAMA, "0.self_attn.q_proj", LLAMA[0]),
        (LLAMA, "ayers.0.self_attn.q_proj", None),
        (LLAMA, "layers.2.self_attn.q_proj", None),
        (LLAMA, "foo.model.layers.1.self_attn.k_proj", LLAMA[3]),
        (VISION, "model.layers.0.self_attn.q_proj", VISION[1]),
        (VISION, "layers.0.self_attn.q_proj", VISION[1]),
        (VISION, "vision_tower.encoder.layers.0.self_attn.q_proj", VISION[0]),
        (ENCODERS, "block.0.layer.0.q", AssertionError),
        (ENCODERS, "decoder.block.0.layer.0.q", ENCODERS[1]),
        (ENCODERS[:1], "decoder.block.0.layer.0.q", None),
        (BERT, "encoder.layer.0.output.dense", BERT[1]),
        (("h.0.attn.c_attn",), "transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
    ],
)
def test_a_path_means_one_module_or_none(
    modules: tuple[str, ...], asked: str, found: str | type | None
) -> None:
    if found is AssertionError:
        with pytest.raises(BaseModelError, match=r"could be any of \d+ modules of the base"):
            index(*modules).find(asked)
    else:
        assert index(*modules).find(asked) == found


def test_towers_are_dropped_only_where_there_is_one() -> None:
    asked = "encoder.layers.0.fc1"
    with pytest.raises(BaseModelError, match="could be any of 2"):
        index(*TOWERS, types=frozenset({"clip_text_model", "clip_vision_model"})).find(asked)
    assert index(TOWERS[0]).find(asked) == TOWERS[0]


def test_a_parameter_narrows_the_candidates() -> None:
    names = ["a.mlp.experts.down_proj", "b.mlp.experts.0.weight"]
    found = ModuleIndex(names)
    assert found.find("mlp.experts", parameter="down_proj") == "a.mlp.experts"
    assert found.find("mlp.experts", parameter="weight") is None
    with pytest.raises(BaseModelError, match=re.escape("a.mlp.experts, b.mlp.experts")):
        found.find("mlp.experts")


def test_many_endings_alike_are_told_apart_by_what_is_before_them() -> None:
    modules = [f"{side}.blocks.3.attn.to_q" for side in ("left", "right")]
    found = index(*modules)
    assert found.find("right.blocks.3.attn.to_q") == modules[1]
    with pytest.raises(BaseModelError):
        found.find("blocks.3.attn.to_q")


def test_the_nearest_are_of_the_same_kind() -> None:
    assert index(*LLAMA).nearest("model.layers.2.self_attn.q_proj")[0].endswith("q_proj")
