"""The files beside an adapter's weights: which of them the result keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from loratool.adapter.model import Adapter
from loratool.files.checkpoint import is_weight_like
from loratool.files.links import DANGLING_LINK, NO_FILE, STRAY_LINK, link_roots, stays_inside
from loratool.files.npy import SHAPES
from loratool.files.sources import whole
from loratool.plan.history import RECORD_NAME
from loratool.plan.sidecar import TOKENIZER_FILES, Sidecar
from loratool.schemes import sidecar_names
from loratool.schemes.companions import is_training_state

__all__ = ["carried_files", "without_room"]

DESCRIPTIONS: Final = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
"""What is about one adapter; kept where the result is made of one, in a folder.

It is no part of an adapter, and nobody misses it elsewhere.
"""
OF_WEIGHTS: Final = re.compile(r".*\.distcp|" + re.escape(SHAPES))
"""Files that are parts of weights: shards of a distributed checkpoint, widths of rows."""
OF_REPOSITORY: Final = ".gitattributes"
"""What every folder of the hub has."""


def carried_files(
    adapters: Sequence[Adapter],
) -> tuple[list[Sidecar], list[tuple[str, str]], list[str]]:
    """Return the files to copy, the files that stay behind with the reason, and notes.

    Tokenizers travel along, for an adapter may have been trained with tokens of its own; of
    several that differ the first is taken, which a note says.
    """
    found: dict[str, Path] = {}
    left: list[tuple[str, str]] = []
    notes: list[str] = []
    for adapter in adapters:
        if not adapter.path.is_dir():
            continue
        for path, reason in _files(adapter):
            name = path.name
            is_wanted = name in TOKENIZER_FILES or (len(adapters) == 1 and name in DESCRIPTIONS)
            if path == adapter.weights or name in (*sidecar_names(), OF_REPOSITORY, RECORD_NAME):
                continue
            if OF_WEIGHTS.fullmatch(name):
                continue
            if name in DESCRIPTIONS and len(adapters) > 1:
                continue
            if reason or not is_wanted:
                shown = name if len(adapters) == 1 else str(path)
                left.append((shown, reason or _reason(path)))
            elif name not in found:
                found[name] = path
            elif whole(found[name]).read_bytes() != whole(path).read_bytes():
                notes.append(f"{path} differs from {found[name]}, which is kept")
    return [Sidecar(name, path) for name, path in sorted(found.items())], left, notes


def without_room(sidecars: Sequence[Sidecar]) -> list[tuple[str, str]]:
    """Return the files that stay behind where the output is one file, with the reason."""
    return [(s.name, "the output is a single file") for s in sidecars if s.name not in DESCRIPTIONS]


def _files(adapter: Adapter) -> Iterator[tuple[Path, str]]:
    roots = link_roots(adapter.folder, [adapter.weights])
    for path in sorted(adapter.folder.iterdir()):
        if path.name.startswith("."):
            yield path, "a hidden file"
        elif path.is_symlink() and not stays_inside(path, roots):
            yield path, STRAY_LINK
        elif path.is_dir():
            yield path, "a folder"
        elif path.is_file():
            yield path, ""
        else:
            yield path, DANGLING_LINK if path.is_symlink() else NO_FILE


def _reason(path: Path) -> str:
    if is_training_state(path):
        return "training state"
    if is_weight_like(path):
        return "weights beside the adapter, which were not read"
    return "neither a tokenizer nor a description"
