"""How a delta lies in the stored weight, decided by shapes and then by the layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.base.model import Model, open_model
from loratool.base.orientation import matrix_shape, region_for
from loratool.base.region import Region
from loratool.errors import BaseModelError
from loratool.schemes.opening import open_adapter

SQUARE = Region(8, 8)
TURNED = Region(8, 8, transposed=True)
Make = Callable[..., Path]


@pytest.fixture
def region(make_base: Make, make_adapter: Make) -> Callable[..., Region]:
    def find(
        module: str,
        stored: tuple[int, ...],
        up: tuple[int, ...],
        down: tuple[int, ...],
        config: dict[str, Any] | None = None,
        *,
        flagged: bool = False,
    ) -> Region:
        kind = "lora_embedding_" if module.endswith("wte") else "lora_"
        suffix = "" if module.endswith("wte") else ".weight"
        tensors = {
            f"{module}.{kind}A{suffix}": torch.zeros(down),
            f"{module}.{kind}B{suffix}": torch.zeros(up),
        }
        adapter = open_adapter(make_adapter(tensors, r=2))
        model: Model = open_model(make_base({f"{module}.weight": torch.zeros(stored)}, config))
        return region_for(adapter.sites[0], module, stored, model, is_flagged=flagged)

    return find


GPT2, LLAMA = {"model_type": "gpt2"}, {"model_type": "llama"}


@pytest.mark.parametrize(
    ("module", "stored", "up", "down", "config", "flagged", "expected"),
    [
        ("h.0.q_proj", (6, 4), (6, 2), (2, 4), None, False, Region(6, 4)),
        ("h.0.q_proj", (4, 6), (6, 2), (2, 4), None, False, Region(4, 6, transposed=True)),
        ("h.0.q_proj", (8, 8), (8, 2), (2, 8), LLAMA, False, SQUARE),
        ("h.0.q_proj", (8, 8), (8, 2), (2, 8), None, False, SQUARE),
        ("h.0.q_proj", (8, 8), (8, 2), (2, 8), None, True, BaseModelError),
        ("h.0.c_proj", (8, 8), (8, 2), (2, 8), None, False, BaseModelError),
        ("h.0.c_proj", (8, 8), (8, 2), (2, 8), GPT2, False, TURNED),
        ("h.0.c_proj", (8, 8), (8, 2), (2, 8), LLAMA, False, SQUARE),
        ("h.0.c_proj", (8, 8), (8, 2), (2, 8), {"text_config": GPT2}, False, TURNED),
        ("wte", (9, 4), (4, 2), (2, 9), None, False, Region(9, 4, transposed=True)),
        ("wte", (9, 4), (4, 2), (2, 8), None, False, BaseModelError),
        ("c", (6, 4, 3, 3), (6, 2, 1, 1), (2, 4, 3, 3), None, False, Region(6, 36)),
        ("c", (6, 4, 3, 3), (18, 2), (2, 12), None, False, Region(18, 12)),
        ("c", (6, 1, 3, 3), (6, 2, 1, 1), (2, 4, 3, 3), None, False, BaseModelError),
        ("h.0.q_proj", (6, 4), (6, 2), (2, 5), None, False, BaseModelError),
    ],
)
def test_region_for(
    module: str,
    stored: tuple[int, ...],
    up: tuple[int, ...],
    down: tuple[int, ...],
    config: dict[str, Any] | None,
    flagged: bool,
    expected: Region | type,
    region: Callable[..., Region],
) -> None:
    if expected is BaseModelError:
        with pytest.raises(BaseModelError):
            region(module, stored, up, down, config, flagged=flagged)
    else:
        assert region(module, stored, up, down, config, flagged=flagged) == expected


def test_matrix_shape_flattens_what_is_behind_the_rows() -> None:
    assert [matrix_shape(shape) for shape in ((), (3,), (3, 4), (3, 4, 2, 2))] == [
        (1, 1), (3, 1), (3, 4), (3, 16)
    ]  # fmt: skip


def test_outputs_of_a_region_are_rows_or_columns() -> None:
    assert Region(10, 4).outputs(3, 2) == Region(2, 4, first_row=3)
    turned = Region(4, 10, transposed=True).outputs(3, 2)
    assert turned == Region(4, 2, first_column=3, transposed=True, full_width=10)
