"""Tab completion in the shells themselves: each is started on a terminal and typed into."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from samples import FIXTURES

from loratool.cli.completion import SHELLS, script_for

ROOT = Path(__file__).parents[3]
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r|\x07")
PATIENCE = 20.0

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
fish = pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with the command and the scripts in it, and nothing of anybody's."""
    command = tmp_path / "loratool"
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m loratool "$@"\n',
    )
    command.chmod(0o755)
    for shell in SHELLS:
        (tmp_path / f"script.{shell}").write_text(script_for(shell, "loratool"))
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("LANG", "LC_ALL", "PYTHONPYCACHEPREFIX")}
    path = f"{home}:{os.environ['PATH']}"
    return kept | {"HOME": str(home), "PATH": path, "TERM": "dumb", "PS1": "$ ", "COLUMNS": "200"}


@contextmanager
def terminal(command: list[str], home: Path) -> Iterator[int]:
    """Start a shell on a terminal, and give what it is typed into."""
    child, master = pty.fork()
    if child == 0:
        os.chdir(FIXTURES)
        os.execvpe(command[0], command, environment(home))
    try:
        yield master
    finally:
        os.close(master)
        os.kill(child, 9)
        os.waitpid(child, 0)


def typed(master: int, text: str, until: str) -> str:
    """Type a text, and return what is shown once it holds ``until``."""
    os.write(master, text.encode())
    shown, end = b"", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if select.select([master], [], [], 0.2)[0]:
            try:
                shown += os.read(master, 65536)
            except OSError:
                break
        plain = ESCAPES.sub(b"", shown).decode(errors="replace")
        if re.search(until, plain):
            return plain
    pytest.fail(f"{until!r} did not come; seen: {plain!r}")


@bash
@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "until"),
    [
        ("loratool tru\t", r"loratool truncate "),
        ("loratool convert x --to koh\t", r"--to kohya "),
        ("loratool convert x --to=koh\t", r"--to=kohya "),
        ("loratool merge --device cuda:0\t", r"cuda:0 "),
        ("loratool convert --fam\tsdxl-r\t", r"--family sdxl-refiner "),
        ("loratool inspect base\t", r"inspect bases/"),
        ("loratool merge --dr\t", r"--dry-run "),
        ("loratool inspect adapters/lora-lin\t --sp\t", r"linear/ --spectrum "),
    ],
)
def test_bash(line: str, until: str, home: Path) -> None:
    with terminal(["bash", "--norc", "--noprofile", "-i"], home) as master:
        typed(master, f"source {home}/script.bash; echo rea''dy\n", "ready")
        typed(master, line, until)


@zsh
@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "autoload -Uz compinit && compinit -u -D;"])
@pytest.mark.parametrize(
    ("line", "until"),
    [
        ("loratool tru\t", r"loratool truncate "),
        ("loratool convert x --to koh\t", r"--to kohya "),
        ("loratool merge --device cuda:0\t", r"cuda:0 "),
        ("loratool inspect base\t", r"inspect bases/"),
        (
            "loratool com\t\t",
            r"compose +-- Write the exact weighted sum of the deltas of adapters",
        ),
    ],
)
def test_zsh_with_and_without_compinit(line: str, until: str, before: str, home: Path) -> None:
    with terminal(["zsh", "-f", "-i"], home) as master:
        typed(master, f"PS1='$ '; {before} source {home}/script.zsh; echo rea''dy\n", "ready")
        typed(master, line, until)


@fish
@pytest.mark.slow
def test_fish_shows_descriptions_whole(home: Path) -> None:
    def asked(line: str) -> list[str]:
        done = subprocess.run(
            ["fish", "-c", f"source {home}/script.fish; complete -C '{line}'"],
            capture_output=True,
            text=True,
            check=True,
            cwd=FIXTURES,
            env=environment(home),
        )
        return done.stdout.splitlines()

    assert asked("loratool tru") == [
        "truncate\tWrite the best approximation of an adapter at lower ranks, with the exact error."
    ]
    assert asked("loratool convert x --to koh") == ["kohya"]
    assert asked("loratool merge --device cuda:0") == ["cuda:0"]
    assert asked("loratool inspect base") == ["bases/"]
    (line,) = asked("loratool merge --weigh")
    assert line.startswith("--weight\tA number for each adapter, in order, and PATTERN=N")


def test_completing_imports_neither_numpy_nor_torch(home: Path) -> None:
    code = (
        "import sys, os; from loratool.cli.main import main\n"
        "try: main([])\nexcept SystemExit: pass\n"
        "print({'numpy', 'torch', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    for words, place in (("loratool\ntr", 1), ("loratool\nconvert\n--to\nko", 3)):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(place)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | asked | {"_LORATOOL_COMPLETE": "bash_complete"},
        )
        assert done.stdout.strip() in ("plain,truncate", "plain,kohya")
        assert done.stderr.strip().endswith("set()")
