"""Variants that are a few entries of a transform of a whole matrix, at places that a seed tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from loratool.adapter.model import Site
from loratool.adapter.variant import SHAPE, Variant
from loratool.errors import UnsupportedError

__all__ = ["Spectrum"]


class Spectrum(Variant):
    """What only the base tells the shape of, and ``adapter_config.json`` the rest.

    Attributes:
        called: What such an adapter is called in messages.
    """

    called: ClassVar[str] = ""
    is_scaled = False
    has_factors = True
    needs_shape = True
    needs_places = True
    kernel_slots = frozenset()

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if "seed" not in site.settings:
            yield "LT022", "has its seed and scale in adapter_config.json, which is not there"

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        if site.settings.get(SHAPE) is None:
            raise UnsupportedError(
                site.module,
                f"is a {self.called}: only the base tells the shape of its weight",
                hint="give --base BASE; headers are enough",
            )

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        return len(shape) == 2 and super().places(site, shape)

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        return site.in_features

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        return min(site.geometry.rank, site.out_features, site.in_features)
