"""Metadata of inputs that stays true of what is written from them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loratool.adapter.model import Adapter
from loratool.files.json import as_text
from loratool.schemes import builtin_schemes

__all__ = ["is_hash", "joined_metadata", "kept_metadata", "transferable", "without_hashes"]

HASHES: Final = re.compile(r"sshs_.*|modelspec\.hash_sha256")
"""What only the file is true of that it was computed from."""
LISTS: Final = ("modelspec.trigger_phrase", "modelspec.tags")
"""Texts with commas between words."""
TAGS: Final = "ss_tag_frequency"
"""By folder of images, how often each tag occurs there."""
TITLE: Final = "modelspec.title"
SOURCES: Final = "modelspec.merged_from"
OF_MODEL: Final = frozenset(
    (
        "ss_base_model_version",
        "modelspec.architecture",
        "modelspec.implementation",
        "modelspec.prediction_type",
        "modelspec.sai_model_spec",
    )
)
"""What is said of the model that an adapter is for: who says nothing of it does not object."""
OF_ONE: Final = frozenset((TITLE, "modelspec.date", SOURCES))
"""What no sum of several adapters inherits, even if all of them say it."""


def kept_metadata(adapter: Adapter, scheme: str = "") -> dict[str, str]:
    """Return what the input says about its training, and about what it shows.

    What describes the form of a file, a conversion changes; each scheme knows its own.

    Args:
        adapter: The input.
        scheme: What is written; by default any.
    """
    return transferable(adapter.metadata, is_renamed=scheme != adapter.scheme)


def transferable(metadata: Mapping[str, str], *, is_renamed: bool = False) -> dict[str, str]:
    """Return what a file says of itself and may be said of another with other tensors.

    Args:
        metadata: What it says.
        is_renamed: Whether what is said of the names of tensors is true no more.
    """
    if not metadata:
        return {}
    settings = [s.settings for s in builtin_schemes()]
    forms = [s.stale for s in settings if s.stale]
    if is_renamed:
        forms += [s.naming for s in settings if s.naming]
    stale = re.compile("|".join(("format", r"loratool\w*", "alpha", *forms)))
    return {k: v for k, v in metadata.items() if not stale.fullmatch(k)}


def is_hash(key: str) -> bool:
    """Whether what a key says is computed from the tensors of its file."""
    return HASHES.fullmatch(key) is not None


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file whose tensors change, and nothing else of it."""
    return {key: value for key, value in metadata.items() if not HASHES.fullmatch(key)}


def joined_metadata(adapters: Sequence[Adapter], scheme: str) -> dict[str, str]:
    """Return what is true of a sum of adapters.

    What all of them say is said of the sum; trigger words and tags are joined, and the sources
    listed where they have titles.

    Args:
        adapters: The inputs.
        scheme: What is written.
    """
    kept = [kept_metadata(adapter, scheme) for adapter in adapters]
    if len(kept) == 1:
        return kept[0]
    found: dict[str, str] = {}
    for key in dict.fromkeys(key for each in kept for key in each):
        values = [each[key] for each in kept if key in each]
        is_agreed = len(set(values)) == 1 and (len(values) == len(kept) or key in OF_MODEL)
        if key in LISTS:
            found[key] = ", ".join(_words(values))
        elif key == TAGS and (tags := _joined_tags(values)) is not None:
            found[key] = tags
        elif is_agreed and key not in OF_ONE:
            found[key] = values[0]
    if any(key.startswith("modelspec.") for each in kept for key in each):
        titles = (adapter.metadata.get(TITLE) or as_text(adapter.title) for adapter in adapters)
        found[SOURCES] = ", ".join(dict.fromkeys(titles))
    return found


def _words(texts: Iterable[str]) -> list[str]:
    """Return the words of texts with commas, each once."""
    words = (word.strip() for text in texts for word in text.split(","))
    return list(dict.fromkeys(word for word in words if word))


def _joined_tags(texts: Sequence[str]) -> str | None:
    """Return tags with how often each occurs; ``None`` where a text is something else.

    A folder that two trainings counted alike is one; else what they counted adds up.
    """
    folders: dict[str, list[dict[str, int]]] = {}
    for text in dict.fromkeys(texts):
        try:
            tables = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(tables, dict) or not all(map(_is_table, tables.values())):
            return None
        for folder, table in tables.items():
            if table not in folders.setdefault(folder, []):
                folders[folder].append(table)
    return json.dumps({folder: _added_up(found) for folder, found in folders.items()})


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _added_up(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)
