"""How a file came to be, for its metadata: command, options, inputs and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import loratool
from loratool.adapter.model import Adapter

__all__ = ["history_metadata", "provenance", "with_digest"]

PROVENANCE_KEY: Final = "loratool"
HASH_BLOCK: Final = 1 << 20


def provenance(
    verb: str, adapters: Sequence[Adapter], options: Mapping[str, Any]
) -> dict[str, str]:
    """Return the metadata of a weights file: the format, and how it came to be.

    Inputs go by name and SHA-256 of their weights, so that the same inputs give the same bytes
    wherever they lie. What a single input's metadata says is kept, but for its own history.
    """
    inputs = [(adapter.path.resolve().name, _hash(adapter)) for adapter in adapters]
    kept = adapters[0].metadata.items() if len(adapters) == 1 else ()
    return {**dict(kept), **history_metadata(verb, inputs, options)}


def history_metadata(
    verb: str, inputs: Sequence[tuple[str, str | None]], options: Mapping[str, Any]
) -> dict[str, str]:
    """Return the format, and the command, its options and its inputs (name and SHA-256)."""
    history = {
        "command": verb,
        "version": loratool.__version__,
        "inputs": [
            {"name": name} | ({"sha256": digest} if digest else {}) for name, digest in inputs
        ],
        "options": {k: v for k, v in options.items() if v is not None and v != ()},
    }
    return {"format": "pt", PROVENANCE_KEY: _text(history)}


def with_digest(metadata: Mapping[str, str], digest: str) -> dict[str, str]:
    """Return ``metadata`` with the SHA-256 of the first input in the history, and only there."""
    history = json.loads(metadata[PROVENANCE_KEY])
    history["inputs"][0]["sha256"] = digest
    return {**metadata, PROVENANCE_KEY: _text(history)}


def _text(history: Mapping[str, Any]) -> str:
    return json.dumps(history, sort_keys=True, separators=(",", ":"))


def _hash(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    with adapter.weights.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
