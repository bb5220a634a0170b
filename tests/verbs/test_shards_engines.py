"""Merges in parts by every engine: the bytes are those of one run, whatever becomes of workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dask_cluster import DaskCluster
from samples import FIXTURES

import loratool
from loratool.engines import course
from loratool.errors import EngineError, LoratoolError

torch_files = pytest.importorskip("safetensors.torch")
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of many files, an adapter, and the merge of one run."""
    source = FIXTURES / "bases/llama-untied"
    shutil.copytree(FIXTURES / "adapters/lora-linear", tmp_path / "one")
    base = tmp_path / "base"
    base.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, base)
    tensors: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= torch_files.load_file(file)
    names = sorted(tensors)
    groups = [names[number::8] for number in range(8)]
    where = {}
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05}-of-00008.safetensors"
        part = {name: tensors[name] for name in group}
        torch_files.save_file(part, base / file_name, {"format": "pt"})
        where |= dict.fromkeys(group, file_name)
    index = {"metadata": {}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    loratool.merge("base", ["one"], "single")
    return tmp_path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(here: Path) -> None:
    assert bytes_of(here / "merged") == bytes_of(here / "single")
    assert not (here / "merged.loratool-parts").exists()
    assert loratool.verify("merged") == ()


class Lossy(Executor):
    """Threads that lose three calls in ten, silently or not, and carry out as many twice."""

    def __init__(self, seed: int) -> None:
        self.threads = ThreadPoolExecutor(3)
        self.random = random.Random(seed)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        chance = self.random.random()
        if chance < 0.3:
            future: Future[Any] = Future()
            if chance < 0.15:
                future.cancel()
            else:  # which is done, and nobody hears of it
                self.threads.submit(fn, *args, **kwargs)
            return future
        if self.random.random() < 0.3:
            self.threads.submit(fn, *args, **kwargs)
        return self.threads.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.threads.shutdown(wait)


def test_threads(here: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        loratool.merge("base", ["one"], "merged", executor=threads)
    check(here)


@pytest.mark.parametrize("seed", range(5))
def test_an_executor_that_loses_calls_and_repeats_them(
    seed: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "PERIOD", 0.01)
    with Lossy(seed) as lossy:
        loratool.merge("base", ["one"], "merged", executor=lossy)
    check(here)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", "processes:2"])
def test_processes_of_ours(name: str, here: Path) -> None:
    loratool.merge("base", ["one"], "merged", executor=name)
    check(here)


class Spawned:
    """Makes pools of which the first loses a process at once."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> Executor:
        self.made += 1
        pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
        if self.made == 1:
            pool.submit(signal.raise_signal, signal.SIGKILL)
        return pool


@pytest.mark.slow
def test_a_pool_whose_worker_dies(here: Path) -> None:
    make = Spawned()
    loratool.merge("base", ["one"], "merged", executor=make)
    assert make.made == 2
    check(here)


@pytest.mark.slow
def test_a_pool_that_nobody_replaces_is_one_line_and_another_run_goes_on(here: Path) -> None:
    with Spawned()() as pool, pytest.raises(EngineError, match="takes no calls any more"):
        loratool.merge("base", ["one"], "merged", executor=pool)
    assert not (here / "merged").exists()
    loratool.merge("base", ["one"], "merged", executor="processes:2")
    check(here)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cluster_of_dask(here: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "workers").mkdir()
    with DaskCluster(tmp_path / "workers") as cluster:
        loratool.merge(here / "base", [here / "one"], here / "merged", executor=cluster.name)
        assert bytes_of(here / "merged") == bytes_of(here / "single")
        words = ["merge", "base", "one", "-o", "again", "--executor", cluster.name, "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "loratool", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert json.loads(done.stdout)["merged"] > 0
        assert bytes_of(here / "again") == bytes_of(here / "single")


@pytest.mark.slow
@pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")
def test_an_mpi_job(here: Path) -> None:
    pytest.importorskip("mpi4py")
    assert MPIEXEC is not None
    words = ["merge", "base", "one", "-o", "merged", "--executor", "mpi", "--json"]
    done = subprocess.run(
        [MPIEXEC, "-n", "3", sys.executable, "-m", "loratool", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["merged"] > 0
    check(here)


DIVIDED: dict[str, Callable[[Any], object]] = {
    "merge": lambda what: loratool.merge("base", ["one"], "merged", executor=what),
    "verify": lambda what: loratool.verify("single", base="base", adapters=["one"], executor=what),
    "extract": lambda what: loratool.extract("base", "single", "drawn", rank=2, executor=what),
}


@pytest.mark.parametrize("what", [3, dict, "mpi"], ids=str)
@pytest.mark.parametrize("verb", DIVIDED)
def test_an_engine_that_is_not_there_leaves_no_folder(here: Path, verb: str, what: Any) -> None:
    with pytest.raises(LoratoolError, match="--executor"):
        DIVIDED[verb](what)
    assert sorted(path.name for path in here.iterdir()) == ["base", "one", "single"]


def test_status_takes_the_folder_of_parts_too(here: Path) -> None:
    loratool.merge("base", ["one"], "merged", shards="1/2")
    named = loratool.status("merged.loratool-parts")
    assert (named.output, named.parts) == (Path("merged"), loratool.status("merged").parts)
