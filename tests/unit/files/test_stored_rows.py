"""Rows of a stored tensor, which lie where they are: as numpy has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratool.files.container import read_bytes
from loratool.files.containers import open_weights

TENSORS = {
    "vector": torch.arange(7.0),
    "matrix": torch.arange(30.0).reshape(6, 5),
    "turned": torch.arange(30.0).reshape(5, 6).T,
    "kernel": torch.arange(48.0).reshape(4, 3, 2, 2),
    "stack": torch.arange(24.0).reshape(2, 3, 4),
}


@pytest.mark.parametrize(
    ("name", "width"), [("vector", 1), ("matrix", 5), ("turned", 5), ("kernel", 12), ("stack", 4)]
)
def test_they_are_those_of_the_matrix(name: str, width: int, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "some.bin")
    stored = open_weights(tmp_path / "some.bin").tensors[name]
    matrix = TENSORS[name].reshape(-1, width)
    for first, count in ((0, 1), (1, 2), (len(matrix) - 3, 3)):
        view = stored.rows(first, count, width)
        assert view is not None
        assert view.spec.shape == ((count,) if name == "vector" else (count, width))
        assert read_bytes(view) == matrix[first : first + count].numpy().tobytes()


def test_what_lies_in_no_such_rows_has_none(tmp_path: Path) -> None:
    turned = torch.arange(24.0).reshape(4, 3, 2).permute(2, 1, 0)
    torch.save({"stack": turned, "matrix": TENSORS["turned"]}, tmp_path / "some.bin")
    tensors = open_weights(tmp_path / "some.bin").tensors
    assert tensors["stack"].rows(0, 1, 4) is None
    assert tensors["matrix"].rows(0, 1, 3) is None
