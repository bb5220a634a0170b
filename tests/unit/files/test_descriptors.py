"""Few files are open at a time, none while it is used is closed, and changes are noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratool.errors import FileFormatError
from loratool.files.descriptors import MOST_IDLE, Descriptors
from loratool.files.inputs import InputFiles, stamp_of


def make_files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{index}.bin" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index % 256]))
    return paths


def open_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_are_open_and_none_in_use_is_closed(tmp_path: Path) -> None:
    paths = make_files(tmp_path, 4 * MOST_IDLE)
    before = open_count()
    opened: list[Path] = []
    closed: list[Path] = []

    def open_file(path: Path) -> int:
        opened.append(path)
        return os.open(path, os.O_RDONLY)

    files = Descriptors(open_file, lambda path, descriptor: closed.append(path))
    with files.using(paths[0]) as first:
        for path in paths[1:]:
            with files.using(path) as descriptor:
                assert os.pread(descriptor, 1, 0) == path.read_bytes()
        assert open_count() - before <= MOST_IDLE + 1
        assert os.pread(first, 1, 0) == b"\0"
        with files.using(paths[0]) as again:
            assert again == first
    assert opened == paths
    assert closed and paths[0] not in closed
    with files.using(paths[1]):
        assert opened.count(paths[1]) == 2
    files.close()
    assert open_count() == before


def test_a_pinned_input_stays_open(tmp_path: Path) -> None:
    paths = make_files(tmp_path, 2 * MOST_IDLE)
    files = InputFiles({path: stamp_of(path) for path in paths})
    first = files.descriptor(paths[0])
    for path in paths:
        with files.using(path):
            pass
    assert files.descriptor(paths[0]) == first
    assert os.pread(first, 1, 0) == b"\0"
    files.check_unchanged()
    files.close()
    with pytest.raises(OSError, match="descriptor"):
        os.pread(first, 1, 0)


@pytest.mark.parametrize("how", ["written", "exchanged", "gone"])
def test_a_change_of_a_file_that_was_closed_meanwhile_is_noticed(how: str, tmp_path: Path) -> None:
    paths = make_files(tmp_path, 3 * MOST_IDLE)
    files = InputFiles({path: stamp_of(path) for path in paths})
    for path in paths:
        with files.using(path):
            pass
    if how == "written":
        os.utime(paths[0], ns=(1, 1))
    elif how == "exchanged":
        (tmp_path / "new").write_bytes(b"\0")
        (tmp_path / "new").replace(paths[0])
    else:
        paths[0].unlink()
    words = {"written": "was changed", "exchanged": "was exchanged", "gone": "vanished"}
    with pytest.raises(FileFormatError, match=words[how]):
        files.check_unchanged()
    with pytest.raises(FileFormatError), files.using(paths[0]):
        pass
    files.close()
