"""How a model of the hub is named: ``org/name[@revision][/inside]``, ``hf://…``, or its address."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from loratool.errors import OptionError

__all__ = ["DEFAULT_ENDPOINT", "HubName", "endpoint", "is_safe", "parse_hub_name"]

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
HOSTS: Final = frozenset(("huggingface.co", "www.huggingface.co", "hf.co"))
ROUTES: Final = frozenset(("tree", "blob", "resolve", "raw"))
"""What stands before a revision in an address of the hub."""
OTHERS: Final = ("datasets", "spaces", "kernels", "buckets")
"""What the hub holds besides models."""
MARKED: Final = re.compile(r"(?P<kind>hf|https?):/+(?P<rest>.*)", re.DOTALL)
"""A path that was parsed as one of the disk has lost its second slash."""
PART: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}")
SPECIAL: Final = re.compile(r"(refs/pr/\d+|refs/convert/[^/]+)(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class HubName:
    """A model or adapter of the hub.

    Attributes:
        repo: ``org/name``; a few old ones are a name alone.
        revision: A branch, tag or commit; ``None`` for what is current.
        inside: A folder or file in it; empty for all of it.
        is_told: Whether it was written so that it can mean nothing else.
    """

    repo: str
    revision: str | None = None
    inside: str = ""
    is_told: bool = False

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{f'/{self.inside}' if self.inside else ''}"


def endpoint() -> str:
    """Return the address of the hub, that of ``HF_ENDPOINT`` where it is set."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def parse_hub_name(text: str, *, alone: bool = False) -> HubName | None:
    """Return what a text names on the hub; ``None`` where it cannot be a name of the hub's.

    Args:
        text: As a user or a file says it.
        alone: Whether a name without ``org/`` counts, as old configurations have it (``gpt2``).

    Raises:
        OptionError: It is an address of something else.
    """
    marked = MARKED.fullmatch(text)
    if marked is None:
        parts = text.split("/")
        return _name(text, is_told=False) if len(parts) > 1 or alone else None
    rest = marked["rest"]
    said = f"{marked['kind']}://{rest}"
    kind = rest.partition("/")[0] if marked["kind"] == "hf" else ""
    if marked["kind"] != "hf":
        rest, kind = _of_address(said)
    if kind in OTHERS:
        raise OptionError(said, f"is one of the hub's {kind}, not a model")
    found = _name(rest.removeprefix("models/"), is_told=True)
    if found is None:
        raise OptionError(
            said, "is no name of a model of the hub", hint="write hf://org/name[@revision][/folder]"
        )
    return found


def _of_address(text: str) -> tuple[str, str]:
    """Return what an address of the hub names, as after ``hf://``, and what kind of thing it is."""
    address = urlsplit(text)
    own = urlsplit(endpoint())
    path = unquote(address.path)
    if address.netloc == own.netloc and path.startswith(own.path):
        path = path[len(own.path) :]
    elif address.hostname not in HOSTS:
        raise OptionError(
            text,
            "is no address of the Hugging Face hub",
            hint="download it, and name the file; or set HF_ENDPOINT, where it is a mirror",
        )
    parts = [part for part in path.split("/") if part]
    kind = parts[0] if parts else ""
    at = next((i for i in (1, 2) if len(parts) > i and parts[i] in ROUTES), None)
    if at is None:
        return "/".join(parts[:2]), kind
    repo, revision, inside = parts[:at], parts[at + 1 : at + 2], parts[at + 2 :]
    special = SPECIAL.fullmatch("/".join(parts[at + 1 :]))
    if special is not None:
        revision, inside = [special[1]], [special[2]] if special[2] else []
    words = f"@{revision[0].replace('/', '%2F')}" if revision else ""
    return "/".join(("/".join(repo) + words, *inside)), kind


def _name(text: str, *, is_told: bool) -> HubName | None:
    """Return the parts of ``org/name[@revision][/inside]``, each of which is safe in a path."""
    before, at, after = text.partition("@")
    revision: str | None = None
    if at and before.count("/") < 2:
        special = SPECIAL.fullmatch(after)
        if special is not None:
            revision, inside = special[1], special[2] or ""
        else:
            revision, _, inside = after.partition("/")
            revision = unquote(revision)
        parts = before.split("/")
    else:
        parts = text.split("/")
        parts, inside = parts[:2], "/".join(parts[2:])
    inside = inside.rstrip("/")
    is_named = all(PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts)
    if not is_named or len("/".join(parts)) > 96:
        return None
    if revision is not None and not _is_revision(revision):
        return None
    if inside and not is_safe(inside):
        return None
    return HubName("/".join(parts), revision, inside, is_told)


def _is_revision(text: str) -> bool:
    return REVISION.fullmatch(text) is not None and is_safe(text)


def is_safe(path: str) -> bool:
    """Whether a path inside of a model stays there, is plain text and no longer than disks take."""
    return (
        all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in path.split("/"))
        and "\\" not in path
        and path.isprintable()
        and len(path) < 1024
    )
