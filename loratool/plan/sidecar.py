"""A file that travels along with weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratool.files.sources import ranged, size_of, whole

__all__ = ["TOKENIZER_FILES", "Sidecar", "files_read", "read_whole", "write_sidecar"]

TOKENIZER_FILES: Final = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
    )
)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A file that travels along.

    Attributes:
        name: Its path inside the output folder.
        source: The file to copy, or ``None``.
        content: The bytes to write where there is no source.
        why: Why it is not simply the base's file; empty if it is.
    """

    name: str
    source: Path | None
    content: bytes | None = None
    why: str = ""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return size_of(self.source) if self.source else len(self.content or b"")


def files_read(weights: Iterable[Path], sidecars: Iterable[Sidecar]) -> Iterator[Path]:
    """Yield weights, what may have been read beside them (configurations, indices), sidecars."""
    files = list(weights)
    yield from files
    for folder in dict.fromkeys(file.parent for file in files):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".npy", ".yaml", ".yml") and path.is_file():
                yield path
    yield from (sidecar.source for sidecar in sidecars if sidecar.source is not None)


def read_whole(
    weights: Iterable[Path], hashed: Iterable[Path], sidecars: Iterable[Sidecar]
) -> Iterator[Path]:
    """Yield what has to be on the disk: but for weights whose data are read in ranges, all."""
    yield from (path for path in weights if ranged(path) is None)
    yield from hashed
    yield from (sidecar.source for sidecar in sidecars if sidecar.source is not None)


def write_sidecar(sidecar: Sidecar, folder: Path) -> None:
    """Write a file into ``folder``, and the folders it lies in."""
    target = folder / sidecar.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if sidecar.source is None:
        target.write_bytes(sidecar.content or b"")
    else:
        shutil.copyfile(whole(sidecar.source), target)
