"""Trained tokens as bundled embeddings: what trainers of kohya's kind write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from loratool.values.expr import Expr

__all__ = ["BundledTokens", "token_of"]

PREFIX: Final = "bundle_emb."
BUNDLE: Final = re.compile(r"bundle_emb\.(?P<token>.+?)\.(string_to_param\.\*|clip_l)", re.DOTALL)
TOKEN: Final = re.compile(r"<(?P<token>[^<>]+)>", re.DOTALL)


def token_of(name: str) -> str | None:
    """Return the token whose embedding a tensor is, by its name."""
    match = TOKEN.fullmatch(name) or BUNDLE.fullmatch(name)
    return match["token"] if match else None


@dataclass(frozen=True, slots=True)
class BundledTokens:
    """``bundle_emb.<token>.string_to_param.*``.

    Attributes:
        are_stacks: Whether the embedding of a single vector is stored as ``(1, dim)``.
    """

    are_stacks: bool

    def key(self, name: str) -> str | None:
        """Return the name of a token's embedding."""
        if name.startswith(PREFIX):
            return name
        token = token_of(name)
        return f"{PREFIX}{token}.string_to_param.*" if token is not None else None

    def stored(self, value: Expr) -> Expr:
        """Return its values, with a dimension more for a single vector."""
        if self.are_stacks and len(value.shape) == 1:
            return value.reshaped((1, *value.shape))
        return value
