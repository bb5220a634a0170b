"""From flattened module names, with ``_`` for every ``.``, back to paths.

Flattening forgets which underscores were dots. A vocabulary of whole names brings them back, and
tells where it cannot: every path of the vocabulary that flattens alike is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from loratool.names.diffusion import flux, flux2, qwen_image, sd3, unet, wan
from loratool.names.diffusion.family import NUMBER, is_number
from loratool.names.diffusion.language_models import LANGUAGE_MODEL_TEMPLATES
from loratool.names.diffusion.text_encoders import CLIP_TEMPLATES, T5_TEMPLATES

__all__ = ["KINDS", "Vocabulary", "flatten", "unflatten"]

ANY: Final = "any"

TEMPLATES: Final = {
    "unet": unet.HUB_TEMPLATES,
    "ldm-unet": unet.NATIVE_TEMPLATES,
    "flux": flux.HUB_TEMPLATES,
    "bfl-flux": flux.NATIVE_TEMPLATES,
    "sd3": sd3.HUB_TEMPLATES,
    "mmdit-sd3": sd3.NATIVE_TEMPLATES,
    "flux2": flux2.HUB_TEMPLATES,
    "bfl-flux2": flux2.NATIVE_TEMPLATES,
    "wan": wan.HUB_TEMPLATES,
    "native-wan": wan.NATIVE_TEMPLATES,
    "qwen-image": qwen_image.TEMPLATES,
    "clip": CLIP_TEMPLATES,
    "t5": T5_TEMPLATES,
    "language-model": LANGUAGE_MODEL_TEMPLATES,
}
"""Kind of model to its names; ``*`` stands for a number."""

KINDS: Final = (*TEMPLATES, ANY)
"""The vocabularies; ``"any"`` is all of them together."""

MAX_LENGTH: Final = 512
"""Longer names are those of no model."""


def flatten(module: str) -> str:
    """Return the flattened name of a module path."""
    return module.replace(".", "_")


def unflatten(flat: str, kind: str) -> tuple[str, ...]:
    """Return every path of the vocabulary that flattens to ``flat``.

    Args:
        flat: A flattened name without the scheme's prefix.
        kind: One of ``KINDS``.

    Returns:
        The paths, in alphabetical order: none if the name is unknown, several if it is ambiguous.

    Raises:
        KeyError: There is no such kind.
    """
    return vocabulary(kind).parse(flat)


@cache
def vocabulary(kind: str) -> Vocabulary:
    """Return the vocabulary of a kind.

    Raises:
        KeyError: There is no such kind.
    """
    if kind == ANY:
        return Vocabulary(each for templates in TEMPLATES.values() for each in templates)
    return Vocabulary(TEMPLATES[kind])


@dataclass(slots=True)
class Node:
    """A place in the tree of flattened templates; its edges are what stands between ``_``."""

    edges: dict[str, Node] = field(default_factory=dict)
    templates: set[str] = field(default_factory=set)


class Vocabulary:
    """A set of name templates, searched by flattened names.

    The templates form a tree, so that a search visits no node twice: its cost is bounded by the
    size of the vocabulary, whatever the name is.

    Args:
        templates: Dotted names; the segment ``*`` stands for a number.
    """

    __slots__ = ("_root",)

    def __init__(self, templates: Iterable[str]) -> None:
        self._root = Node()
        for template in templates:
            node = self._root
            for word in flatten(template).split("_"):
                node = node.edges.setdefault(word, Node())
            node.templates.add(template)

    def parse(self, flat: str) -> tuple[str, ...]:
        """Return the paths that flatten to ``flat``, in alphabetical order."""
        if len(flat) > MAX_LENGTH or NUMBER in flat:
            return ()
        return tuple(sorted(set(self._paths(flat.split("_")))))

    def _paths(self, words: list[str]) -> Iterator[str]:
        places: list[tuple[Node, tuple[str, ...]]] = [(self._root, ())]
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
