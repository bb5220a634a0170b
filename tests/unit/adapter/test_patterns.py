"""Patterns mean what they mean to Python's ``re``, and none takes for ever."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter.automaton import Automaton, Budget, EndlessError, UnsupportedExpressionError
from loratool.adapter.expressions import Expression, ExpressionError
from loratool.adapter.patterns import (
    matches_target,
    pattern_matches,
    pattern_value,
    pattern_values,
)
from loratool.errors import AdapterError

PIECES = st.sampled_from(
    ["a", "b", ".", r"\.", r"\w", r"\d", "[ab]", "[^a.]", "[a-c0-9]", r"\b", "^", "$", r"\W", "1"]
)
EXPRESSIONS = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        inner.map(lambda one: f"({one})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,2}", "{2}", "*?", "{0,3}?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
        PIECES.map(lambda one: f"(?<!{one})" if one not in ("^", "$", r"\b") else one),
    ),
    max_leaves=8,
)
NAMES = st.text(alphabet="ab.1_\n", max_size=10)


@settings(deadline=None, max_examples=400)
@given(expression=EXPRESSIONS, names=st.lists(NAMES, min_size=1, max_size=4))
def test_an_automaton_matches_what_re_matches(expression: str, names: list[str]) -> None:
    automaton, expected = Automaton(expression), re.compile(expression)
    for name in names * 2:  # the second time from what is kept
        assert automaton.match(name) == (expected.match(name) is not None), name
        assert automaton.fullmatch(name) == (expected.fullmatch(name) is not None), name


@settings(deadline=None, max_examples=300)
@given(expression=EXPRESSIONS, names=st.lists(st.text(alphabet="ab.1_\n", max_size=10)))
def test_an_expression_is_found_where_re_finds_it(expression: str, names: list[str]) -> None:
    found, expected = Expression(expression), re.compile(expression)
    for name in [*names, *(name * 30 for name in names)]:
        assert found.search(name) == (expected.search(name) is not None), name


KEYS = st.lists(
    st.one_of(
        st.text(alphabet="ab.", min_size=1, max_size=5),
        st.text(alphabet="ab.", min_size=1, max_size=5).map(lambda name: f"^{name}"),
        st.sampled_from(["a|b", "a.*", "(a|b).a", "b+", ""]),
    ),
    unique=True,
    max_size=6,
)


@settings(deadline=None, max_examples=300)
@given(keys=KEYS, module=st.text(alphabet="ab.\n", max_size=8))
def test_names_are_looked_up_as_expressions_are_matched(keys: list[str], module: str) -> None:
    """PEFT's rule, ``re.match(rf"(.*\\.)?({key})$", module)``, for each key in turn."""
    expected = [key for key in keys if re.match(rf"(.*\.)?({key})$", module)]
    patterns = {key: number for number, key in enumerate(keys)}
    assert [key for key, _ in pattern_values(patterns, module)] == expected
    first = keys.index(expected[0]) if expected else patterns.get(module, -1)
    assert pattern_value(patterns, module, -1) == first


@pytest.mark.parametrize(
    "pattern",
    [
        "a?" * 40 + "a" * 40 + "b",
        "(a{1,2}){40}b",
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+$b",
        "(.*a){12}b",
        "(?=(a+)+b)a",
        "a*" * 30 + "b",
        "((a*)*)*b",
        "((((){1000}){1000}){1000})a*b",
        ".*" * 200 + "b",
    ],
)
def test_what_backtracking_would_never_finish(pattern: str) -> None:
    begin = time.perf_counter()
    for name in (f"model.{'a' * 60}", f"model.{'a' * 60}b", "a" * 150):
        expected = name.endswith("b") and pattern != "(?=(a+)+b)a" and pattern != "(a|aa)+$b"
        assert pattern_matches(pattern, name) == expected or pattern.startswith("a?")
        matches_target(pattern, name)
    assert time.perf_counter() - begin < 5, "a hang, not a slow machine"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a+)\1+", "group"),
        ("(a)?(?(1)b|c)*" * 3 + "(a*)*", "group"),
        ("(a*)*+", "possessive"),
        ("((a{1,900}){1,900}){1,900}", "too large"),
        ("(" * 5000, "characters long"),
        ("(", "regular expression"),
        ("(x)?(?(1)b|(a|a)*b)", "groupref"),
    ],
)
def test_what_needs_a_memory_or_a_world_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(AdapterError, match=why):
        pattern_matches(pattern, "model.layers.0.q_proj")


def test_an_expression_may_be_too_large_or_unknown() -> None:
    with pytest.raises(EndlessError):
        Automaton("(a{1,300}){1,300}")
    with pytest.raises(UnsupportedExpressionError):
        Automaton("(?i)a")


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"^(?!.*vision).*\.(q_proj|v_proj)$", "model.layers.0.q_proj", "model.vision.0.q_proj"),
        (r"(?i).*\.Q_PROJ", "model.q_proj", "model.k_proj"),
        (
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
            "model.layers.12.mlp.up_proj",
            "vision.layers.12.mlp.up_proj",
        ),
    ],
)
def test_what_trainers_write(pattern: str, yes: str, no: str) -> None:
    assert matches_target(pattern, yes)
    assert not matches_target(pattern, no)


@pytest.mark.slow
def test_many_modules_and_many_patterns() -> None:
    modules = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(200) for j in range(250)]
    patterns = {f"layers.{i}.mlp.experts.{i}.up_proj": i for i in range(200)}
    patterns |= {f"^model.layers.{i}.mlp.experts.7.up_proj": i for i in range(100)}
    begin = time.perf_counter()
    found = [pattern_value(patterns, module, -1) for module in modules]
    assert sum(value >= 0 for value in found) == 200 + 100 - 1
    assert time.perf_counter() - begin < 20, "a hang, not a slow machine"


def test_tables_and_lists_that_were_made_to_take_long() -> None:
    begin = time.perf_counter()
    dots = {"".join(chars) + "aaa": 1 for chars in itertools.product("a.", repeat=13)}
    with pytest.raises(AdapterError, match="dots"):
        pattern_value(dots, "b." + "a" * 16, 0)
    with pytest.raises(AdapterError, match="more than 1000 patterns"):
        pattern_value({f"a{i}+": 1 for i in range(2000)}, "a", 0)
    targets = tuple(f"m{i}" for i in range(50_000))
    assert sum(matches_target(targets, f"layers.{i}.m{i}") for i in range(2000)) == 2000
    assert time.perf_counter() - begin < 10, "a hang, not a slow machine"


def test_all_patterns_of_a_file_share_what_they_may_take() -> None:
    """Each is harmless by itself; three hundred of them are not."""
    counted = {f"(a{{1,20}}){{40}}{index}": 4 for index in range(300)}
    (first, *_) = counted
    assert pattern_value({first: 4}, "a" * 40 + "0", 0) == 4
    with pytest.raises(AdapterError, match="too large"):
        pattern_value(counted, "q_proj", 0)
    budget = Budget(steps=10_000)
    slow = [Expression(rf"((a|b){{1,3}}c?){{8}}{index}", budget) for index in range(10)]
    names = ["".join("abc"[(n >> i) % 3] for i in range(40)) for n in range(200)]
    with pytest.raises(ExpressionError, match="too many steps"):
        assert not any(each.match(name) for name in names for each in slow)
