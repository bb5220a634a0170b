"""Read the factors of a site, whichever variant it is, as A ``(r, in)`` and B ``(out, r)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from loratool.adapter.model import Adapter, Site
from loratool.adapter.shapes import width_of
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.math.lowrank import LowRank
from loratool.math.namespace import Array
from loratool.ops.blocks import Arithmetic
from loratool.ops.merging.mergeable import check_plain

__all__ = ["expert_delta", "read_factors", "site_deltas"]


def read_factors(
    site: Site,
    kind: Arithmetic,
    width: int | None = None,
    edit: Callable[[StoredTensor, Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Read A as ``(r, in)`` and B as ``(out, r)``, with what lies between them in A.

    Args:
        site: The site. Its convolution kernels are flattened into the columns of A.
        kind: In what, and where.
        width: Columns of the delta, where A may be stored in a more compact form.
        edit: What to do with each stored tensor first.
    """
    assert site.down is not None and site.up is not None

    def read(stored: StoredTensor) -> Array:
        values = kind.read(stored)
        return values if edit is None else edit(stored, values)

    down, up = _matrix(read(site.down)), _matrix(read(site.up))
    for slot in (Slot.SINGULAR, Slot.DIAGONAL):
        if slot in site.slots:
            down = down * read(site.slots[slot]).reshape(-1, 1)
    if site.enabled:
        up = _unstacked(up, site.enabled, kind)
    if site.variant == "bdlora":
        if width is not None:
            down = _expand_blocks(down, width, kind)
        up = _expand_blocks(up, down.shape[0], kind)
    if site.variant == "qalora" and width is not None and down.shape[1] != width:
        # PEFT feeds A the mean of each group of inputs, times the number of groups.
        group = width // down.shape[1]
        factor = down.shape[1] / group
        spread = kind.zeros(*down.shape, group) + down[:, :, None]
        down = spread.reshape(down.shape[0], -1) * factor
    return down, up


def _matrix(factor: Array) -> Array:
    """Return a factor with its kernel flattened into the columns."""
    return factor.reshape(factor.shape[0], math.prod(factor.shape[1:]))


def expert_delta(down: Array, up: Array, expert: int, experts: int, scale: float) -> LowRank:
    """Return one expert's delta: A stacks experts along its rows, B interleaves its columns."""
    rank = down.shape[0] // experts
    return LowRank(
        up.reshape(up.shape[0], rank, experts)[:, :, expert],
        down.reshape(experts, rank, down.shape[1])[expert],
        scale,
    )


def site_deltas(
    site: Site,
    adapter: Adapter,
    kind: Arithmetic,
    edit: Callable[[StoredTensor, Array], Array] | None = None,
) -> list[LowRank]:
    """Return the deltas of a site, ``(out, in)`` with its scale: one, or one for each expert.

    ``edit`` is what to do with each stored tensor first.
    """
    if not site.is_plain:
        check_plain(site, adapter, is_named=False)
    down, up = read_factors(site, kind, width_of(site, adapter), edit)
    scale = site.scaling.factor
    if site.experts == 1:
        return [LowRank(up, down, scale)]
    return [expert_delta(down, up, expert, site.experts, scale) for expert in range(site.experts)]


def _unstacked(up: Array, enabled: Sequence[bool], kind: Arithmetic) -> Array:
    """Return the B ``(out, r · n)`` that stacked factors of a merged projection stand for."""
    rank, count = up.shape[1], sum(enabled)
    height = up.shape[0] // count
    whole = kind.zeros(height * len(enabled), rank * count)
    places = [place for place, is_enabled in enumerate(enabled) if is_enabled]
    for index, place in enumerate(places):
        rows = slice(place * height, (place + 1) * height)
        part = up[index * height : (index + 1) * height]
        whole[rows, index * rank : (index + 1) * rank] = part
    return whole


def _expand_blocks(factor: Array, columns: int, kind: Arithmetic) -> Array:
    """Return the block-diagonal matrix that a compact BD-LoRA factor stands for."""
    count = columns // factor.shape[1]
    if count == 1:
        return factor
    rows, width = factor.shape[0] // count, factor.shape[1]
    expanded = kind.zeros(factor.shape[0], columns)
    for index in range(count):
        part = slice(index * rows, (index + 1) * rows)
        expanded[part, index * width : (index + 1) * width] = factor[part]
    return expanded
