"""Data of files that are elsewhere: every byte, in few requests, in bounded memory."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import StoreError
from loratool.files import windows
from loratool.files.ranges import Ranged
from loratool.files.windows import Far, Windows


class Distant(Ranged):
    """Bytes that are counted as they are asked for."""

    def __init__(self, data: bytes, delay: float = 0.0) -> None:
        super().__init__("distant", "distant.bin", len(data), {})
        self.data = data
        self.delay = delay
        self.asked: list[tuple[int, int]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.failures = 0

    def get(self, start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(self.data)
        with self.lock:
            self.asked.append((start, stop))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        with self.lock:
            self.at_once -= 1
            if self.failures:
                self.failures -= 1
                raise StoreError("distant", "is busy")
        return self.data[start:stop]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW_BYTES", 16)
    monkeypatch.setattr(windows, "AHEAD_BYTES", 128)
    monkeypatch.setattr(windows, "MOST_BYTES", 256)
    monkeypatch.setattr(windows, "GAP_BYTES", 2)


def read(far: Far, start: int, size: int) -> bytes:
    view = bytearray(size)
    far.read_into(memoryview(view), start)
    return bytes(view)


ranges = st.lists(st.tuples(st.integers(0, 390), st.integers(0, 80)), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=400, max_size=400), ranges, ranges)
def test_every_read_gives_the_bytes(
    data: bytes, expected: list[tuple[int, int]], read_later: list[tuple[int, int]]
) -> None:
    source = Distant(data)
    held = Windows()
    for start, size in expected:
        held.expect((source, start, min(size, 400 - start)))
    covered = sorted((w.start, w.stop) for w in held._order)
    assert all(a[1] <= b[0] for a, b in pairwise(covered))
    assert all(stop - start <= 16 for start, stop in covered)
    wanted = {at for start, size in expected for at in range(start, min(400, start + size))}
    within = {at for start, stop in covered for at in range(start, stop)}
    assert wanted <= within  # and but for what fills up files nothing else
    for at in within - wanted:
        assert any(at + step in wanted for step in (-2, -1, 1, 2))
    far = Far(held, source)
    for start, size in (*expected, *read_later):
        size = min(size, 400 - start)
        assert read(far, start, size) == data[start : start + size]
        assert sum(each.size for each in held._held.values()) <= 256
    held.close()
    assert not held._held


def test_neighbours_are_one_request_and_what_is_between_is_not_read() -> None:
    source = Distant(bytes(range(200)))
    held = Windows()
    for start in range(0, 12, 3):
        held.expect((source, start, 3))
    held.expect((source, 100, 8))
    far = Far(held, source)
    for start in range(0, 12, 3):
        assert read(far, start, 3) == source.data[start : start + 3]
    read(far, 100, 8)
    held.close()
    assert sorted(source.asked) == [(0, 12), (100, 108)]


def test_a_second_pass_reads_what_is_still_there() -> None:
    source = Distant(bytes(64))
    held = Windows()
    held.expect((source, 0, 64))
    far = Far(held, source)
    for _ in range(3):
        for start in range(0, 64, 4):
            read(far, start, 4)
    held.close()
    assert len(source.asked) == 4


def test_what_is_read_side_by_side_comes_side_by_side() -> None:
    """Long tensors of two files, in turns: none of what came ahead is forgotten unread."""
    one, other = Distant(bytes(1600)), Distant(bytes(1600))
    held = Windows()
    held.expect((one, 0, 1600), (other, 0, 1600))
    for start in range(0, 1600, 4):
        read(Far(held, one), start, 4)
        read(Far(held, other), start, 4)
    held.close()
    assert len(one.asked) == len(set(one.asked)) == 100
    assert len(other.asked) == len(set(other.asked)) == 100


def test_threads_at_several_places_do_not_take_from_each_other() -> None:
    sources = [Distant(bytes(3200), delay=0.001) for _ in range(4)]
    held = Windows()
    for source in sources:
        held.expect((source, 0, 3200))

    def go_through(source: Distant) -> None:
        for start in range(0, 3200, 8):
            read(Far(held, source), start, 8)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(go_through, sources))
    held.close()
    assert all(len(source.asked) == len(set(source.asked)) == 200 for source in sources)


def test_several_are_on_their_way_and_no_more_than_agreed() -> None:
    source = Distant(bytes(1600), delay=0.002)
    held = Windows()
    held.expect((source, 0, 1600))
    far = Far(held, source)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda start: read(far, start, 8), range(0, 1600, 8)))
    held.close()
    assert 4 < source.most_at_once <= windows.AT_ONCE


def test_a_failure_is_told_and_the_next_read_asks_again() -> None:
    source = Distant(bytes(range(10)))
    source.failures = 1
    held = Windows()
    held.expect((source, 0, 10))
    with pytest.raises(StoreError, match="is busy"):
        read(Far(held, source), 0, 4)
    assert read(Far(held, source), 0, 4) == bytes(range(4))
    held.close()


def test_what_nobody_expected_is_read_all_the_same() -> None:
    source = Distant(bytes(range(100)))
    held = Windows()
    held.expect((source, 40, 10))
    assert read(Far(held, source), 30, 40) == bytes(range(30, 70))
    held.close()
    assert sorted(source.asked) == [(30, 40), (40, 50), (50, 66), (66, 70)]
