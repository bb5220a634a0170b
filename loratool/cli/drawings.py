"""``--plot`` and ``--report``: what is drawn of a report, besides what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratool.display.shown import Shown

__all__ = ["check_drawings", "write_drawings"]


def check_drawings(
    plot: Path | None,
    page: Path | None,
    *,
    force: bool,
    inputs: Sequence[Path],
    may_be_inside: bool = False,
) -> None:
    """Make sure that what was asked for can be written, before any work is done.

    Args:
        plot: Where a picture goes.
        page: Where a page goes.
        force: Whether existing ones may be replaced.
        inputs: What is read or written besides, which they may not touch.
        may_be_inside: Whether they may be in folders of these: nothing there is one of them.

    Raises:
        LoratoolError: It cannot.
    """
    if may_be_inside:
        inputs = [each for each in inputs if not each.is_dir()]
    if plot is not None:
        from loratool.reports.pictures import check_plot

        check_plot(plot, force=force, inputs=inputs)
    if page is not None:
        from loratool.reports.page import check_page

        check_page(page, force=force, inputs=inputs)


def write_drawings(report: Shown, plot: Path | None, page: Path | None, *, force: bool) -> None:
    """Write the picture and the page that were asked for."""
    if plot is not None:
        from loratool.reports.pictures import plot as draw

        draw(report, plot, force=force)
    if page is not None:
        from loratool.reports.page import write_page

        write_page(report, page, force=force)
