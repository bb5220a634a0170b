"""Patterns for modules mean what their definition says, and none takes for ever."""

from __future__ import annotations

import fnmatch
import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter.expressions import Expression, ExpressionError
from loratool.adapter.selectors import PartlyMeantError, Spellings, selector
from loratool.errors import OptionError

COMPONENTS = st.one_of(
    st.text(alphabet="ab1_", min_size=1, max_size=3),
    st.sampled_from(["*", "a*", "*b", "?", "[ab]", "[!a]", "0-2", "7-11", "*1*"]),
)
PATTERNS = st.lists(COMPONENTS, min_size=1, max_size=3).map(".".join)
NAMES = st.lists(
    st.one_of(st.text(alphabet="ab1_\n", max_size=3), st.integers(0, 12).map(str)),
    min_size=1,
    max_size=4,
).map(".".join)


def by_definition(pattern: str, name: str) -> bool:
    """Whether some run of whole components of ``name`` is what ``pattern`` spells out."""
    components = name.split(".")
    runs = [
        ".".join(components[first:last])
        for first in range(len(components))
        for last in range(first + 1, len(components) + 1)
    ]
    spelled = [""]
    for index, component in enumerate(pattern.split(".")):
        found = re.fullmatch(r"(\d+)-(\d+)", component)
        numbers = range(int(found[1]), int(found[2]) + 1) if found else ()
        words = [str(number) for number in numbers] if found else [component]
        spelled = [f"{before}{'.' if index else ''}{word}" for before in spelled for word in words]
    return any(fnmatch.fnmatchcase(run, glob) for run in runs for glob in spelled)


@settings(deadline=None, max_examples=1500)
@given(pattern=PATTERNS, name=NAMES)
def test_a_pattern_means_a_run_of_whole_components(pattern: str, name: str) -> None:
    assert selector(pattern, "-w").matches(name) is by_definition(pattern, name)
    assert selector(f"glob:{pattern}", "-w").matches(name) is by_definition(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("layers.0-11", "model.layers.11.mlp.gate_proj"),
        ("double_blocks.3-7", "transformer.double_blocks.3.img_attn.qkv"),
        ("self_attn", "model.layers.1.self_attn.q_proj"),
        ("layers.*.mlp", "model.layers.1.mlp.up_proj"),
        ("lora_te1_*", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("re:q_proj$|k_proj$", "model.layers.1.self_attn.k_proj"),
        ("re:(?i)Q_PROJ", "a.q_proj"),
        ("[", "a.[.b"),
    ],
)
def test_what_people_write(pattern: str, name: str) -> None:
    assert selector(pattern, "-w").matches(name)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("layers.0-1", "model.layers.11.mlp"),
        ("layers.1", "model.layers.11.mlp"),
        ("attn", "model.layers.0.self_attn"),
        ("layers.0-11", "model.layers.007x.mlp"),
        ("layers.0-11", f"model.layers.{'1' * 5000}.mlp"),
        ("q.proj", "a.q_proj"),
    ],
)
def test_what_they_do_not_mean(pattern: str, name: str) -> None:
    assert not selector(pattern, "-w").matches(name)


@pytest.mark.parametrize("text", ["", "re:", "glob:", "re:(", "layers.7-3", "re:" + "a" * 3000])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="-w"):
        selector(text, "-w")


@pytest.mark.parametrize(
    "text",
    [
        "re:(a+)+$",
        "re:(a|a)*b",
        "re:" + "a?" * 40 + "a" * 40,
        "re:(.*)*(.*)*x",
        "re:.*.*.*.*.*.*x",
        "*a" * 300 + "b",
        "re:([a-z]+)*=",
    ],
)
def test_hostile_patterns_end(text: str) -> None:
    begun = time.perf_counter()
    with suppress(OptionError):  # or it is refused
        found = selector(text, "-w")
        for name in ("a" * 30, "a" * 199, "a" * 5000):
            found.matches(name)
    assert time.perf_counter() - begun < 5


def test_steps_on_hostile_names_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.adapter.selectors.MAX_STEPS", 10_000)
    found = selector("*a" * 100 + "b", "-w")
    with pytest.raises(OptionError, match="too many steps"):
        found.matches("a" * 1000)


def test_flags_that_no_automaton_has_are_refused_by_name() -> None:
    with pytest.raises(ExpressionError, match="flags"):
        Expression("(?i)(a+)+$").search("a" * 50)


def test_one_module_of_several_is_meant_as_a_whole_or_not_at_all() -> None:
    module = Spellings(("double_blocks.0.qkv",), (("attn.to_q",), ("attn.to_k",)))
    assert selector("qkv", "-w").means(module)
    assert selector("attn", "-w").means(module)
    assert not selector("mlp", "-w").means(module)
    with pytest.raises(PartlyMeantError) as error:
        selector("to_k", "-w").means(module)
    assert (error.value.part, error.value.other) == ("attn.to_k", "attn.to_q")
