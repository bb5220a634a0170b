"""Rows of a stored tensor taken in another order, against the same of an array in memory."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor, TensorSpec

ROWS = 24


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_orders_of_rows_compose(seed: int, width: int, tmp_path: Path) -> None:
    whole = np.arange(ROWS * width, dtype=np.float32).reshape(ROWS, width)
    path = tmp_path / "x"
    path.write_bytes(b"1234" + whole.tobytes())
    draw, done = random.Random(seed), 0
    for _ in range(100):
        values = whole
        stored = StoredTensor(TensorSpec("x", "F32", (ROWS, width)), path, 4)
        for _ in range(3):
            rows = len(values)
            count = draw.choice(divisors(rows))
            made: StoredTensor | None
            if draw.random() < 0.5:
                outer = draw.choice(divisors(rows // count))
                inner = draw.choice(divisors(rows // count // outer))
                made = stored.exchanging((count, outer, inner))
                seen = values.reshape(count, outer, inner, -1).transpose(0, 2, 1, 3)
            else:
                first = draw.randrange(rows // count)
                last = draw.randrange(first, rows // count) + 1
                made = stored.keeping(count, first, last)
                seen = values.reshape(count, rows // count, width)[:, first:last]
            if made is not None:
                stored, values, done = made, seen.reshape(-1, width), done + 1
        assert stored.spec.shape == values.shape
        assert read_bytes(stored) == np.ascontiguousarray(values).tobytes()
        assert stored.offset + stored.span <= path.stat().st_size
    assert done > 200


def test_an_exchange_undone_is_the_tensor_itself() -> None:
    stored = StoredTensor(TensorSpec("x", "F32", (12, 5)), Path("x"), 4)
    made = stored.exchanging((2, 3, 2))
    assert made is not None and made.steps is not None
    assert made.exchanging((2, 2, 3)) == stored
    assert stored.exchanging((5, 1, 1)) is None
