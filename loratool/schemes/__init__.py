"""Key schemes, one file each. A new file with a ``SCHEME`` and a ``CLAIM`` is found by itself.

A claim is a literal: what the keys of such a file look like, what the file is called in a folder,
and what configuration lies beside it. Claims are read from the text of the files, and a scheme is
imported only once its claim matches, or somebody names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from loratool.adapter.scheme import Scheme
from loratool.discovery import Plugins

__all__ = [
    "DEFAULT_SCHEME",
    "Claim",
    "builtin_schemes",
    "claimed",
    "claims",
    "scheme_named",
    "scheme_names",
    "sidecar_names",
    "weights_names",
]

DEFAULT_SCHEME: Final = "peft"
"""What is written where neither somebody nor the input says."""
NUMBERED: Final = re.compile(r"\.\d+(?=\.)", re.ASCII)
FILES: Final = Plugins(__name__, "SCHEME")


@dataclass(frozen=True)
class Claim:
    """What the files of a scheme look like at a glance.

    Attributes:
        module: The module that the scheme is in.
        keys: A regular expression that some key of every such file matches somewhere.
        weights: What the weights file is called in a folder, the usual name first.
        sidecar: The configuration beside it; empty where there is none.
    """

    module: str
    keys: str
    weights: tuple[str, ...] = ()
    sidecar: str = ""

    @property
    def name(self) -> str:
        """The scheme's name: that of its file."""
        return self.module.replace("_", "-")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression, for keys that are lines of one text."""
        return re.compile(self.keys, re.MULTILINE)


class _Known:
    """All claims, and what follows from them."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        read = (Claim(module, **claim) for module, claim in found.items())
        self.claims = tuple(sorted(read, key=lambda claim: claim.name))
        self.modules = {claim.name: claim.module for claim in self.claims}
        self.sidecars = frozenset(claim.sidecar for claim in self.claims if claim.sidecar)

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Names of weights files, the one that most schemes use first."""
        names = [name for claim in self.claims for name in claim.weights]
        stems = [name.partition(".")[0] for name in names]

        def order(name: str) -> tuple[int, bool, str]:
            stem = name.partition(".")[0]
            return -stems.count(stem), not name.endswith(".safetensors"), name

        return tuple(sorted(set(names), key=order))


_last: list[_Known] = []
"""What was read last: the claims are asked for several times for each adapter."""


def _known() -> _Known:
    found = FILES.claims()
    if not _last or _last[0].found is not found:
        _last[:] = [_Known(found)]
    return _last[0]


def claims() -> tuple[Claim, ...]:
    """Return the claims of all schemes, in the order of their names; none is imported."""
    return _known().claims


def _imported(module: str) -> Scheme:
    scheme: Scheme = FILES.load(module)
    return scheme


def scheme_names() -> tuple[str, ...]:
    """Return the names of all schemes; none is imported."""
    return tuple(claim.name for claim in claims())


def scheme_named(name: str) -> Scheme:
    """Return the scheme called ``name``.

    Raises:
        KeyError: There is none.
    """
    return _imported(_known().modules[name])


def builtin_schemes() -> tuple[Scheme, ...]:
    """Return every scheme, in the order of their names."""
    return tuple(_imported(claim.module) for claim in claims())


def claimed(keys: Iterable[str]) -> Iterator[Scheme]:
    """Yield the schemes that may have named some of ``keys``, in the order of their names."""
    # Layers differ in their numbers alone, and no claim asks for one.
    text = "\n".join(set(NUMBERED.sub(".0", "\n".join(keys)).split("\n")))
    for claim in claims():
        if claim.pattern.search(text):
            yield _imported(claim.module)


def weights_names() -> tuple[str, ...]:
    """Return what weights files are called in folders, the name that most schemes use first."""
    return _known().weights


def sidecar_names() -> frozenset[str]:
    """Return what the configurations beside weights are called."""
    return _known().sidecars
