"""Pictures, drawn with matplotlib from the extra ``plot``; imported only when one is asked for."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from loratool.display.grouping import layer_of, pattern_of, row_pattern
from loratool.errors import OptionError, OutputError, UnsupportedError, printable
from loratool.files.atomic import check_output, staged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from loratool.verbs.compare import Comparison
    from loratool.verbs.extraction.result import ExtractReport
    from loratool.verbs.spectrum import Spectrum

__all__ = ["check_plot", "plot_comparison", "plot_extraction", "plot_spectra"]

FORMATS: Final = (".png", ".svg", ".html")
MOST_GROUPS: Final = 12
MOST_TICKS: Final = 40
MOST_ROWS: Final = 60
LONGEST_NAME: Final = 60
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


def plot_spectra(spectra: Sequence[Spectrum], title: str, path: Path, *, force: bool) -> None:
    """Draw the spectra of each group of modules, and norms by layer and projection."""
    figure = _figure(width=13, height=5.5, title=title)
    left, right = figure.subplots(1, 2)
    groups: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        groups.setdefault(pattern_of(spectrum.module), []).append(spectrum)
    for name, members in list(groups.items())[:MOST_GROUPS]:
        _draw_band(left, _text(_short(name)), [member.singular_values for member in members])
    left.set_xlabel("index of the singular value")
    left.set_ylabel("singular value of the delta")
    left.set_title("spectra: mean of each group, and its range")
    if len(groups) > MOST_GROUPS:
        left.set_title(f"spectra of {MOST_GROUPS} of {len(groups)} groups: mean and range")
    if left.lines:
        left.set_yscale("log")
        left.legend(fontsize=7)
    else:
        left.text(0.5, 0.5, "every delta is zero", ha="center", transform=left.transAxes)
    _heat_by_layer(
        figure,
        right,
        {s.module: s.frobenius_norm for s in spectra},
        "Frobenius norm of the delta",
    )
    _save(figure, title, path, force=force)


def plot_comparison(found: Comparison, path: Path, *, force: bool) -> None:
    """Draw φ(i, j) and cosines by layer of two adapters, or the cosines of each two of more."""
    names = [Path(adapter).name or adapter for adapter in found.adapters]
    if len(names) > 2:
        figure = _figure(width=1.2 * len(names) + 4, height=1.0 * len(names) + 3, title="cosines")
        axes = figure.subplots()
        rows = [[float("nan") if v is None else v for v in row] for row in found.cosines]
        _heat(figure, axes, rows, names, names, low=-1.0, high=1.0, colours="RdBu_r", numbers=True)
        _save(figure, "cosines of adapters", path, force=force)
        return
    title = f"{names[0]} and {names[1]}"
    figure = _figure(width=14, height=9, title=title)
    grid = figure.subplots(2, 2)
    for axes, side, matrices in (
        (grid[0][0], "left singular vectors (B)", [m.phi_left for m in found.modules]),
        (grid[0][1], "right singular vectors (A)", [m.phi_right for m in found.modules]),
    ):
        mean = _mean_matrix(matrices)
        labels = [str(i + 1) for i in range(len(mean))]
        axes.set_title(f"φ(i, j), {side}, mean over modules")
        if mean:
            _heat(figure, axes, mean, labels, labels, low=0.0, high=1.0, colours="viridis")
        axes.set_xlabel("j, of the second")
        axes.set_ylabel("i, of the first")
    cosines = {m.module: m.cosine for m in found.modules if m.cosine is not None}
    distances = {
        m.module: m.relative_distance for m in found.modules if m.relative_distance is not None
    }
    _bars_by_layer(grid[1][0], cosines, "cosine, mean of each layer")
    _bars_by_layer(grid[1][1], distances, "relative distance, mean of each layer")
    _save(figure, title, path, force=force)


def plot_extraction(report: ExtractReport, title: str, path: Path, *, force: bool) -> None:
    """Draw the error and the rank of every module over depth."""
    figure = _figure(width=13, height=5.5, title=title)
    left, right = figure.subplots(1, 2)
    _heat_by_layer(
        figure, left, {m.module: m.relative_error for m in report.modules}, "relative error"
    )
    _heat_by_layer(figure, right, {m.module: float(m.rank) for m in report.modules}, "rank")
    _save(figure, title, path, force=force)


def _figure(*, width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_text(title))
    return figure


def _text(name: str) -> str:
    """Return a name as matplotlib should show it: no control characters, no formulas."""
    shown = printable(name)
    shown = f"…{shown[-LONGEST_NAME:]}" if len(shown) > LONGEST_NAME else shown
    return shown.replace("$", r"\$")


def _short(pattern: str) -> str:
    """Return the last components of a pattern, enough to tell projections apart."""
    return ".".join(pattern.split(".")[-3:])


def _draw_band(axes: Axes, label: str, spectra: Sequence[Sequence[float]]) -> None:
    length = max(len(values) for values in spectra)
    columns = [[v[i] for v in spectra if i < len(v) and v[i] > 0] for i in range(length)]
    indices = [i + 1 for i, column in enumerate(columns) if column]
    columns = [column for column in columns if column]
    if not columns:
        return
    (line,) = axes.plot(indices, [fmean(column) for column in columns], label=label)
    axes.fill_between(
        indices,
        [min(column) for column in columns],
        [max(column) for column in columns],
        alpha=0.15,
        color=line.get_color(),
    )


def _heat_by_layer(figure: Figure, axes: Axes, values: dict[str, float], title: str) -> None:
    """Draw one number for each module: projections are rows, layers are columns.

    Rows tell further numbers apart (blocks in blocks, experts) unless that makes too many; a
    cell that several modules share shows their mean. Modules without a number stand last.
    """
    row_of = row_pattern
    if len({row_of(name) for name in values}) > MOST_ROWS:
        row_of = pattern_of
    cells: dict[tuple[str, int | None], list[float]] = {}
    for name, value in values.items():
        cells.setdefault((row_of(name), layer_of(name)), []).append(value)
    rows = list(dict.fromkeys(row for row, _ in cells))
    layers = sorted({layer for _, layer in cells if layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(c[1] is None for c in cells) else [])]
    table = [
        [fmean(cells.get((row, column), [float("nan")])) for column in columns] for row in rows
    ]
    axes.set_title(title)
    axes.set_xlabel("layer")
    labels = ["none" if column is None else str(column) for column in columns]
    _heat(figure, axes, table, [_short(row) for row in rows], labels)


def _heat(
    figure: Figure,
    axes: Axes,
    rows: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    low: float | None = None,
    high: float | None = None,
    colours: str = "viridis",
    numbers: bool = False,
) -> None:
    image = axes.imshow(rows, aspect="auto", vmin=low, vmax=high, cmap=colours)
    figure.colorbar(image, ax=axes)
    for names, set_ticks in ((row_names, axes.set_yticks), (column_names, axes.set_xticks)):
        step = max(1, -(-len(names) // MOST_TICKS))
        places = list(range(0, len(names), step))
        set_ticks(places, [_text(names[place]) for place in places], fontsize=7)
    if numbers:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                shade = "white" if abs(value) > DARK else "black"
                words = f"{value:.2f}"
                axes.text(j, i, words, ha="center", va="center", fontsize=8, color=shade)


def _bars_by_layer(axes: Axes, values: dict[str, float], title: str) -> None:
    layers: dict[int, list[float]] = {}
    for name, value in values.items():
        layer = layer_of(name)
        if layer is not None:
            layers.setdefault(layer, []).append(value)
    ordered = sorted(layers)
    axes.bar(ordered, [fmean(layers[layer]) for layer in ordered])
    axes.locator_params(axis="x", integer=True)
    axes.set_title(title)
    axes.set_xlabel("layer")


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Return the mean of square matrices, each element over those that are large enough."""
    size = max((len(matrix) for matrix in matrices), default=0)
    return [
        [fmean(m[i][j] for m in matrices if len(m) > max(i, j)) for j in range(size)]
        for i in range(size)
    ]


def _save(figure: Figure, title: str, path: Path, *, force: bool) -> None:
    import matplotlib

    kind = path.suffix.lower()
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "loratool", "svg.fonttype": "none"}):
        options: dict[str, Any] = {"dpi": 150} if kind == ".png" else {"metadata": {"Date": None}}
        figure.savefig(buffer, format="png" if kind == ".png" else "svg", **options)
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
