"""Vocabularies: whole names, searched by their flattened form with ``_`` for every ``.``.

Flattening forgets which underscores were dots. A vocabulary of whole names brings them back, and
tells where it cannot: every path of the vocabulary that flattens alike is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

__all__ = ["NUMBER", "Vocabulary", "filled", "flatten", "is_number"]

NUMBER: Final = "*"
"""The segment of a template that stands for a number, such as that of a block."""

MAX_DIGITS: Final = 6
"""No model has a million blocks; longer numbers are not read at all."""

MAX_LENGTH: Final = 512
"""Longer names are those of no model."""


def flatten(module: str) -> str:
    """Return the flattened name of a module path."""
    return module.replace(".", "_")


def is_number(segment: str) -> bool:
    """Whether a segment is a number as models write it: short, decimal, without leading zeros."""
    return (
        0 < len(segment) <= MAX_DIGITS
        and segment.isascii()
        and segment.isdigit()
        and (segment[0] != "0" or segment == "0")
    )


@dataclass(slots=True)
class Node:
    """A place in the tree of flattened templates; its edges are what stands between ``_``."""

    edges: dict[str, Node] = field(default_factory=dict)
    templates: set[str] = field(default_factory=set)


class Vocabulary:
    """A set of name templates, searched by flattened names.

    The templates form a tree, so that a search visits no node twice: its cost is bounded by the
    size of the vocabulary, whatever the name is. The tree is made at the first search.

    Args:
        templates: Dotted names; the segment ``*`` stands for a number.
    """

    __slots__ = ("_root", "templates")

    def __init__(self, templates: Iterable[str]) -> None:
        self.templates = tuple(dict.fromkeys(templates))
        self._root: Node | None = None

    def parse(self, flat: str) -> tuple[str, ...]:
        """Return the paths that flatten to ``flat``, in alphabetical order."""
        if len(flat) > MAX_LENGTH or NUMBER in flat:
            return ()
        if self._root is None:
            self._root = _tree(self.templates)
        return tuple(sorted(set(_paths(self._root, flat.split("_")))))


def _tree(templates: Iterable[str]) -> Node:
    root = Node()
    for template in templates:
        node = root
        for word in flatten(template).split("_"):
            node = node.edges.setdefault(word, Node())
        node.templates.add(template)
    return root


def _paths(root: Node, words: list[str]) -> Iterator[str]:
    places: list[tuple[Node, tuple[str, ...]]] = [(root, ())]
    for word in words:
        following: list[tuple[Node, tuple[str, ...]]] = []
        for node, numbers in places:
            if word in node.edges:
                following.append((node.edges[word], numbers))
            if NUMBER in node.edges and is_number(word):
                following.append((node.edges[NUMBER], (*numbers, word)))
        places = following
    for node, numbers in places:
        for template in node.templates:
            yield filled(template, numbers)


def filled(template: str, numbers: tuple[str, ...]) -> str:
    """Return a template with its numbers in their places."""
    remaining = iter(numbers)
    segments = template.split(".")
    return ".".join(next(remaining) if each == NUMBER else each for each in segments)
