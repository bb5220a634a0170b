"""Folded text: nothing is lost, no line is too wide, and no word is cut that would fit."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from loratool.display.wrapping import INDENT, width_of, wrapped

WORDS = st.from_regex(r"[a-z][a-z0-9_{},]{0,11}", fullmatch=True)
NAMES = st.lists(WORDS, min_size=1).map(".".join)
TEXTS = st.text(st.characters(exclude_categories=("C", "Z")), max_size=80) | NAMES


def joined(lines: list[str]) -> str:
    return "".join(line.removeprefix(INDENT if index else "") for index, line in enumerate(lines))


@given(TEXTS, st.integers(8, 60))
def test_nothing_is_lost_and_every_line_fits(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert joined(lines) == text
    assert all(width_of(line) <= width for line in lines)


@given(NAMES, st.integers(30, 60))
def test_names_fold_after_joints(text: str, width: int) -> None:
    for line in wrapped(text, width)[:-1]:
        assert re.search(r"[._,]$", line), line


def test_numbers_and_ranges_are_no_joints() -> None:
    assert wrapped("layers.{0..31}.attn", 12) == ["layers.", "  {0..31}.", "  attn"]
    assert wrapped("it is 0.25 or 1e-05", 10) == ["it is 0.25", "  or 1e-05"]


def test_dots_go_before_underscores() -> None:
    assert wrapped("down_blocks.to_q_proj.x", 14) == ["down_blocks.", "  to_q_proj.x"]


def test_wide_characters_count_as_two() -> None:
    assert all(width_of(line) <= 10 for line in wrapped("水彩画風の背景を描く", 10))


def test_without_a_width_nothing_is_folded() -> None:
    assert wrapped("a.b" * 100, None) == ["a.b" * 100]


def test_braces_are_folded_only_where_they_are_wider_than_a_line() -> None:
    name = "attn.to_{q,k,v,out.0}"
    assert wrapped(name, 18) == ["attn.", "  to_{q,k,v,out.0}"]
    assert wrapped(name, 12) == ["attn.to_{q,", "  k,v,out.0}"]
