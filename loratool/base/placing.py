"""What an adapter does not tell of the weights that it changes, and the base does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.expected import shape_problems
from loratool.adapter.model import Adapter, Site
from loratool.adapter.variant import LARGEST, SHAPE
from loratool.base.model import Model
from loratool.errors import LoratoolError

__all__ = ["with_places"]


def with_places(adapter: Adapter, base: Model) -> Adapter:
    """Return an adapter whose sites know the shapes of the base's weights, where they need them.

    What is not found stays untold, and is an error where it matters.
    """
    if not any(site.variant.needs_places for site in adapter.sites):
        return adapter
    shapes = [_shape(site, adapter, base) for site in adapter.sites]
    # Modules that were left out may have been the largest.
    largest = None if adapter.skipped else _largest(shapes)
    sites = tuple(
        replace(site, settings={**site.settings, SHAPE: shape, LARGEST: largest})
        if site.variant.needs_places
        else site
        for site, shape in zip(adapter.sites, shapes, strict=True)
    )
    return replace(adapter, sites=sites)


def _largest(shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, int] | None:
    """Return the most outputs and the most inputs; ``None`` where a weight is not known."""
    known = [shape for shape in shapes if shape is not None and len(shape) == 2]
    if len(known) != len(shapes) or not known:
        return None
    return max(shape[0] for shape in known), max(shape[1] for shape in known)


def _shape(site: Site, adapter: Adapter, base: Model) -> tuple[int, ...] | None:
    """Return the shape of a site's weight, ``(out, in, *kernel)``."""
    if any(True for _ in shape_problems(site)):
        return None
    try:
        place = base.find(site.module, family=adapter.family)
    except LoratoolError:  # which whoever places the site says better
        return None
    if place is None:
        return None
    shape = place.shape
    fits = [site.variant.places(site, each) for each in (shape, shape[::-1])]
    return shape[::-1] if fits == [False, True] and len(shape) == 2 else shape
