"""From flattened module names, with ``_`` for every ``.``, back to paths of known models."""

from __future__ import annotations

from functools import cache
from typing import Final

from loratool.names.families import claiming_flat
from loratool.names.vocabulary import Vocabulary, flatten

__all__ = ["BACKBONE", "ENCODER_KINDS", "KINDS", "flatten", "unflatten", "vocabulary"]

BACKBONE: Final = "backbone"
"""The backbones of pipelines, in either naming; each family has vocabularies of its own."""
ENCODER_KINDS: Final = ("clip", "t5", "language-model")
"""The vocabularies of text encoders, and of other models of transformers."""
ANY: Final = "any"
KINDS: Final = (BACKBONE, *ENCODER_KINDS, ANY)
"""The vocabularies; ``"any"`` is all of them together."""


def unflatten(flat: str, kind: str) -> tuple[str, ...]:
    """Return every path of the vocabulary that flattens to ``flat``.

    Args:
        flat: A flattened name without the scheme's prefix.
        kind: One of ``KINDS``.

    Returns:
        The paths: none if the name is unknown, several if it is ambiguous.

    Raises:
        KeyError: There is no such kind.
    """
    if kind == BACKBONE:
        return _of_backbones(flat)
    if kind == ANY:
        others = (path for kind in ENCODER_KINDS for path in vocabulary(kind).parse(flat))
        return tuple(sorted({*_of_backbones(flat), *others}))
    return vocabulary(kind).parse(flat)


def _of_backbones(flat: str) -> tuple[str, ...]:
    families = claiming_flat(flat)  # several of which have one vocabulary
    found = {id(v): v for family in families for v in (family.hub_names, family.native_names)}
    return tuple(dict.fromkeys(path for each in found.values() for path in each.parse(flat)))


@cache
def vocabulary(kind: str) -> Vocabulary:
    """Return the vocabulary of a kind of text encoder.

    Raises:
        KeyError: There is no such kind.
    """
    from loratool.names.text_encoders import CLIP_TEMPLATES, T5_TEMPLATES

    if kind == "language-model":
        from loratool.names.language_models import LANGUAGE_MODEL_TEMPLATES

        return Vocabulary(LANGUAGE_MODEL_TEMPLATES)
    return Vocabulary({"clip": CLIP_TEMPLATES, "t5": T5_TEMPLATES}[kind])
