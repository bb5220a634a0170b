"""Pages whose examples are run: what a reader would type, and what is printed then.

Every ``sh`` and ``python`` block of such a page is run, in order, in one folder. A ``text`` block
right behind one is what it prints to a terminal of 80 columns. Comments before a block say what is
different about it::

    <!-- not run: needs a GPU -->
    <!-- exit status 1 -->
"""

from __future__ import annotations

import math
import os
import pty
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from samples import ROOT

FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (not run|exit status)[: ] *([^>]*?) *-->\n*\Z")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\d)", re.IGNORECASE)
DURATION = re.compile(r"\d+(?:\.\d+)? (?:ms|s|min)\b")
NOISE = 1e-5
"""What is nothing but rounding, which differs from one processor to the next."""
TOLERANCE = 0.01


@dataclass(frozen=True)
class Block:
    """One block that is run.

    Attributes:
        language: ``sh`` or ``python``.
        code: What is run.
        printed: What the page says that it prints, or ``None``.
        span: Where in the page's text ``printed`` is.
        status: The exit status that it ends with.
    """

    language: str
    code: str
    printed: str | None
    span: tuple[int, int]
    status: int


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page that are run, in order."""
    found = []
    fences = list(FENCE.finditer(page))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] not in ("sh", "python"):
            continue
        said = COMMENT.search(page[: fence.start()])
        if said is not None and said[1] == "not run":
            continue
        has_output = (
            following is not None
            and following[1] == "text"
            and not page[fence.end() : following.start()].strip()
        )
        found.append(
            Block(
                fence[1],
                fence[2],
                following[2] if has_output else None,
                following.span(2) if has_output else (0, 0),
                int(said[2]) if said is not None else 0,
            )
        )
    return found


def run(page: str, folder: Path) -> tuple[str, list[str]]:
    """Run a page in ``folder``.

    Returns:
        The page with what was really printed, and what differs from it, a paragraph each.
    """
    wrong = []
    pieces, end = [], 0
    for block in blocks(page):
        status, printed = _run(block, folder)
        if status != block.status:
            wrong.append(f"{block.code}ends with {status}, not {block.status}:\n{printed}")
        if block.printed is None:
            continue
        pieces += [page[end : block.span[0]], printed]
        end = block.span[1]
        if not alike(block.printed, printed):
            wrong.append(f"{block.code}prints\n{printed}not\n{block.printed}")
    return "".join((*pieces, page[end:])), wrong


def alike(said: str, printed: str) -> bool:
    """Whether two outputs differ in nothing but spaces, durations and the last digits."""
    one, other = _plain(said), _plain(printed)
    numbers = zip(map(float, NUMBER.findall(one)), map(float, NUMBER.findall(other)), strict=False)
    return NUMBER.sub("#", one) == NUMBER.sub("#", other) and all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=NOISE) for a, b in numbers
    )


def _plain(text: str) -> str:
    text = DURATION.sub("a while", text).replace("─", "")
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def _run(block: Block, folder: Path) -> tuple[int, str]:
    """Run one block as in a terminal, and return its status and what it prints."""
    command = {
        "sh": ["bash", "-euo", "pipefail", "-c", block.code],
        "python": [sys.executable, "-W", "error", "-c", block.code],
    }[block.language]
    with tempfile.TemporaryDirectory() as programs:
        _program(Path(programs, "loratool"), "-m loratool")
        _program(Path(programs, "python"), "")
        main, child = pty.openpty()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=child,
            stderr=child,
            cwd=folder,
            env=_environment(Path(programs)),
        )
        os.close(child)
        output = _read(main)
        return process.wait(), _tidy(output)


def _program(path: Path, arguments: str) -> None:
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
    path.chmod(0o755)


def _environment(programs: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LORATOOL_")}
    return kept | {
        "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "TERM": "dumb",  # 80 columns, no progress bar
        "NO_COLOR": "1",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }


def _read(descriptor: int) -> str:
    output = b""
    try:
        while data := os.read(descriptor, 65536):
            output += data
    except OSError:
        pass  # the other end is closed: that was all
    os.close(descriptor)
    return output.decode()


def _tidy(output: str) -> str:
    """Return it without carriage returns, trailing spaces and blank lines around it."""
    lines = (line.rstrip() for line in output.replace("\r\n", "\n").splitlines())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip("\n"))
    return f"{text}\n" if text else ""
