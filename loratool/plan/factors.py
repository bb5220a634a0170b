"""Read the factors of a site, whichever variant it is, as A ``(r, in)`` and B ``(out, r)``."""

from __future__ import annotations

from collections.abc import Callable

from loratool.adapter.model import Adapter, Site
from loratool.adapter.problems import check_plain
from loratool.files.spec import StoredTensor
from loratool.math.lowrank import LowRank
from loratool.math.namespace import Array
from loratool.plan.blocks import Arithmetic

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

    def read(stored: StoredTensor) -> Array:
        values = kind.read(stored)
        return values if edit is None else edit(stored, values)

    return site.variant.factors(site, read, width)


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
    down, up = read_factors(site, kind, site.variant.width(site), edit)
    scale = site.scaling.factor
    if site.experts == 1:
        return [LowRank(up, down, scale)]
    return [expert_delta(down, up, expert, site.experts, scale) for expert in range(site.experts)]
