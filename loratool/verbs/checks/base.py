"""Whether an adapter fits a base: every site and every extra has its place."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter
from loratool.adapter.problems import site_problems
from loratool.base.fitting import as_spelled
from loratool.base.model import Model
from loratool.base.placing import with_places
from loratool.base.refusals import CODE, check_base
from loratool.base.replication import layer_ranges
from loratool.base.trained_on import training_notes
from loratool.errors import LoratoolError, MissingModuleError, UnsupportedError
from loratool.verbs.merging.context import Share
from loratool.verbs.merging.extras import plan_extra
from loratool.verbs.merging.sites import SitePlanner

__all__ = ["check_against_base"]


def check_against_base(adapter: Adapter, base: Model) -> Iterator[Finding]:
    """Yield what does not fit a base; only headers are read.

    Raises:
        LoratoolError: The base is damaged.
    """
    try:
        check_base(base)
    except UnsupportedError as error:  # codes of a kind that is known and not read
        yield finding(CODE, error.where, error.what, error.hint)
        return
    recorded = adapter.base_model
    for note in training_notes(recorded, base):
        yield finding("LT035", adapter.path, note)
    try:
        layers = layer_ranges(adapter.field("layer_replication"), adapter.path)
        view = base.as_trained(tasks=[str(adapter.field("task_type"))], layers=layers)
    except LoratoolError as error:
        yield finding("LT022", error.where, error.what, error.hint)
        return
    adapter = with_places(as_spelled(adapter, base), view)
    share = Share(adapter, 1.0)
    for extra in adapter.extras:
        try:
            plan_extra(share, extra, view)
        except LoratoolError as error:
            yield finding("LT024", error.where, error.what, error.hint)
    try:
        planner = SitePlanner(share, view)
    except LoratoolError as error:
        yield finding("LT022", error.where, error.what, error.hint)
        return
    for site in adapter.sites:
        if any(True for _ in site_problems(site, adapter)):
            continue
        try:
            planner.plan(site)
        except MissingModuleError as error:
            yield finding("LT021", site.label, error.what, error.hint)
        except LoratoolError as error:
            yield finding("LT022", site.label, error.what, error.hint)
