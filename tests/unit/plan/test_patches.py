"""Weights that are patched: every block once, and nothing kept of those that are done."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loratool.files.spec import TensorSpec
from loratool.plan import kernels
from loratool.plan.lanes import Spot
from loratool.plan.patches import Patch


class Factors:
    """Stands for a kernel, which holds the factors of all adapters."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_factors_go_with_the_last_block(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Factors]] = []

    def compiled(*_: object) -> Factors:
        factors = Factors(blocks)
        made.append(weakref.ref(factors))
        return factors

    monkeypatch.setattr(kernels, "compile_step", compiled)
    run = cast(
        "Any",
        SimpleNamespace(files=None, device="cpu", bench=SimpleNamespace(products=None)),
    )
    patch = Patch(cast("Any", None), Spot(TensorSpec("w", "F32", (blocks, 1)), 0, 0))
    for index in range(blocks):
        unit = patch.take(run)
        assert unit is not None
        assert made[0]() is not None, f"block {index} needs them"
        del unit
    assert patch.take(run) is None
    assert patch.take(run) is None
    assert [ref() for ref in made] == [None]
