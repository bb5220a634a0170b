"""The one loop: bytes that only move end where they belong, tasks are done once, failures stop."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.files.inputs import stamp_of
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.plan.lanes import Spot, Unit
from loratool.plan.run import COPY_BYTES, SHORT, FileWork, NullSink, Run, run_files, write_files


def moved(sizes: list[int], source: Path, order: list[int]) -> tuple[FileWork, bytes]:
    """Return a file of the tensors of ``source`` in another order, and its bytes."""
    data = source.read_bytes()
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    moves, expected = [], bytearray(b"head")
    for index in order:
        spec = TensorSpec(f"t{index}", "U8", (sizes[index],))
        moves.append((Spot(spec, 0, len(expected)), StoredTensor(spec, source, begins[index])))
        expected += data[begins[index] : begins[index] + sizes[index]]
    return FileWork("out", len(expected), b"head", moves), bytes(expected)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_moved_bytes_are_where_they_belong(
    data: st.DataObject, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("moved")
    source = folder / "source"
    source.write_bytes(os.urandom(sum(sizes)))
    work, expected = moved(sizes, source, data.draw(st.permutations(range(len(sizes)))))
    write_files([work], [folder / "out"], {source: stamp_of(source)}, threads=2)
    assert (folder / "out").read_bytes() == expected


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_long_ranges_are_cut_and_copied(order: list[int], tmp_path: Path) -> None:
    sizes = [SHORT + 3, COPY_BYTES + 7, 5]
    source = tmp_path / "source"
    source.write_bytes(os.urandom(sum(sizes)))
    work, expected = moved(sizes, source, order)
    write_files([work], [tmp_path / "out"], {source: stamp_of(source)}, threads=3)
    assert (tmp_path / "out").read_bytes() == expected


class Steps:
    """A task of several units, which counts who has done which."""

    nbytes = effort = 10

    written = ()

    def reads(self) -> tuple[()]:
        return ()

    def prepare(self) -> None: ...

    def __init__(self, count: int, *, fails_at: int | None = None) -> None:
        self.left = list(range(count))
        self.done: list[int] = []
        self.fails_at = fails_at
        self.lock = threading.Lock()

    def take(self, run: Run) -> Unit | None:
        with self.lock:
            if not self.left:
                return None
            index = self.left.pop(0)
        return lambda: self.do(index)

    def do(self, index: int) -> None:
        if index == self.fails_at:
            raise ValueError("no")
        with self.lock:
            self.done.append(index)


def test_every_unit_is_done_once_by_any_number_of_threads() -> None:
    tasks = [Steps(count) for count in (0, 1, 7, 30)]
    works = [FileWork("a", 0, tasks=tasks[:2]), FileWork("b", 0, tasks=tasks[2:])]
    run_files(works, NullSink(), {}, threads=4)
    assert [sorted(task.done) for task in tasks] == [list(range(n)) for n in (0, 1, 7, 30)]


def test_a_failure_stops_all_and_is_raised() -> None:
    task = Steps(1_000_000, fails_at=3)
    with pytest.raises(ValueError, match="no"):
        run_files([FileWork("a", 0, tasks=[task])], NullSink(), {}, threads=2)
    assert len(task.done) < 999_999
