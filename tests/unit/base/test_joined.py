"""Rows that lie in several places, read as one weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratool.base.joined import is_joined, joined
from loratool.codecs.weights import read_matrix
from loratool.files.containers import open_weights
from loratool.files.inputs import InputFiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(heights=st.lists(st.integers(1, 9), min_size=1, max_size=4), width=st.integers(1, 5))
def test_it_is_the_parts_one_below_the_other(
    dtype: torch.dtype, heights: list[int], width: int, tmp_path: Path
) -> None:
    parts = [torch.randn(height, width).to(dtype) for height in heights]
    path = tmp_path / "parts.safetensors"
    save_file({str(number): part for number, part in enumerate(parts)}, path)
    stored = open_weights(path).tensors
    one = joined("w", (sum(heights), width), [stored[str(n)] for n in range(len(parts))])
    assert one is not None and is_joined(one)
    files = InputFiles({})
    try:
        found = read_matrix(one, files)
    finally:
        files.close()
    assert np.array_equal(found, torch.cat(parts).double().numpy())


def test_parts_of_several_dtypes_or_of_64_bits_are_none(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2).half()}, path)
    stored = open_weights(path).tensors
    assert joined("w", (4, 2), list(stored.values())) is None
    save_file({"a": torch.zeros(2, 2).double(), "b": torch.zeros(2, 2).double()}, path)
    assert joined("w", (4, 2), list(open_weights(path).tensors.values())) is None
