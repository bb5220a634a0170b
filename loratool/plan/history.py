"""How a file came to be, for its metadata: command, options, inputs and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import loratool
from loratool.adapter.model import HISTORY_KEY, Adapter
from loratool.errors import unreadable
from loratool.files.json import as_text
from loratool.files.places import called
from loratool.files.sources import whole
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = [
    "RECORD_NAME",
    "History",
    "Source",
    "as_recorded",
    "described_digest",
    "digest_of",
    "digest_of_all",
    "joint_digest",
]

BLOCK: Final = 1 << 20
NO_DIGEST: Final = "0" * 64
RECORD_NAME: Final = "loratool.json"
"""The file beside weights that records it, where these have no place for it or stay as they are."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input.

    Attributes:
        name: Its file or folder, without the path: the same inputs give the same bytes
            wherever they lie.
        weights: The files that are hashed; none where nothing is.
        described: SHA-256 of what its headers say, of a model that is too large to be hashed.
    """

    name: str
    weights: tuple[Path, ...] = ()
    described: str | None = None

    @staticmethod
    def of_adapter(adapter: Adapter) -> Source:
        """Return an adapter that is an input."""
        return Source(called(adapter.path), tuple(adapter.stamps))

    @staticmethod
    def of_model(path: Path, tensors: Iterable[StoredTensor]) -> Source:
        """Return a model that is an input, with what its headers say, for it is large."""
        return Source(called(path), described=described_digest(each.spec for each in tensors))

    def entry(self, digests: Mapping[Path, str]) -> dict[str, str]:
        """Return it as it is recorded, with the hash of its weights; zeros stand for none."""
        found = {"name": as_text(self.name)}
        if self.weights:
            found["sha256"] = joint_digest({p: digests.get(p, NO_DIGEST) for p in self.weights})
        if self.described is not None:
            found["headers_sha256"] = self.described
        return found


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

    @property
    def is_carded(self) -> bool:
        """Whether a card tells of it."""
        return not self.options.get("no_card")

    @property
    def hashed(self) -> list[Path]:
        """The files that are hashed, each once."""
        return list(dict.fromkeys(path for source in self.inputs for path in source.weights))

    def document(self, digests: Mapping[Path, str]) -> dict[str, Any]:
        """Return what is recorded.

        Args:
            digests: SHA-256 of the weights of the inputs; zeros hold their place where they are
                not known yet.
        """
        return {
            "command": self.verb,
            "version": loratool.__version__,
            "inputs": [source.entry(digests) for source in self.inputs],
            "options": {k: v for k, v in self.options.items() if v is not None and v != ()},
        }

    def text(self, digests: Mapping[Path, str]) -> str:
        """Return the same as the text of a key, as long whatever the hashes are."""
        return json.dumps(self.document(digests), sort_keys=True, separators=(",", ":"))

    def metadata(self, digests: Mapping[Path, str]) -> dict[str, str]:
        """Return the keys that record it, and the format."""
        return {"format": "pt", HISTORY_KEY: self.text(digests)}

    def beside(self, digests: Mapping[Path, str]) -> bytes:
        """Return the file that records it."""
        return (json.dumps(self.document(digests), indent=2, sort_keys=True) + "\n").encode()


def as_recorded(enabled: Sequence[bool]) -> str | None:
    """Return which parts are enabled as the command line has it, ``1,0,1``."""
    return ",".join("1" if each else "0" for each in enabled) or None


def described_digest(specs: Iterable[TensorSpec]) -> str:
    """Return the SHA-256 of names, dtypes and shapes, however the tensors are cut into files."""
    digest = hashlib.sha256()
    for spec in sorted(specs, key=lambda spec: spec.name):
        digest.update(f"{spec.name}\0{spec.dtype}\0{spec.shape}\n".encode())
    return digest.hexdigest()


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


def digest_of_all(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files that make up one thing; see :func:`joint_digest`.

    Raises:
        FileFormatError: One cannot be read.
    """
    return joint_digest({path: digest_of(path) for path in paths})


def joint_digest(digests: Mapping[Path, str]) -> str:
    """Return one hash for files that make up one thing: of a single file its own.

    Of several it is the SHA-256 of what ``sha256sum`` prints in the folder that they lie below,
    in the order of their names.
    """
    if len(digests) == 1:
        return next(iter(digests.values()))
    folder = os.path.commonpath([path.parent for path in digests])
    named = sorted((os.path.relpath(path, folder), digest) for path, digest in digests.items())
    return hashlib.sha256("".join(f"{d}  {name}\n" for name, d in named).encode()).hexdigest()
