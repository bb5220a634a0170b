"""A field of ``adapter_config.json`` of the wrong type is an error, not what Python makes of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from samples import lora

import loratool
from loratool.adapter.config import parse_config
from loratool.adapter.fields import DECIDING, FORMS, wrong_fields
from loratool.errors import AdapterError

pytestmark = pytest.mark.slow

CLASSES = (
    peft.LoraConfig,
    peft.AdaLoraConfig,
    peft.LoHaConfig,
    peft.LoKrConfig,
    peft.VeraConfig,
)
OF_PEFT = {field.name for kind in CLASSES for field in dataclasses.fields(kind)}
WRONG: dict[type, tuple[Any, ...]] = {
    bool: ("false", "true", "", 2, 0.5, [True], {}),
    int: ("8", "", 2.5, True, [8], {}),
    float: ("0.1", "", True, [0.1], {}, float("nan"), float("inf")),
    dict: ("{}", "x", "", 1, True, ["x"]),
    list: (1, 2.5, True, {"a": 1}, [[]], [{}]),
}
"""JSON values that are none of the type; of lists, those that are none of any list's."""


HINTS = [typing.get_type_hints(kind) for kind in CLASSES]


def kinds_of(name: str) -> set[type]:
    """The JSON types that PEFT's annotation allows."""
    return set().union(*(flat(hints[name]) for hints in HINTS if name in hints))


def flat(hint: Any) -> set[type]:
    origin = typing.get_origin(hint)
    if origin in (list, dict):
        return {origin}
    if arguments := typing.get_args(hint):
        return set().union(*(flat(one) for one in arguments))
    if dataclasses.is_dataclass(hint):
        return {dict}
    return {hint} if isinstance(hint, type) else {type(hint)}


CHECKED = sorted(name for name in OF_PEFT if kinds_of(name) & {bool, int, float, dict, list})


def wrong_for(name: str) -> list[Any]:
    kinds = kinds_of(name)
    numbers = {int, float} if kinds & {int, float} else set()
    candidates = [value for kind in kinds & WRONG.keys() for value in WRONG[kind]]
    allowed = kinds | numbers
    return [
        value
        for value in candidates
        if not (isinstance(value, str) and str in kinds)
        and not (type(value) in allowed and type(value) not in (list, dict, float))
        and not (isinstance(value, dict) and dict in kinds)
        and not (isinstance(value, list) and list in kinds and value not in ([[]], [{}]))
        and not (value == 2.5 and name in ("lora_alpha", "alpha"))
    ]


@pytest.mark.parametrize("name", CHECKED)
def test_every_field_of_peft_has_a_form(name: str) -> None:
    assert name in FORMS


@pytest.mark.parametrize("kind", CLASSES)
def test_what_peft_writes_is_of_it(kind: type[peft.PeftConfig], tmp_path: Path) -> None:
    options = {"total_step": 10} if kind is peft.AdaLoraConfig else {}
    kind(target_modules=["q_proj"], **options).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written
    assert not list(wrong_fields(written))


@pytest.mark.parametrize("name", CHECKED)
def test_a_wrong_type_is_an_error(
    name: str, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    factors = lora("model.q_proj", 12, 10)
    assert wrong_for(name)
    for index, value in enumerate(wrong_for(name)):
        adapter = make_adapter(
            factors, name=f"a{index}", **{"target_modules": ["q_proj"], name: value}
        )
        errors = [found for found in loratool.validate(adapter) if found.is_error]
        assert any(name in found.message for found in errors), value
        if name in DECIDING:
            with pytest.raises(AdapterError, match=name):
                loratool.truncate(adapter, rank=2, output=tmp_path / "out", dry_run=True)


def test_false_as_a_text_is_no_rank_stabilisation(
    make_adapter: Callable[..., Path], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(
        lora("model.q_proj", 12, 10), target_modules=["q_proj"], use_rslora="false"
    )
    base = make_base({"model.q_proj.weight": torch.randn(12, 10)})
    for command in (
        ["merge", base, adapter, "-o", tmp_path / "m"],
        ["convert", adapter, "--to", "kohya", "-o", tmp_path / "k.safetensors"],
        ["compose", adapter, adapter, "-o", tmp_path / "c"],
        ["rescale", adapter, "--scale", "2", "-o", tmp_path / "r"],
        ["truncate", adapter, "--rank", "2", "-o", tmp_path / "t"],
        ["compare", adapter, adapter],
        ["inspect", adapter],
    ):
        words = [sys.executable, "-m", "loratool", *map(str, command)]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        assert made.returncode == 2
        (line,) = made.stderr.strip().splitlines()
        assert line.startswith("error:")
        assert "use_rslora is 'false', expected true or false" in line


def test_zero_and_one_are_booleans_as_real_files_have_them() -> None:
    assert parse_config({"use_rslora": 1, "use_dora": 0}, where="x").use_rslora


@pytest.mark.parametrize("value", ["20", 3, ["scale", 2]])
def test_parameters_of_mlx_are_an_object(value: object, tmp_path: Path) -> None:
    save_file(
        {"q.lora_a": torch.ones(6, 2), "q.lora_b": torch.ones(2, 5)},
        tmp_path / "adapters.safetensors",
    )
    config = {"fine_tune_type": "lora", "lora_parameters": value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (found,) = (found for found in loratool.validate(tmp_path) if found.is_error)
    assert "lora_parameters" in found.message
