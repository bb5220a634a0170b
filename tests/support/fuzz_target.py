"""Fuzz one parser, guided by which of its lines are reached: ``fuzz_target.py KIND SEEDS …``.

KIND is a suffix of weights, ``json``, ``yaml`` or ``pattern``.
What follows SEEDS, a folder of inputs that are grown, are options of libFuzzer. An input that ends
in anything but a value or a ``LoratoolError``, that takes more memory or time than is promised, is
kept by libFuzzer as ``crash-*``, ``oom-*`` or ``timeout-*``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["loratool"]):
    from loratool.adapter.expressions import Expression, ExpressionError
    from loratool.errors import LoratoolError
    from loratool.files.containers import open_weights
    from loratool.files.json import read_json_object
    from loratool.files.yaml import read_flat_yaml


def weights(path: Path) -> None:
    """Open a file, and read of each tensor no more than it has."""
    from loratool.files.container import read_view

    for stored in open_weights(path).tensors.values():
        assert len(read_view(stored)) == stored.spec.nbytes


def pattern(path: Path) -> None:
    """Match a pattern, with names that make other engines go back and forth."""
    text = path.read_text("utf-8", "replace")
    try:
        expression = Expression(text)
        for name in ("a" * 60, "model.layers.10.self_attn.q_proj", ""):
            expression.fullmatch(name)
            expression.match(name)
    except ExpressionError:
        pass


def main() -> None:
    """Fuzz until libFuzzer's limits are reached."""
    name, *options = sys.argv[1:]
    # In memory: a disk would be what is measured.
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")
    path /= f"fuzz-{os.getpid()}.{name}"
    parsers: dict[str, Callable[[Path], object]] = {
        "json": read_json_object,
        "yaml": read_flat_yaml,
        "pattern": pattern,
    }
    parse = parsers.get(name, weights)

    def once(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(LoratoolError):
            parse(path)

    atheris.Setup([sys.argv[0], *options], once)
    try:
        atheris.Fuzz()
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
