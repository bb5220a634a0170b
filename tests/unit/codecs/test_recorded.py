"""What libraries made of their own codes, recorded by ``fixtures/quantised/record_*.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from samples import FIXTURES

from loratool.codecs.codec import Description, recognise
from loratool.codecs.weights import read_matrix
from loratool.files.containers.safetensors import CONTAINER
from loratool.files.inputs import InputFiles

FOLDER = FIXTURES / "quantised"
NAME = "model.layers.0.mlp.up_proj"
FILES = (
    "comfy-fp4",
    "comfy-fp8",
    "hqq-axis-0",
    "hqq-axis-1",
    "mlx",
    "modelopt_fp8",
    "quanto",
    "torchao",
)
ROUNDED = {"bf16": 2.0**-7, "f16": 2.0**-10, "f32": 2.0**-22}
"""What a library that multiplies, and adds, in a float of these is off by, of the largest."""


@cache
def opened(library: str) -> Any:
    return CONTAINER.open(FOLDER / f"{library}.safetensors")


def cases() -> Iterator[tuple[str, str]]:
    for library in FILES:
        yield from ((library, key) for key in opened(library).metadata if key != "library")


def precision(name: str) -> float:
    return ROUNDED[next((dtype for dtype in ROUNDED if name.endswith(dtype)), "f32")]


@pytest.mark.parametrize(("library", "name"), list(cases()), ids=lambda text: text)
def test_codes_become_what_the_library_made_of_them(library: str, name: str) -> None:
    file = opened(library)
    files = InputFiles({})
    told = json.loads(file.metadata[name])
    prefix = f"{name}/stored/"
    stored = {
        key.removeprefix(prefix): replace(
            part, spec=replace(part.spec, name=key.removeprefix(prefix))
        )
        for key, part in file.tensors.items()
        if key.startswith(prefix)
    }
    found = recognise(stored, Description(told["said"], metadata=told["metadata"]))
    assert list(found) == [NAME]
    assert found[NAME].spec.name == f"{NAME}.weight"
    given, value = (
        read_matrix(file.tensors[f"{name}/{kind}"], files) for kind in ("input", "value")
    )
    weight = read_matrix(found[NAME], files)
    assert weight.shape == given.shape
    assert np.abs(weight - value).max() <= precision(name) * np.abs(value).max()
    # The codes are those of the input, in its order; with one bit that is all that they are.
    assert np.corrcoef(weight.reshape(-1), given.reshape(-1))[0, 1] > 0.3
    files.close()


def test_every_record_is_small_and_made_by_a_script_that_is_kept() -> None:
    for name in FILES:
        assert (FOLDER / f"{name}.safetensors").stat().st_size < 50_000
        assert (FOLDER / f"record_{name.partition('-')[0]}.py").exists()
