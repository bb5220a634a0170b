"""Where commands are run by nobody: cron, pipes that close, full disks, terminals of old."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from samples import FIXTURES

ROOT: Final = Path(__file__).parents[2]
ADAPTER: Final = FIXTURES / "adapters" / "lora-linear"
BASE: Final = FIXTURES / "bases" / "llama-untied"
BROKEN: Final = FIXTURES / "adapters" / "factor-missing"
CRON: Final = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
"""What cron gives a job: no HOME, no TERM, no LANG."""
LOOKS: Final = [
    f"inspect {ADAPTER}",
    f"inspect {ADAPTER} --spectrum",
    f"inspect {BASE}",
    f"validate {BROKEN}",
    f"validate {ADAPTER} --base {BASE}",
    f"compare {ADAPTER} {ADAPTER}",
    "schemes",
    "--help",
    "merge --help",
    "--version --verbose",
    f"truncate {ADAPTER} --rank 1 --dry-run -o out",
    f"merge {BASE} {ADAPTER} --dry-run -o out",
]


def shell(
    line: str, folder: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which LORATOOL stands for the command."""
    return subprocess.run(
        ["bash", "-c", line.replace("LORATOOL", f"{sys.executable} -m loratool")],
        capture_output=True,
        check=False,
        cwd=folder,
        env=env if env is not None else {**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_cron_and_ascii(look: str, tmp_path: Path) -> None:
    done = shell(f"exec <&-; LORATOOL {look}", tmp_path, CRON)
    assert done.returncode in (0, 1)
    assert b"Traceback" not in done.stderr and b"(a bug)" not in done.stderr
    assert not done.stderr or done.stderr.startswith(b"note: ")
    ascii_only = {**CRON, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    again = shell(f"LORATOOL {look}", tmp_path, ascii_only)
    assert again.returncode == done.returncode
    assert again.stdout.isascii() and again.stderr.isascii()
    assert b"\\u" not in again.stdout  # every character that is printed has a word in ASCII
    assert len(again.stdout.splitlines()) == pytest.approx(len(done.stdout.splitlines()), abs=3)


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_pipes_that_close_are_no_reason_to_speak(look: str, tmp_path: Path) -> None:
    done = shell(f"LORATOOL {look} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.stderr == b"" or done.stderr.startswith(b"note: ")
    assert done.returncode in (0, 1, 2)
    done = shell(f"LORATOOL {look} --debug | head -n 1", tmp_path)
    assert b"Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_a_full_disk_behind_standard_output_is_one_line(look: str, tmp_path: Path) -> None:
    done = shell(f"LORATOOL {look} > /dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-2:] == [
        "error: standard output: No space left on device",
        "hint: free some space, or choose another disk",
    ]


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "<&- >&- 2>&-", ">&- 2>/dev/full"])
def test_an_error_that_nobody_can_read_has_its_status(closed: str, tmp_path: Path) -> None:
    done = shell(f"LORATOOL inspect nothing {closed}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")
    done = shell(f"LORATOOL validate {BROKEN} >&- {closed.replace('>&- ', '')}", tmp_path)
    assert done.returncode == 1 or "full" in closed


def test_an_error_as_json_where_standard_error_is_closed(tmp_path: Path) -> None:
    done = shell("LORATOOL inspect nothing --json 2>&-", tmp_path)
    assert json.loads(done.stdout)["error"]["code"] == "LT301"


@pytest.mark.slow
def test_an_interruption_is_a_document_too(tmp_path: Path) -> None:
    code = (
        "import signal, os, sys; from loratool.cli import main, inspect_command\n"
        "import loratool.cli.render as render\n"
        "def stop(*_, **__): os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "render.print_json = stop\n"
        f"main.main(['inspect', {str(ADAPTER)!r}, '--json'])\n"
    )
    for name, status, word in (("SIGINT", 130, "LT322"), ("SIGTERM", 143, "LT323")):
        done = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, check=False
        )
        assert done.returncode == status
        assert json.loads(done.stdout)["error"]["code"] == word
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        ("MemoryError()", "LT320", "out of memory"),
        ('RuntimeError("CUDA out of memory. Tried")', "LT320", "out of memory"),
        ('RuntimeError("can\'t start new thread")', "LT321", "no more threads"),
        ('OSError(24, "Too many open files", "f")', "LT324", "Too many open files"),
        ('ModuleNotFoundError("No", name="matplotlib.pyplot")', "LT324", "matplotlib"),
        ('KeyError("x")', "LT399", "(a bug)"),
    ],
)
def test_whatever_else_goes_wrong_has_a_code(
    raised: str, code: str, words: str, tmp_path: Path
) -> None:
    script = (
        "from loratool.cli import main\nimport loratool.verbs.schemes\n"
        f"def fail(): raise {raised}\n"
        "import loratool.cli.schemes_command as command\ncommand.schemes = fail\n"
        "main.main(['schemes', '--json'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert done.stderr.startswith("error: ")
