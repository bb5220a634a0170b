"""Whether an adapter fits a base: every site and every extra has its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter
from loratool.errors import BaseModelError, LoratoolError
from loratool.files.checkpoint import open_checkpoint
from loratool.ops.merging.context import BaseView, Share
from loratool.ops.merging.experts import assign_parameters
from loratool.ops.merging.extras import plan_extra
from loratool.ops.merging.mergeable import check_base, site_problems
from loratool.ops.merging.replication import layer_ranges, replicate
from loratool.ops.merging.sites import locate_site, replaced_shapes
from loratool.ops.merging.tied import find_tie

__all__ = ["check_against_base"]


def check_against_base(adapter: Adapter, path: Path) -> Iterator[Finding]:
    """Yield what does not fit the base at ``path``; only headers are read.

    Raises:
        LoratoolError: The base itself cannot be read.
    """
    checkpoint = open_checkpoint(path)
    try:
        check_base(checkpoint)
    except BaseModelError as error:
        yield finding("LT027", error.where, error.what, error.hint)
        return
    try:
        layers = layer_ranges(adapter.field("layer_replication"), adapter.path)
        view = BaseView(checkpoint, replicate(checkpoint, layers) if layers else None)
        assigned = assign_parameters(adapter, view)
    except LoratoolError as error:
        yield finding("LT022", error.where, error.what, error.hint)
        return
    tie = find_tie(view)
    hidden = tie if tie is not None and not tie.is_stored else None
    head = (hidden.head, view.shape(hidden.embedding)) if hidden else None
    share = Share(adapter, 1.0)
    for extra in adapter.extras:
        try:
            plan_extra(share, extra, view, head)
        except LoratoolError as error:
            yield finding("LT024", error.where, error.what, error.hint)
    for site in adapter.sites:
        if any(True for _ in site_problems(site, adapter)):
            continue
        try:
            locate_site(site, adapter, view, assigned, head, resized=replaced_shapes(share))
        except LoratoolError as error:
            code = "LT021" if "no such module" in error.what else "LT022"
            yield finding(code, site.label, error.what, error.hint)
