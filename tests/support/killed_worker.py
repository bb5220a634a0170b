"""Kill a worker at each of its steps on the disk, and let another one go on.

``python killed_worker.py VERB FOLDER KILLS [CUT_ABOVE CUT_BYTES]`` expects inputs in FOLDER
(``base``, and ``adapter`` or ``tuned``) and prints a JSON object: how many steps there are, and
what is wrong after each kill. Every worker is forked, so that nothing is imported twice.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import loratool
from loratool.shards import model
from loratool.shards.folder import SUFFIX

STEPS = ("replace", "rename", "link", "mkdir", "unlink", "rmdir", "fsync", "pwrite", "ftruncate")


class Steps:
    """Counts calls of the system, and kills this process at one of them."""

    def __init__(self, last, *, before):
        self.count = 0
        self.last = last
        self.before = before

    def wrap(self, name):
        call = getattr(os, name)

        def counted(*args, **kwargs):
            self.count += 1
            is_last = self.count == self.last
            if is_last and self.before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, counted)


def work(verb, folder, output, **more):
    if verb == "merge":
        return loratool.merge(folder / "base", folder / "adapter", output, threads=1, **more)
    return loratool.extract(
        folder / "base", folder / "tuned", output, rank=2, device="cpu", threads=1, **more
    )


def forked(action):
    """Do something in a process of its own; return its status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def files(folder):
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def records(output):
    folder = output.with_name(output.name + SUFFIX) / "records"
    return {path.name: path.read_text() for path in folder.glob("[0-9]*.json")}


def faults(verb, folder, output, expected):
    """Go on after a kill, and yield what is wrong."""
    before = records(output)
    if output.exists() and files(output) != expected:
        yield "what is there is not whole"
    if status := forked(lambda: work(verb, folder, output, shards="auto")):
        yield f"the next worker failed ({status})"
    after = records(output)
    if any(after.get(name) != text for name, text in before.items() if after):
        yield "what was done was done again"
    if status := forked(lambda: work(verb, folder, output, shards="auto", finish=True)):
        yield f"finishing failed ({status})"
    if not output.exists() or files(output) != expected:
        yield "the output is another"
    left = [p.name for p in folder.iterdir() if SUFFIX in p.name and not p.name.startswith(".")]
    if left:
        yield f"left: {left}"


def main(verb, folder, kills):
    single = folder / "single" / "out"
    single.parent.mkdir()
    work(verb, folder, single)  # here, so that everything is imported once
    expected = files(single)
    counted = folder / "count"

    def count():
        steps = Steps(0, before=True)
        for name in STEPS:
            steps.wrap(name)
        work(verb, folder, folder / "out", shards="auto", finish=True)
        counted.write_text(str(steps.count))

    forked(count)
    total = int(counted.read_text())
    shutil.rmtree(folder / "out")
    found = {}
    killed = 0
    for number in range(kills):
        last = 1 + number * (total - 1) // max(1, kills - 1)
        output = folder / "out"

        def be_killed(last=last, number=number, output=output):
            steps = Steps(last, before=number % 2 == 0)
            for name in STEPS:
                steps.wrap(name)
            work(verb, folder, output, shards="auto", finish=True)

        killed += os.WIFSIGNALED(forked(be_killed))
        wrong = list(faults(verb, folder, output, expected))
        if wrong:
            found[last] = wrong
        for path in folder.glob("*out*"):
            shutil.rmtree(path)
    print(json.dumps({"steps": total, "killed": killed, "wrong": found}))


if __name__ == "__main__":
    if sys.argv[4:]:
        model.CUT_ABOVE, model.CUT_BYTES = map(int, sys.argv[4:])
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
