"""Read the factors of a site, whichever variant it is, as A ``(r, in)`` and B ``(out, r)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loratool.adapter.model import Adapter, Site
from loratool.adapter.shapes import width_of
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.math.lowrank import LowRank
from loratool.ops.merging.mergeable import check_plain
from loratool.ops.tensors import Arithmetic, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["expert_delta", "read_factors", "site_deltas"]


def read_factors(
    site: Site,
    kind: Arithmetic,
    width: int | None = None,
    edit: Callable[[StoredTensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read A as ``(r, in)`` and B as ``(out, r)``, with what lies between them in A.

    Args:
        site: The site. Its convolution kernels are flattened into the columns of A.
        kind: In what, and where.
        width: Columns of the delta, where A may be stored in a more compact form.
        edit: What to do with each stored tensor first.
    """
    assert site.down is not None and site.up is not None

    def read(stored: StoredTensor) -> Tensor:
        values = read_tensor(stored, kind)
        return values if edit is None else edit(stored, values)

    down = read(site.down).flatten(1)
    up = read(site.up).flatten(1)
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
        down = down.repeat_interleave(group, dim=1) * (down.shape[1] / group)
    return down, up


def expert_delta(down: Tensor, up: Tensor, expert: int, experts: int, scale: float) -> LowRank:
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
    edit: Callable[[StoredTensor, Tensor], Tensor] | None = None,
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


def _unstacked(up: Tensor, enabled: Sequence[bool]) -> Tensor:
    """Return the B ``(out, r · n)`` that stacked factors of a merged projection stand for."""
    rank, count = up.shape[1], sum(enabled)
    height = up.shape[0] // count
    whole = up.new_zeros(height * len(enabled), rank * count)
    places = [place for place, is_enabled in enumerate(enabled) if is_enabled]
    for index, place in enumerate(places):
        rows = slice(place * height, (place + 1) * height)
        part = up[index * height : (index + 1) * height]
        whole[rows, index * rank : (index + 1) * rank] = part
    return whole


def _expand_blocks(factor: Tensor, columns: int) -> Tensor:
    """Return the block-diagonal matrix that a compact BD-LoRA factor stands for."""
    count = columns // factor.shape[1]
    if count == 1:
        return factor
    rows, width = factor.shape[0] // count, factor.shape[1]
    expanded = factor.new_zeros(factor.shape[0], columns)
    for index in range(count):
        part = slice(index * rows, (index + 1) * rows)
        expanded[part, index * width : (index + 1) * width] = factor[part]
    return expanded
