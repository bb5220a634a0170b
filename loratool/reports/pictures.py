"""Pictures of reports, drawn with matplotlib, which is imported when one is asked for."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.display.shown import Shown
from loratool.errors import OptionError, OutputError, UnsupportedError, printable
from loratool.files.atomic import check_output, staged
from loratool.reports.charts import Chart, Curves, Heat, charts_of, is_drawn, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "check_plot", "plot"]

FORMATS: Final = (".png", ".svg", ".pdf", ".html")
LONGEST_NAME: Final = 60
LONGEST_TITLE: Final = 90
LONGEST_LABEL: Final = 40
CELL: Final = 0.19
"""Inches of a row or a column of a heat map, as far as these have room."""
WIDEST: Final = 9.0
NARROWEST: Final = 2.4
NARROWEST_PAGE: Final = 6.0
ABOVE: Final = 0.45
"""Inches for a title."""
TURNED: Final = 4
"""Characters of a column's name from which on it is turned."""
LABEL: Final = 0.075
"""Inches of a character of a label."""
BANDS: Final = 0.5
"""How dark all bands of a picture are together."""
DARK: Final = 0.6
"""Cosines beyond this are drawn on a dark ground."""


def check_plot(path: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Make sure that a picture can be drawn to ``path``, before any work is done.

    Raises:
        OptionError: Its ending is no format that is drawn.
        UnsupportedError: matplotlib is not installed.
        OutputError: It exists, or cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError("--plot", f"{path.name!r} ends in none of {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401 - is it there?
    except ImportError:
        raise UnsupportedError(
            "--plot", "matplotlib is not installed", hint="pip install 'loratool[plot]'"
        ) from None
    if path.is_dir():
        raise OutputError(path, "is a folder; a picture is a file", hint="choose another name")
    check_output(path, force=force, inputs=inputs, kinds=FORMATS)


def plot(report: Shown, path: str | PathLike[str], *, force: bool = False) -> None:
    """Draw a report: an adapter with its spectra, a comparison, what was extracted or truncated.

    Args:
        report: What :func:`inspect` with ``spectrum``, :func:`compare`, :func:`compare_layers`,
            :func:`extract`, :func:`truncate` or :func:`compose` returned.
        path: A ``.png``, ``.svg``, ``.pdf`` or ``.html`` file.
        force: Replace an existing one.

    Raises:
        OptionError: The ending is none of these, or there is nothing to draw.
        UnsupportedError: matplotlib is not installed.
        OutputError: It exists, or cannot be written.
    """
    place = Path(path)
    check_plot(place, force=force, inputs=())
    charts = charts_of(report) if is_drawn(report) else ()
    if not charts:
        raise OptionError("--plot", "there is nothing to draw of it")
    title = title_of(report)
    _save(_drawn(title, charts), title, place, force=force)


@dataclass(frozen=True, slots=True)
class _Size:
    """How many inches a chart needs: those of its axes, and those around them.

    Attributes:
        width: Of the axes.
        height: Of the axes.
        left: For the names of rows, and what the axis is.
        right: For the bar of colours, or for the legend.
        below: For the names of columns, and what the axis is.
    """

    width: float
    height: float
    left: float
    right: float
    below: float

    @property
    def whole(self) -> tuple[float, float]:
        """Width and height of all of it."""
        return self.left + self.width + self.right, self.below + self.height + ABOVE


def _drawn(title: str, charts: Sequence[Chart]) -> Figure:
    """Return a figure with the charts in rows of two, each as large as it needs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(2, len(charts))
    sizes = [_size(chart) for chart in charts]
    lines = [sizes[place : place + across] for place in range(0, len(sizes), across)]
    widths = [max(size.whole[0] for size in sizes[place::across]) for place in range(across)]
    heights = [max(size.whole[1] for size in line) for line in lines]
    width, height = max(sum(widths), NARROWEST_PAGE), sum(heights) + ABOVE
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(_text(title), y=1 - 0.12 / height, va="top")
    for place, (chart, size) in enumerate(zip(charts, sizes, strict=True)):
        row, column = divmod(place, across)
        x = sum(widths[:column]) + size.left
        y = height - ABOVE - sum(heights[:row]) - ABOVE - size.height
        box = (x / width, y / height, size.width / width, size.height / height)
        axes = figure.add_axes(box)
        if isinstance(chart, Heat):
            bar = (box[0] + box[2] + 0.15 / width, box[1], 0.17 / width, box[3])
            _draw_heat(figure, axes, bar, chart)
        else:
            _draw_curves(axes, chart)
    return figure


def _size(chart: Chart) -> _Size:
    if isinstance(chart, Curves):
        longest = max((len(_text(c.name, LONGEST_LABEL)) for c in chart.curves), default=0)
        height = max(3.6, 0.17 * len(chart.curves) + 0.2)
        return _Size(5.4, height, 0.9, 0.9 + LABEL * longest, 0.6)
    cell = 0.46 if chart.is_numbered else CELL
    longest = max((len(_text(name, LONGEST_LABEL)) for name in chart.rows), default=0)
    below = max((len(_text(name, LONGEST_LABEL)) for name in chart.columns), default=0)
    most = WIDEST if not chart.is_numbered else 2 * WIDEST
    return _Size(
        min(most, max(NARROWEST, cell * len(chart.columns))),
        min(most, max(1.2, cell * len(chart.rows))),
        0.25 + LABEL * longest + (0.3 if chart.y else 0.0),
        1.1,
        0.3 + (LABEL * below * 0.75 if below > TURNED else 0.1) + (0.25 if chart.x else 0.0),
    )


def _draw_heat(
    figure: Figure, axes: Axes, bar: tuple[float, float, float, float], chart: Heat
) -> None:
    axes.set_title(_text(chart.title, LONGEST_TITLE), fontsize=10, loc="left")
    axes.set_xlabel(_text(chart.x))
    axes.set_ylabel(_text(chart.y))
    if not chart.rows or not chart.columns:
        axes.text(0.5, 0.5, "nothing to show", ha="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    low, high = chart.limits
    table = [[math.nan if value is None else value for value in row] for row in chart.values]
    colours = "RdBu_r" if chart.is_diverging else "viridis"
    image = axes.imshow(table, aspect="auto", vmin=low, vmax=high, cmap=colours)
    figure.colorbar(image, cax=figure.add_axes(bar))
    size = _size(chart)
    for names, set_ticks, room in (
        (chart.rows, axes.set_yticks, size.height),
        (chart.columns, axes.set_xticks, size.width),
    ):
        is_below = names is chart.columns
        longest = max(map(len, names))
        is_turned = is_below and longest > TURNED
        needed = 0.16 if not is_below or is_turned else LABEL * (longest + 1.5)
        step = max(1, math.ceil(needed * len(names) / room))
        places = range(0, len(names), step)
        labels = [_text(names[place], LONGEST_LABEL) for place in places]
        turned: dict[str, Any] = {}
        if is_turned:
            turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        set_ticks(list(places), labels, fontsize=7, **turned)
    if chart.is_numbered:
        for i, row in enumerate(chart.values):
            for j, value in enumerate(row):
                if value is not None:
                    shade = "white" if abs(value) > DARK else "black"
                    words = f"{value:z.2f}"
                    axes.text(j, i, words, ha="center", va="center", fontsize=7, color=shade)


def _draw_curves(axes: Axes, chart: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(_text(chart.title, LONGEST_TITLE), fontsize=10, loc="left")
    axes.set_xlabel(_text(chart.x))
    axes.set_ylabel(_text(chart.y))
    if not chart.curves:
        axes.text(0.5, 0.5, "every delta is zero", ha="center", transform=axes.transAxes)
        return
    alpha = BANDS / (len(chart.curves) + 1)
    for place, curve in enumerate(chart.curves):
        indices = range(1, len(curve.mean) + 1)
        style = ("-", "--")[place // 10 % 2]
        mark = "o" if len(curve.mean) == 1 else None
        name = _text(curve.name, LONGEST_LABEL)
        (line,) = axes.plot(indices, curve.mean, style, marker=mark, label=name)
        axes.fill_between(
            indices, curve.low, curve.high, alpha=alpha, linewidth=0, color=line.get_color()
        )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _text(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a name as matplotlib should show it: no control characters, no formulas."""
    shown = printable(name)
    shown = f"…{shown[-longest:]}" if len(shown) > longest else shown
    return shown.replace("$", r"\$")


def _save(figure: Figure, title: str, path: Path, *, force: bool) -> None:
    import matplotlib

    kind = path.suffix.lower()
    buffer = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}, "format": "svg"}
    if kind == ".png":
        options = {"dpi": 150, "format": "png"}
    elif kind == ".pdf":
        options = {"metadata": {"CreationDate": None}, "format": "pdf"}
    with matplotlib.rc_context({"svg.hashsalt": "loratool", "svg.fonttype": "none"}):
        figure.savefig(buffer, **options)
    content = buffer.getvalue()
    if kind == ".html":
        drawing = content.decode()
        page = (
            "<!doctype html>\n<meta charset='utf-8'>\n"
            f"<title>{html.escape(printable(title))}</title>\n"
            f"{drawing[drawing.index('<svg') :]}"
        )
        content = page.encode()
    with staged(path, folder=False, force=force, sync=False) as place:
        place.write_bytes(content)
