"""Draw docs/terminal.svg from the real output of real commands, run in a terminal.

python docs/terminal.py
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
WIDTH = 104
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""What would be fetched from elsewhere to show the picture."""
COMMANDS = (
    "loratool inspect fixtures/adapters/rank-alpha-patterns",
    "loratool validate fixtures/adapters/factor-missing --base fixtures/bases/llama-untied",
    "loratool merge fixtures/bases/llama-untied fixtures/adapters/rank-alpha-patterns -o {out}",
    "loratool verify {out}",
)


def run_in_terminal(command: list[str]) -> str:
    """Return what ``command`` prints to a terminal of WIDTH columns, progress left out."""
    main, child = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    subprocess.run(
        command, stdout=child, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, check=False
    )
    os.close(child)
    output = b""
    try:
        while data := os.read(main, 65536):
            output += data
    except OSError:
        pass  # the other end is closed: that was all
    os.close(main)
    return output.decode().replace("\r\n", "\n")


def main() -> None:
    """Run the commands and write the picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in COMMANDS:
            out = str(Path(folder) / "merged")
            words = [word.format(out=out) for word in line.split()]
            console.print(Text.assemble(("$ ", "dim"), (line.format(out="merged"), "bold")))
            output = run_in_terminal([sys.executable, "-m", *words])
            console.print(Text.from_ansi(output.replace(out, "merged").rstrip("\n")), end="\n\n")
    svg = FONTS.sub("", console.export_svg(title="loratool"))
    (ROOT / "docs" / "terminal.svg").write_text(svg)


if __name__ == "__main__":
    main()
