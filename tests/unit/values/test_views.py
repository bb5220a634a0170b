"""Views of every kind of value commute with its evaluation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.files.spec import StoredTensor, TensorSpec
from loratool.values.arrays import decode
from loratool.values.expr import (
    Constant,
    Cut,
    Expr,
    Function,
    Held,
    Mean,
    Piled,
    Placed,
    Reshaped,
    Result,
    Scaled,
    Stored,
    Taken,
    Turned,
)

Known = tuple[Expr, np.ndarray[Any, Any]]
NUMBERS = 4096
COMPUTED: dict[int, tuple[Any, ...]] = {}
KEPT: list[Any] = []
"""Results are known by the identity of what computes them, which must live as long."""


@cache
def file_of_numbers() -> Path:
    """A file that holds 0, 1, 2, … in float32."""
    path = Path(tempfile.mkdtemp()) / "numbers"
    np.arange(NUMBERS, dtype="<f4").tofile(path)
    return path


def stored(start: int, shape: tuple[int, ...]) -> Known:
    spec = TensorSpec("numbers", "F32", shape)
    truth = np.arange(start, start + math.prod(shape), dtype=np.float64).reshape(shape)
    return Stored(StoredTensor(spec, file_of_numbers(), 4 * start, None)), truth


@st.composite
def matrices(draw: Any, shape: tuple[int, int] | None = None, depth: int = 2) -> Known:
    """A matrix of any class of values, and the numbers that it is."""
    height, width = shape or (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    size = height * width
    start = draw(st.integers(0, 100))
    simple = ("stored", "turned", "computed", "held", "constant")
    kinds = (
        simple
        if not depth
        else (*simple, "scaled", "placed", "reshaped", "piled", "cut", "mean", "seen")
    )
    match draw(st.sampled_from(kinds)):
        case "stored":
            return stored(start, (height, width))
        case "turned":
            value, truth = stored(start, (width, height))
            return value.turned(), truth.T
        case "computed":
            source, truth = stored(start, (size,))
            assert isinstance(source, Stored)
            double = Function("twice", (source.tensor,), lambda t: (2 * t,))
            COMPUTED[id(double)] = double.compute()[0]
            KEPT.append(double)
            return Result(double, 0, (height, width), "F32"), 2 * truth.reshape(height, width)
        case "held":
            truth = np.arange(start, start + size, dtype=np.float64).reshape(height, width)
            return Held(lambda: truth, (height, width), "F32"), truth
        case "constant":
            return Constant(3.0, (height, width), "F32"), np.full((height, width), 3.0)
        case "scaled":
            value, truth = draw(matrices((height, width), depth - 1))
            return Scaled(value, -0.5), -0.5 * truth
        case "placed":
            high, wide = draw(st.integers(1, height)), draw(st.integers(1, width))
            truth = np.zeros((height, width))
            pieces = []
            places = [(0, 0, high, wide), (high, wide, height - high, width - wide)]
            for row, column, tall, broad in places:
                if tall and broad:
                    piece, part = draw(matrices((tall, broad), depth - 1))
                    truth[row : row + tall, column : column + broad] = part
                    pieces.append((piece, row, column))
            return Placed(tuple(pieces), (height, width), "F32"), truth
        case "reshaped":
            value, truth = draw(matrices((width, height), depth - 1))
            return Reshaped(value, (height, width)), truth.reshape(height, width)
        case "piled":
            made = [draw(matrices((1, width), depth - 1)) for _ in range(height)]
            whole = Piled(tuple(value for value, _ in made))
            truth = np.stack([truth for _, truth in made]).reshape(height, width)
            return Reshaped(whole, (height, width)), truth
        case "cut":
            value, truth = draw(matrices((height + 1, width), depth - 1))
            return Cut(value, 0, 1, height + 1), truth[1:]
        case "mean":
            made = [draw(matrices((height, width), depth - 1)) for _ in range(2)]
            mean = Mean(tuple(value for value, _ in made), (), "F32")
            return mean, (made[0][1] + made[1][1]) / 2
        case _:
            value, truth = draw(matrices((width, height), depth - 1))
            return Turned(value), truth.T


@st.composite
def tensors(draw: Any) -> Known:
    """A value of two to four dimensions."""
    value, truth = draw(matrices())
    match draw(st.sampled_from(("matrix", "kernel", "pile", "piled kernels"))):
        case "kernel":
            shape = (*truth.shape, 1, 1)
            return Reshaped(value, shape), truth.reshape(shape)
        case "pile":
            other, more = draw(matrices(truth.shape))
            return Piled((value, other)), np.stack([truth, more])
        case "piled kernels":
            whole = Placed(((Reshaped(value, (*truth.shape, 1)), 0, 0),), (*truth.shape, 1), "F32")
            return Piled((whole, whole)), np.stack([truth[..., None]] * 2)
        case _:
            return value, truth


def steps(draw: Any, made: Known) -> Iterator[Known]:
    """Views of views, drawn one after the other."""
    value, truth = made
    for _ in range(draw(st.integers(1, 4))):
        ways = ["rows", "columns", "reshaped"] + ["flipped"] * (truth.ndim == 2)
        match draw(st.sampled_from(ways)):
            case "rows":
                start = draw(st.integers(0, truth.shape[0]))
                stop = draw(st.integers(start, truth.shape[0]))
                value, truth = value.rows(start, stop), truth[start:stop]
            case "columns" if truth.ndim > 1:
                start = draw(st.integers(0, truth.shape[1]))
                stop = draw(st.integers(start, truth.shape[1]))
                value, truth = value.columns(start, stop), truth[:, start:stop]
            case "flipped":
                value, truth = value.turned(), truth.T
            case _:
                shape = draw(st.sampled_from(shapes_like(truth.shape)))
                value, truth = value.reshaped(shape), truth.reshape(shape)
        yield value, truth


def shapes_like(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    size = math.prod(shape)
    pairs = [(size // n, n) for n in range(1, size + 1) if size % n == 0] or [(0, 1)]
    return [*pairs, (size,), (*pairs[-1], 1, 1), (1, *pairs[0])]


@given(tensors(), st.data())
def test_views_commute_with_evaluation(made: Known, data: st.DataObject) -> None:
    for value, truth in steps(data.draw, made):
        found = value.evaluate(COMPUTED)
        assert value.shape == truth.shape == found.shape
        assert value.dtype == "F32"
        assert np.array_equal(found, truth)


@given(matrices())
def test_stored_values_are_moved_and_not_computed(made: Known) -> None:
    """A view of stored bytes stays one, whatever part of it is taken."""
    value, _ = made
    if isinstance(value, Stored):
        assert isinstance(value.columns(0, 1).turned().rows(0, 1), Stored)


def test_rows_of_what_was_reshaped() -> None:
    value, truth = stored(0, (4, 3))
    two = Reshaped(Placed(((value, 0, 0),), (4, 3), "F32"), (2, 6))
    assert np.array_equal(two.rows(1, 2).evaluate(), truth.reshape(2, 6)[1:2])


def test_reshaping_a_turned_matrix() -> None:
    value, truth = stored(0, (4, 3))
    again = value.turned().reshaped((4, 3, 1))
    assert np.array_equal(again.evaluate(), truth.T.reshape(4, 3, 1))


class TestRowsInAnotherOrder:
    """Rows that lie as pairs where halves are meant, and others."""

    @pytest.fixture
    def stored(self, tmp_path: Path) -> StoredTensor:
        values = np.arange(96, dtype=np.float32).reshape(24, 4)
        (tmp_path / "a").write_bytes(b"x" * 8 + values.tobytes())
        return StoredTensor(TensorSpec("a", "F32", (24, 4)), tmp_path / "a", 8)

    @pytest.mark.parametrize("axes", [(2, 2, 6), (1, 4, 6), (3, 4, 2), (1, 2, 3)])
    def test_axes_are_exchanged_and_exchanged_back(
        self, stored: StoredTensor, axes: tuple[int, int, int]
    ) -> None:
        count, outer, inner = axes
        plain = decode(stored)
        wanted = plain.reshape(*axes, -1).swapaxes(1, 2).reshape(24, 4)
        seen = stored.exchanging(axes)
        assert seen is not None
        assert np.array_equal(decode(seen), wanted)
        assert seen.exchanging((count, inner, outer)) == stored
        other = seen.exchanging((1, 3, 8))
        if other is not None:
            turned = wanted.reshape(1, 3, 8, 4).swapaxes(1, 2).reshape(24, 4)
            assert np.array_equal(decode(other), turned)
        assert np.array_equal(Stored(stored).exchanged(axes).evaluate(), wanted)
        again = Stored(seen).exchanged((1, 2, 12)).evaluate()
        assert np.array_equal(again, wanted.reshape(1, 2, 12, 4).swapaxes(1, 2).reshape(24, 4))

    def test_parts_of_it_are_no_views(self, stored: StoredTensor) -> None:
        seen = stored.exchanging((2, 2, 6))
        assert seen is not None
        value, whole = Stored(seen), decode(seen)
        assert seen.rows(2, 3, 4) is None
        assert np.array_equal(value.rows(2, 9).evaluate(), whole[2:9])
        assert np.array_equal(value.columns(1, 3).evaluate(), whole[:, 1:3])
        assert np.array_equal(value.turned().evaluate(), whole.T)
        assert np.array_equal(value.reshaped((12, 8)).evaluate(), whole.reshape(12, 8))
        assert np.array_equal(value.scaled(2).evaluate(), 2 * whole)
        taken = Taken(value, (5, 0, 5))
        assert taken.shape == (3, 4)
        assert np.array_equal(taken.evaluate(), whole[[5, 0, 5]])

    def test_no_rows_of_that_many_are_none(self, stored: StoredTensor) -> None:
        assert stored.exchanging((5, 2, 2)) is None

    def test_blocks_are_moved_by_rows(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        values = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
        raw = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        (tmp_path / "q").write_bytes(raw.tobytes())
        stored = StoredTensor(TensorSpec("q", "Q8_0", (8, 32)), tmp_path / "q", 0)
        plain = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(decode(stored).astype(np.float32), plain)
        seen = stored.exchanging((2, 2, 2))
        assert seen is not None
        wanted = plain.reshape(2, 2, 2, 32).swapaxes(1, 2).reshape(8, 32)
        assert np.array_equal(decode(seen).astype(np.float32), wanted)
        value = Stored(seen)
        assert value.dtype == "F32"
        assert np.array_equal(value.rows(1, 3).evaluate().astype(np.float32), wanted[1:3])
        assert np.array_equal(value.turned().evaluate().astype(np.float32), wanted.T)
