"""The deltas of a site in float64, whichever plain variant it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from loratool.adapter.model import Adapter, Site
from loratool.adapter.shapes import width_of
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.math.lowrank import LowRank
from loratool.ops.merging.mergeable import check_plain
from loratool.values.arrays import decode

if TYPE_CHECKING:
    from loratool.values.expr import Array

__all__ = ["expert_deltas", "factors_of", "site_deltas"]

Edit = Callable[[StoredTensor, "Array"], "Array"]


def factors_of(
    site: Site, width: int | None = None, edit: Edit | None = None
) -> tuple[Array, Array]:
    """Read A as ``(r, in)`` and B as ``(out, r)``, with what lies between them in A.

    Args:
        site: The site. Its convolution kernels are flattened into the columns of A.
        width: Columns of the delta, where A may be stored in a more compact form.
        edit: What to do with each stored tensor first.
    """
    assert site.down is not None and site.up is not None

    def read(stored: StoredTensor) -> Array:
        values = decode(stored)
        return values if edit is None else edit(stored, values)

    down, up = (array.reshape(array.shape[0], -1) for array in (read(site.down), read(site.up)))
    for slot in (Slot.SINGULAR, Slot.DIAGONAL):
        if slot in site.slots:
            down = down * read(site.slots[slot]).reshape(-1, 1)
    if site.enabled:
        up = _unstacked(up, site.enabled)
    if site.variant == "bdlora":
        if width is not None:
            down = _expand_blocks(down, width)
        up = _expand_blocks(up, down.shape[0])
    if site.variant == "qalora" and width is not None and down.shape[1] != width:
        # PEFT feeds A the mean of each group of inputs, times the number of groups.
        group = width // down.shape[1]
        down = np.repeat(down, group, axis=1) * (down.shape[1] / group)
    return down, up


def site_deltas(site: Site, adapter: Adapter, edit: Edit | None = None) -> list[LowRank]:
    """Return the deltas of a site, ``(out, in)`` with its scale: one, or one for each expert.

    ``edit`` is what to do with each stored tensor first.
    """
    if not site.is_plain:
        check_plain(site, adapter, is_named=False)
    down, up = factors_of(site, width_of(site, adapter), edit)
    return expert_deltas(down, up, site.experts, site.scaling.factor)


def expert_deltas(down: Array, up: Array, experts: int, scale: float) -> list[LowRank]:
    """Return the delta of each expert: A stacks them along its rows, B interleaves its columns.

    Args:
        down: ``(experts · r, in)``.
        up: ``(out, r · experts)``.
        experts: How many there are; 1 for an ordinary module.
        scale: What multiplies each delta.
    """
    if experts == 1:
        return [LowRank(up, down, scale)]
    rank = down.shape[0] // experts
    ups = up.reshape(up.shape[0], rank, experts)
    downs = down.reshape(experts, rank, down.shape[1])
    return [LowRank(ups[:, :, expert], downs[expert], scale) for expert in range(experts)]


def _unstacked(up: Array, enabled: Sequence[bool]) -> Array:
    """Return the B ``(out, r · n)`` that stacked factors of a merged projection stand for."""
    rank, count = up.shape[1], sum(enabled)
    height = up.shape[0] // count
    whole = np.zeros((height * len(enabled), rank * count))
    places = [place for place, is_enabled in enumerate(enabled) if is_enabled]
    for index, place in enumerate(places):
        rows = slice(place * height, (place + 1) * height)
        part = up[index * height : (index + 1) * height]
        whole[rows, index * rank : (index + 1) * rank] = part
    return whole


def _expand_blocks(factor: Array, columns: int) -> Array:
    """Return the block-diagonal matrix that a compact BD-LoRA factor stands for."""
    count = columns // factor.shape[1]
    if count == 1:
        return factor
    rows, width = factor.shape[0] // count, factor.shape[1]
    expanded = np.zeros((factor.shape[0], columns))
    for index in range(count):
        part = slice(index * rows, (index + 1) * rows)
        expanded[part, index * width : (index + 1) * width] = factor[part]
    return expanded
