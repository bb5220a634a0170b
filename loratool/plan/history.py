"""How a file came to be, for its metadata: command, options, inputs and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import loratool
from loratool.adapter.model import HISTORY_KEY
from loratool.errors import unreadable
from loratool.files.json import as_text
from loratool.files.sources import whole

__all__ = ["History", "Source", "digest_of"]

BLOCK: Final = 1 << 20
NO_DIGEST: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class Source:
    """An input.

    Attributes:
        name: Its file or folder, without the path: the same inputs give the same bytes
            wherever they lie.
        weights: What is hashed; ``None`` where nothing is.
    """

    name: str
    weights: Path | None = None


@dataclass(frozen=True, slots=True)
class History:
    """A command with its options and inputs.

    Attributes:
        verb: The command.
        inputs: What it was given.
        options: What was asked for; ``None`` and empty tuples mean nothing was.
    """

    verb: str
    inputs: tuple[Source, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self, digests: Sequence[str | None] = ()) -> dict[str, str]:
        """Return the keys that record it, and the format.

        Args:
            digests: SHA-256 of the weights of each input; zeros hold their place where they
                are not known yet.
        """
        known = dict(enumerate(digests))
        history = {
            "command": self.verb,
            "version": loratool.__version__,
            "inputs": [
                {"name": as_text(source.name)}
                | ({"sha256": known.get(i) or NO_DIGEST} if source.weights is not None else {})
                for i, source in enumerate(self.inputs)
            ],
            "options": {k: v for k, v in self.options.items() if v is not None and v != ()},
        }
        text = json.dumps(history, sort_keys=True, separators=(",", ":"))
        return {"format": "pt", HISTORY_KEY: text}


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        FileFormatError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with whole(path).open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()
