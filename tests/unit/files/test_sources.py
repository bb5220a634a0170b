"""Files that are elsewhere: read in ranges, whatever is asked for in whatever order."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import FileFormatError
from loratool.files.inputs import InputFiles, Stamp, stamp_of
from loratool.files.objects.addresses import parse_address
from loratool.files.ranges import Ranged
from loratool.files.sources import Source, forget, opened, size_of, source_of, stand_in, whole
from loratool.files.transfer import read_into


class Far(Ranged):
    """Bytes that are counted as they are asked for."""

    def __init__(self, data: bytes, first: int = 16, folder: Path = Path()) -> None:
        super().__init__("far", "far.bin", len(data), {})
        self._first = first
        self.data = data
        self.asked: list[tuple[int, int]] = []
        self.folder = folder
        self.store = self

    def get(self, start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(self.data)
        self.asked.append((start, stop))
        return self.data[start:stop]

    def lacking(self, sources: Sequence[Source]) -> Sequence[Source]:
        return sources

    def fetch(self, sources: Sequence[Source]) -> None:
        self.local = self.folder / "fetched"
        self.local.write_bytes(self.data)


@given(st.binary(max_size=200), st.integers(1, 50), st.data())
def test_every_read_gives_the_bytes(data: bytes, first: int, draw: st.DataObject) -> None:
    far = Far(data, first)
    for _ in range(8):
        start = draw.draw(st.integers(0, len(data)))
        stop = draw.draw(st.integers(start, len(data)))
        view = bytearray(stop - start)
        far.read_into(memoryview(view), start)
        assert bytes(view) == data[start:stop]
    with pytest.raises(FileFormatError):
        far.read_into(memoryview(bytearray(1)), len(data))


def test_a_header_in_pieces_takes_few_requests() -> None:
    far = Far(bytes(100_000), first=1000)
    for start in range(0, 60_000, 10):
        far.read_into(memoryview(bytearray(10)), start)
    ends = [0, 1000, 2000, 4000, 8000, 16000, 32000, 64000]
    assert far.asked == [*pairwise(ends)]


def test_a_stand_in_is_read_through(tmp_path: Path) -> None:
    data = os.urandom(5000)
    far = Far(data, folder=tmp_path)
    path = tmp_path / "far.bin"
    stand_in(path, far)
    try:
        assert size_of(path) == 5000 and source_of(path) is far
        with opened(path) as file:
            stamp = stamp_of(file)
            assert (file.read(100), file.seek(-7, io.SEEK_END)) == (data[:100], 4993)
            assert (file.read(), file.read(1)) == (data[-7:], b"")
        assert stamp.size == 5000
        files = InputFiles({path: stamp})
        view = memoryview(bytearray(5000))
        with files.using(path) as descriptor:  # fetched, because a descriptor is wanted
            read_into(descriptor, view, 0, path=path)
        assert bytes(view) == data
        files.check_unchanged()
        files.close()
        assert source_of(path) is None and whole(path).read_bytes() == data
        assert path.read_bytes() != data
    finally:
        forget([path])


def test_a_fetched_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    far = Far(bytes(50), folder=tmp_path)
    path = tmp_path / "far.bin"
    stand_in(path, far)
    try:
        with opened(path) as file:
            stamp = stamp_of(file)
        far.data = bytes(51)
        files = InputFiles({path: stamp})
        with pytest.raises(FileFormatError, match="was changed"), files.using(path):
            pass
        files.close()
    finally:
        forget([path])


def test_stamps_of_here_and_elsewhere() -> None:
    here, there = Stamp(1, 2, 30, 4), Stamp(-1, 0, 30, 0)
    assert here.fits(here) and here.fits(there) and there.fits(here)
    assert not here.fits(Stamp(1, 2, 30, 5)) and not there.fits(Stamp(1, 2, 31, 4))


@pytest.mark.parametrize(
    ("text", "root", "key"),
    [
        ("s3://bucket/a/b.safetensors", "s3://bucket", "a/b.safetensors"),
        ("s3:/bucket/a/", "s3://bucket", "a"),
        ("s3://bucket", "s3://bucket", ""),
        ("https://x.org/a%20b.bin?download=true#x", "https://x.org", "a b.bin"),
        ("http://localhost:80/m", "http://localhost:80", "m"),
    ],
)
def test_addresses(text: str, root: str, key: str) -> None:
    found = parse_address(text)
    assert found is not None and (found.root, found.key) == (root, key)


@pytest.mark.parametrize(
    "text", ["org/name", "hf://org/name", "https://huggingface.co/org/name", "C:/x", "a:b", "s3:"]
)
def test_what_is_no_address(text: str) -> None:
    assert parse_address(text) is None
