"""A pipeline as diffusers saves it: a sub-folder for each component."""

from __future__ import annotations

from loratool.base.layout import Headers, Layout

__all__ = ["LAYOUT"]


class Diffusers(Layout):
    """Several models, each in a folder of its component's name."""

    name = "diffusers"

    def claims(self, headers: Headers) -> int:
        return 2 if headers.components else 0


LAYOUT = Diffusers()
