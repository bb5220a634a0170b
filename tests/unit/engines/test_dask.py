"""A real cluster of dask: workers that are killed, a scheduler that goes and comes back."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import errands
import pytest
from dask_cluster import DaskCluster

from loratool.engines import dask
from loratool.engines.course import RETRIES, Call, follow
from loratool.engines.engine import opened
from loratool.errors import EngineError, OptionError

pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    with warnings.catch_warnings(), DaskCluster(tmp_path) as found:
        yield found


def squares(count: int) -> list[Call]:
    return [Call(number, errands.square, (number,)) for number in range(count)]


def test_calls_come_back_and_reasons_too(cluster: DaskCluster, tmp_path: Path) -> None:
    taken: dict[Any, tuple[Any, int]] = {}
    calls = [
        *squares(50),
        Call("refuse", errands.refuse, (str(tmp_path / "refuse"),)),
        Call("twice", errands.fail, (str(tmp_path / "twice"), 2, MemoryError(), 5)),
        Call("always", errands.fail, (str(tmp_path / "always"), 99)),
    ]
    with opened(cluster.name) as engine:
        follow(engine, calls, lambda key, what, attempt, _: taken.update({key: (what, attempt)}))
    assert all(taken[number] == (number * number, 1) for number in range(50))
    assert isinstance(taken["refuse"][0], OptionError) and taken["refuse"][1] == 1
    assert taken["twice"] == (25, 3)  # which no memory of the scheduler prevents
    assert isinstance(taken["always"][0], MemoryError) and taken["always"][1] == RETRIES + 1


def test_a_killed_worker_loses_nothing(cluster: DaskCluster, tmp_path: Path) -> None:
    taken: dict[Any, Any] = {}

    def take(key: Any, what: Any, attempt: int, seconds: float) -> None:
        assert key not in taken
        taken[key] = what
        if len(taken) == 20:
            (tmp_path / "now").touch()

    args = (str(tmp_path / "dies"), str(tmp_path / "now"))
    calls = squares(60)
    calls.insert(0, Call("dies", errands.die_when, args))
    with opened(cluster.name) as engine:
        follow(engine, calls, take)
    dead = [worker for worker in cluster.workers if worker.poll() is not None]
    assert [worker.returncode for worker in dead] == [-signal.SIGKILL]
    assert taken.pop("dies") not in (os.getpid(), dead[0].pid)
    assert taken == {number: number * number for number in range(60)}


def test_a_scheduler_that_comes_back_gets_everything_again(
    cluster: DaskCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.engines.course.CHECKING", 1.0)
    taken: dict[Any, tuple[Any, int]] = {}

    def take(key: Any, what: Any, attempt: int, seconds: float) -> None:
        assert key not in taken
        taken[key] = (what, attempt)
        if len(taken) == 20:
            cluster.kill_scheduler()
            cluster.start()

    with opened(cluster.name) as engine:
        engine.most = 40  # so that some are out, and some are not yet
        follow(engine, squares(100), take)
    assert {key: what for key, (what, _) in taken.items()} == {n: n * n for n in range(100)}
    assert {attempt for _, attempt in taken.values()} <= {1, 2, 3}


def test_one_that_stays_away_is_one_line(
    cluster: DaskCluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    taken: dict[Any, Any] = {}

    def take(key: Any, what: Any, attempt: int, seconds: float) -> None:
        taken[key] = what
        if len(taken) == 20:
            cluster.kill_scheduler()

    monkeypatch.setattr(dask, "CONNECTING", 1)
    with opened(cluster.name) as engine:
        engine.most = 40
        with pytest.raises(EngineError, match="cannot be reached") as failure:
            follow(engine, squares(100), take)
    assert failure.value.where == cluster.name and "\n" not in failure.value.what
    assert "dask scheduler" in str(failure.value.hint)
    assert taken == {number: number * number for number in taken} and len(taken) < 100
    assert capfd.readouterr().err == ""


def test_a_cluster_without_workers_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask, "JOINING", 1)
    with DaskCluster(tmp_path, workers=0) as cluster:
        with pytest.raises(EngineError, match="no free worker") as failure, opened(cluster.name):
            pass
        assert f"dask worker tcp://127.0.0.1:{cluster.port}" in str(failure.value.hint)


def test_workers_that_all_go_are_missed(
    cluster: DaskCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.engines.course.CHECKING", 0.1)

    def take(key: Any, what: Any, attempt: int, seconds: float) -> None:
        for worker in cluster.workers:
            worker.kill()
            worker.wait()

    with opened(cluster.name) as engine:
        monkeypatch.setattr(dask, "JOINING", 1)
        engine.most = 4
        with pytest.raises(EngineError, match="no free worker"):
            follow(engine, squares(100), take)


def test_workers_have_to_have_the_same_loratool(tmp_path: Path) -> None:
    other = tmp_path / "other" / "loratool"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('none of this')\n")
    cluster = DaskCluster(tmp_path, workers=1)
    try:
        cluster.start({"PYTHONPATH": str(other.parent)})
        with pytest.raises(EngineError, match="run loratool") as failure, opened(cluster.name):
            pass
    finally:
        cluster.__exit__()
    assert "install loratool" in str(failure.value.hint)


def test_nobody_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "CONNECTING", 0.2)
    with pytest.raises(EngineError, match="cannot be reached"), opened("dask://127.0.0.1:9"):
        pass


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(OptionError, match="distributed") as failure, opened("dask://h:1"):
        pass
    assert failure.value.hint == "pip install 'loratool[dask]'"
