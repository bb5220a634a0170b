"""Folded names stand for exactly the names, as a shell's braces would."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.display.folding import fold_names, fold_numbers, shortened
from loratool.display.grouping import layer_of, pattern_of


def expand(pattern: str) -> list[str]:
    """Expand the innermost braces first, until there are none."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    options: list[str] = []
    for item in match[1].split(","):
        first, dots, last = item.partition("..")
        options += map(str, range(int(first), int(last) + 1)) if dots else [item]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for option in options for name in expand(f"{before}{option}{after}")]


def test_folding_numbers() -> None:
    assert fold_numbers([3]) == "3"
    assert fold_numbers([0, 1, 2, 3]) == "{0..3}"
    assert fold_numbers([0, 1]) == "{0,1}"
    assert fold_numbers([0, 2, 5, 6, 7]) == "{0,2,5..7}"


def test_layers_and_projections_fold() -> None:
    names = [
        f"model.layers.{layer}.{module}"
        for layer in range(4)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        if (layer, module) != (2, "mlp.down_proj")
    ] + ["lm_head", "model.layers.7.self_attn.q_proj"]
    folded = fold_names(names)
    assert len(folded) < len(names)
    assert sorted(name for pattern in folded for name in expand(pattern)) == sorted(names)
    assert fold_names(["a.0.q_proj", "a.1.q_proj", "a.0.v_proj", "a.1.v_proj"]) == [
        "a.{0,1}.{q,v}_proj"
    ]
    assert fold_names([]) == []


def test_children_at_two_depths_fold() -> None:
    block = "down.0.transformer_blocks"
    names = [
        f"{block}.{layer}.{module}"
        for layer in range(3)
        for module in ("attn1.to_q", "attn1.to_k", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]
    assert fold_names(names) == [
        f"{block}.{{0..2}}.attn1.to_{{q,k,out.0}}",
        f"{block}.{{0..2}}.ff.net.{{0.proj,2}}",
    ]


PARTS = st.sampled_from(["0", "1", "2", "q_proj", "k_proj", "to_q", "to_out", "net", "proj", "a"])


@given(st.sets(st.lists(PARTS, min_size=1, max_size=5).map(".".join), max_size=30))
def test_folded_names_stand_for_exactly_the_names(names: set[str]) -> None:
    folded = fold_names(sorted(names))
    assert sorted(name for pattern in folded for name in expand(pattern)) == sorted(names)


def test_a_phrase_of_many_names_says_how_many_more() -> None:
    assert shortened([f"name{i}" for i in range(10)])[-2:] == ("name7", "and 2 more")


def test_numbers_inside_words_fold() -> None:
    assert fold_names([f"lora_odd_{number}_x" for number in range(30)]) == ["lora_odd_{0..29}_x"]


@pytest.mark.parametrize("word", ["²", "٣", "9" * 5000, "00", "01"])
def test_what_only_looks_like_a_number_is_a_word(word: str) -> None:
    for names in ([f"a.{word}.b", "a.0.b", "a.1.b"], [f"a_{word}_x", "a_0_x", "a_1_x"]):
        assert sorted(name for p in fold_names(names) for name in expand(p)) == sorted(names)
    assert pattern_of(f"a.{word}.b") == f"a.{word}.b"
    assert layer_of(f"a.{word}.b") is None
