"""The backbone of a pipeline alone, as it was published: its family's names, and no prefix."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.base.layout import Headers
from loratool.base.single_file import Section, SingleFile, backbone_prefix
from loratool.names.paths import plausible_families

__all__ = ["LAYOUT"]


class Backbone(SingleFile):
    """What most of whose modules are those of one family of diffusion models."""

    name = "backbone"

    def claims(self, headers: Headers) -> int:
        if headers.components or headers.config.model_type:
            return 0
        prefix = backbone_prefix(headers.modules)
        return 2 if plausible_families([m.removeprefix(prefix) for m in headers.modules]) else 0

    def sections(self, headers: Headers) -> Sequence[Section]:
        return ()


LAYOUT = Backbone()
