"""A real MPI job: one process goes on, the others serve it and print nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from samples import FIXTURES

from loratool.engines.engine import opened
from loratool.errors import OptionError

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
ROOT = Path(__file__).parents[3]
pytest.importorskip("mpi4py")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / "adapters/lora-linear", tmp_path / "one")
    lines = [
        json.dumps({"command": ["truncate", "one", "--rank", "1", "-o", f"out{number}"]})
        for number in range(12)
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(here: Path, *words: str, processes: int = 3) -> subprocess.CompletedProcess[str]:
    assert MPIEXEC is not None
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    return subprocess.run(
        [MPIEXEC, "-n", str(processes), sys.executable, *words],
        cwd=here,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_batch_is_carried_out_by_the_others(here: Path) -> None:
    done = run(here, "-m", "loratool", "batch", "jobs.jsonl", "--executor", "mpi", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["done"] == 12  # one document, by the first alone
    assert len(list(here.glob("out*"))) == 12


def test_an_error_is_told_once(here: Path) -> None:
    words = ("-m", "loratool", "batch", "nothing.jsonl", "--executor", "mpi")
    done = run(here, *words)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and done.stdout == ""


def test_one_process_is_not_enough(here: Path) -> None:
    words = ("-m", "loratool", "batch", "jobs.jsonl", "--executor", "mpi")
    done = run(here, *words, processes=1)
    assert done.returncode == 2 and "mpiexec -n 4" in done.stderr
    assert not (here / "jobs.records.jsonl").exists()


PROGRAM = """
import os, sys
from errands import die, square
from loratool.engines.course import Call, follow
from loratool.engines.engine import opened

with opened("mpi") as engine:
    calls = [Call(n, square, (n,)) for n in range(50)]
    if sys.argv[1] == "die":
        calls.insert(9, Call("die", die, (os.path.abspath("die"), 1)))
    taken = {}
    follow(engine, calls, lambda key, what, attempt, _: taken.update({key: what}))
    assert all(taken[n] == n * n for n in range(50))
with opened("mpi") as engine:  # the others are still there
    assert engine.submit(square, 5).result() == 25
print("whole")
"""


def test_python_programs_part_as_well(here: Path) -> None:
    (here / "program.py").write_text(PROGRAM)
    done = run(here, "program.py", "go")
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")


def test_a_process_that_dies_ends_the_job_and_another_run_goes_on(here: Path) -> None:
    (here / "program.py").write_text(PROGRAM)
    first = run(here, "program.py", "die")
    assert first.returncode != 0 and "whole" not in first.stdout
    again = run(here, "program.py", "die")
    assert (again.returncode, again.stdout) == (0, "whole\n"), again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_of_them(number: int, here: Path) -> None:
    assert MPIEXEC is not None
    program = here / "program.py"
    program.write_text(
        "from errands import wait_for\n"
        "from pathlib import Path\n"
        "from loratool.engines.engine import opened\n"
        "from loratool.engines.mpi import leave\n"
        "try:\n"
        "    with opened('mpi') as engine:\n"
        "        futures = [engine.submit(wait_for, 'never') for _ in range(4)]\n"
        "        Path('begun').touch()\n"
        "        futures[0].result()\n"
        "except KeyboardInterrupt:\n"
        "    leave(130)\n"
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    process = subprocess.Popen(
        [MPIEXEC, "-n", "3", sys.executable, str(program)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (here / "begun").exists() and process.poll() is None:
            pass
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()


def test_without_mpiexec_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(OptionError, match="needs the package mpi4py") as failure, opened("mpi"):
        pass
    assert failure.value.hint == "pip install 'loratool[mpi]'"
