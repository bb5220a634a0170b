"""A model as its library saves it: the paths of the files are those of its modules."""

from __future__ import annotations

from loratool.base.layout import Headers, Layout

__all__ = ["LAYOUT"]


class Transformers(Layout):
    """What every model is unless something more specific claims it."""

    name = "transformers"

    def claims(self, headers: Headers) -> int:
        return 1


LAYOUT = Transformers()
