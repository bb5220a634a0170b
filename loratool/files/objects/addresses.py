"""What an address of an object store or of a web server names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from loratool.files.hub.names import HOSTS, endpoint

__all__ = ["Address", "parse_address"]

MARKED: Final = re.compile(
    r"(?P<kind>s3|gs|az|https?):/+(?P<host>[^/?#]+)(?:/(?P<key>[^?#]*))?.*", re.S
)
"""A path that was parsed as one of the disk has lost its second slash."""
WEB: Final = ("http", "https")


@dataclass(frozen=True, slots=True)
class Address:
    """Where files are.

    Attributes:
        kind: ``s3``, ``gs``, ``az``, ``http`` or ``https``.
        host: A bucket, or a server.
        key: A file or the beginning of what is called like a folder.
    """

    kind: str
    host: str
    key: str

    @property
    def root(self) -> str:
        """The address of the bucket or server."""
        return f"{self.kind}://{self.host}"

    @property
    def is_listed(self) -> bool:
        """Whether it can be asked what it holds."""
        return self.kind not in WEB

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root


def parse_address(text: str) -> Address | None:
    """Return what a text names in a store; ``None`` where it is none, or is the hub's."""
    marked = MARKED.fullmatch(text)
    if marked is None:
        return None
    kind, host = marked["kind"], marked["host"]
    if kind in WEB and (host.lower() in HOSTS or host == urlsplit(endpoint()).netloc):
        return None
    key = (marked["key"] or "").strip("/")
    return Address(kind, host, unquote(key) if kind in WEB else key)
