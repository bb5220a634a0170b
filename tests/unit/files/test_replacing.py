"""Several runs that finish at once for one destination: one of them is there in the end, whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from loratool.files.atomic import staged


@pytest.mark.parametrize("exists", [False, True])
def test_folders_that_replace_each_other(exists: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if exists:
        output.mkdir()
        (output / "old").write_text("old")
    failures: list[BaseException] = []
    gate = threading.Barrier(8)

    def finish(number: int) -> None:
        for _ in range(20):
            try:
                with staged(output, folder=True, force=True, sync=False) as place:
                    (place / "a").write_text(str(number))
                    (place / "b").write_text(str(number))
                    gate.wait(30)
            except BaseException as error:
                failures.append(error)
                gate.abort()
                return

    threads = [threading.Thread(target=finish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert sorted(path.name for path in output.iterdir()) == ["a", "b"]
    assert (output / "a").read_text() == (output / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
