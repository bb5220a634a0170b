"""Merged fixtures against the real libraries: outputs of the unmerged model, and PEFT's tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import (
    FIXTURES,
    Case,
    adapters_of,
    load_model,
    load_peft,
    manifest,
    outputs_of,
    read_all,
)

import loratool

pytestmark = pytest.mark.slow

MERGES = [case for case in manifest() if case["expect"] == "merge"]
REFUSALS = [case for case in manifest() if case["expect"] == "refuse"]
LOGITS = [case for case in MERGES if case["peft_logits"]]
SAME_SUMS = (
    "lora-linear",
    "lora-float-alpha",
    "rslora",
    "rank-alpha-patterns",
    "lora-half-adapter",
)


def by_name(case: Case) -> str:
    return str(case["case"])


def merge(case: Case, output: Path, **options: object) -> loratool.MergeReport:
    alpha = case.get("options", {}).get("lora_alpha")
    return loratool.merge(
        FIXTURES / case["base"], adapters_of(case), output, alpha=alpha, **options
    )


@pytest.mark.parametrize("case", LOGITS, ids=by_name)
def test_merged_model_computes_what_the_unmerged_one_does(case: Case, tmp_path: Path) -> None:
    merge(case, tmp_path / "out", dtype="float32")
    merged = outputs_of(case, load_model(case, tmp_path / "out"))
    base = outputs_of(case, load_model(case, FIXTURES / case["base"]))
    model = load_peft(case)
    if len(case["adapters"]) > 1:
        model = model.merge_and_unload(adapter_names=list(model.peft_config))
    expected = outputs_of(case, model)
    error = (merged - expected).norm() / expected.norm()
    assert error < 2e-6
    assert merged.shape != base.shape or (base - expected).norm() / expected.norm() > 1e-4


@pytest.mark.parametrize("case", REFUSALS, ids=by_name)
def test_what_has_no_right_merge_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(loratool.LoratoolError):
        merge(case, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", MERGES, ids=by_name)
def test_every_merge_verifies(case: Case, tmp_path: Path) -> None:
    merge(case, tmp_path / "out")
    findings = loratool.verify(
        tmp_path / "out",
        base=FIXTURES / case["base"],
        adapters=adapters_of(case),
        alpha=case.get("options", {}).get("lora_alpha"),
    )
    assert findings == ()


@pytest.mark.parametrize("name", SAME_SUMS)
def test_linear_merge_equals_pefts_but_for_the_order_of_sums(name: str, tmp_path: Path) -> None:
    """At most one element in 100,000 differs, by one unit in the last place."""
    case = next(case for case in manifest() if case["case"] == name)
    merge(case, tmp_path / "out")
    merged = read_all(tmp_path / "out")
    expected = load_peft(case, torch.bfloat16).merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    different = 0
    for key, value in expected.items():
        # Bits in the order of the numbers, zeros together.
        ours, theirs = (ordered(tensor) for tensor in (merged[key], value))
        assert int((ours - theirs).abs().max()) <= 1, key
        different += int((ours != theirs).sum())
    assert different <= 1e-5 * sum(value.numel() for value in expected.values()) + 1


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Return integers that count the bfloat16 numbers from zero."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
