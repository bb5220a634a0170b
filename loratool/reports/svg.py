"""Charts as SVG that stands in a page: no library, no names of elements, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from loratool.errors import printable
from loratool.reports.charts import Chart, Curves, Heat

__all__ = ["drawing"]

SEQUENTIAL: Final = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58",
    "#b5de2b", "#fde725",
)  # fmt: skip
"""Dark to light, and even in lightness, for those who see no colours too."""
DIVERGING: Final = (
    "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d",
    "#b2182b",
)  # fmt: skip
LINES: Final = (
    "#3b7dd8", "#e07b28", "#2f9e5b", "#d0454c", "#8e63c7", "#98684f", "#d765b5", "#7f868e",
    "#a9a52b", "#25a8bd",
)  # fmt: skip
CHARACTER: Final = 6.4
"""Pixels of a character of 11 pixels' size."""
LONGEST: Final = 38
WIDTH: Final = 620
"""Pixels that the columns of a heat map, or the curves, take at most."""
TALLEST: Final = 22
NARROWEST: Final = 5
HEIGHT: Final = 300
BAR: Final = 90
"""Pixels of the bar of colours with its numbers."""
TOLD: Final = 1600
"""Cells up to which each tells its number to a pointer."""
SHADES: Final = 48
"""Colours of the cells of larger charts."""
BANDS: Final = 0.5
"""How dark all bands are together."""
NUMBERED: Final = 34
"""Pixels of a cell with a number in it."""
BRIGHT: Final = 0.6
"""How far towards its highest colour a cell is dark on the scale of two signs, or bright."""


def drawing(chart: Chart, *, is_told: bool = True) -> str:
    """Return a chart as one ``svg`` element; its title is not in it.

    Args:
        chart: What to draw.
        is_told: Whether each cell of a heat map tells a pointer its number, if they are not many.
    """
    if isinstance(chart, Heat):
        return _heat(chart, is_told=is_told)
    return _curves(chart)


def _heat(chart: Heat, *, is_told: bool) -> str:
    if not any(value is not None for row in chart.values for value in row):
        return "<p>nothing to show</p>"
    rows, columns = len(chart.rows), len(chart.columns)
    across = NUMBERED if chart.is_numbered else max(NARROWEST, min(TALLEST, WIDTH / columns))
    down = TALLEST if chart.is_numbered else max(NARROWEST, min(16.0, 900 / rows))
    names = [_short(name) for name in chart.rows]
    heads = [_short(name) for name in chart.columns]
    left = 12 + CHARACTER * max(map(len, names)) + (18 if chart.y else 0)
    longest = max(map(len, heads))
    is_turned = longest > 4
    below = 14 + (CHARACTER * longest * 0.75 if is_turned else 6) + (18 if chart.x else 0)
    body_width, body_height = across * columns, down * rows
    width, height = left + body_width + BAR, max(body_height + below, 130) + 8
    parts = [f'<rect class="ground" {_box(left, 4, body_width, body_height)}/>']
    parts += (_told if is_told and rows * columns <= TOLD else _packed)(chart, left, across, down)
    step = math.ceil(12 / down)
    parts += [
        _text(left - 5, 4 + down * (i + 0.5) + 4, names[i], "e") for i in range(0, rows, step)
    ]
    step = max(1, math.ceil((13 if is_turned else CHARACTER * (longest + 1)) / across))
    for j in range(0, columns, step):
        x, y = left + across * (j + 0.5), body_height + 18
        turn = f' transform="rotate(-45 {x:.0f} {y:.0f})"' if is_turned else ""
        parts.append(_text(x, y, heads[j], "e" if is_turned else "m", turn=turn))
    parts += _axes(chart.x, chart.y, left, body_width, body_height, body_height + below + 2)
    palette = DIVERGING if chart.is_diverging else SEQUENTIAL
    parts += _bar(left + body_width + 14, palette, *chart.limits, max(body_height, 100))
    return _svg(width, height, parts, chart.title)


def _told(chart: Heat, left: float, across: float, down: float) -> Iterator[str]:
    """Yield every cell as an element of its own, which tells a pointer what it is."""
    for i, j, value, share in _cells(chart):
        x, y = left + across * j, 4 + down * i
        told = f"{printable(chart.rows[i])}, {printable(chart.columns[j])}: {value:.4g}"
        fill = _colour(DIVERGING if chart.is_diverging else SEQUENTIAL, share)
        title = f"<title>{escape(told[-200:])}</title>"
        yield f'<rect {_box(x, y, across, down)} fill="{fill}">{title}</rect>'
        if chart.is_numbered:
            shade = "#fff" if abs(2 * share - 1) > BRIGHT else "#111"
            yield _text(x + across / 2, y + down / 2 + 4, f"{value:z.2f}", "m", shade)


def _packed(chart: Heat, left: float, across: float, down: float) -> Iterator[str]:
    """Yield all cells of one colour as one element, neighbours in one stroke."""
    strokes: dict[int, list[list[int]]] = {}
    for i, j, _, share in _cells(chart):
        there = strokes.setdefault(round(share * SHADES), [])
        if there and there[-1][0] == i and there[-1][1] + there[-1][2] == j:
            there[-1][2] += 1
        else:
            there.append([i, j, 1])
    palette = DIVERGING if chart.is_diverging else SEQUENTIAL
    for shade, runs in sorted(strokes.items()):
        moves = (
            f"M{left + across * j:.1f} {4 + down * (i + 0.5):.1f}h{across * count + 0.3:.1f}"
            for i, j, count in runs
        )
        colour = _colour(palette, shade / SHADES)
        stroke = f'stroke="{colour}" stroke-width="{down + 0.4:.1f}"'
        yield f'<path class="cells" {stroke} d="{"".join(moves)}"/>'


def _cells(chart: Heat) -> Iterator[tuple[int, int, float, float]]:
    """Yield row, column, number and how far up the colours it is, of every cell with a number."""
    low, high = chart.limits
    for i, row in enumerate(chart.values):
        for j, value in enumerate(row):
            if value is not None:
                yield i, j, value, (value - low) / (high - low)


def _bar(x: float, palette: Sequence[str], low: float, high: float, room: float) -> Iterator[str]:
    """Yield the bar of colours beside a heat map, with the numbers of some of them."""
    height, steps = min(room, 160.0), 32
    for step in range(steps):
        y = 4 + height * (1 - (step + 1) / steps)
        colour = _colour(palette, (step + 0.5) / steps)
        yield f'<rect {_box(x, y, 12, height / steps + 0.5)} fill="{colour}"/>'
    for share in (0.0, 0.5, 1.0):
        yield _text(
            x + 17, 12 + (height - 8) * (1 - share), f"{low + share * (high - low):.3g}", ""
        )


def _curves(chart: Curves) -> str:
    if not chart.curves:
        return "<p>every delta is zero</p>"
    longest = max(len(curve.mean) for curve in chart.curves)
    low = min(min(curve.low) for curve in chart.curves)
    high = max(max(curve.high) for curve in chart.curves)
    bottom, top = math.log10(low), math.log10(high)
    if top - bottom < 0.1:
        bottom, top = bottom - 0.05, top + 0.05
    left, body_width = 76.0, float(WIDTH) - 60

    def x(index: int) -> float:
        return left + body_width * (index / max(1, longest - 1) if longest > 1 else 0.5)

    def y(value: float) -> float:
        return 8 + HEIGHT * (top - math.log10(value)) / (top - bottom)

    parts = [f'<rect class="ground" {_box(left, 8, body_width, HEIGHT)}/>']
    parts += [
        f'<path class="grid" d="M{left:.0f} {y(tick):.1f}h{body_width:.0f}"/>'
        + _text(left - 6, y(tick) + 4, f"{tick:.3g}", "e")
        for tick in _ticks(bottom, top)
    ]
    step = max(1, math.ceil(longest / 12))
    parts += [
        _text(x(index), HEIGHT + 24, str(index + 1), "m") for index in range(0, longest, step)
    ]
    legend = left + body_width + 16
    opacity = BANDS / (len(chart.curves) + 1)
    for number, curve in enumerate(chart.curves):
        colour = LINES[number % len(LINES)]
        dash = ' stroke-dasharray="6 3"' if number >= len(LINES) else ""
        places = range(len(curve.mean))
        upper = [f"{x(i):.1f} {y(curve.high[i]):.1f}" for i in places]
        lower = [f"{x(i):.1f} {y(curve.low[i]):.1f}" for i in reversed(places)]
        line = [f"{x(i):.1f} {y(curve.mean[i]):.1f}" for i in places]
        parts.append(
            f'<path fill="{colour}" opacity="{opacity:.2f}" d="M{"L".join(upper + lower)}z"/>'
        )
        parts.append(
            f'<path fill="none" stroke="{colour}" stroke-width="1.8"{dash} d="M{"L".join(line)}"/>'
        )
        if len(line) == 1:
            parts.append(
                f'<circle cx="{x(0):.1f}" cy="{y(curve.mean[0]):.1f}" r="3.5" fill="{colour}"/>'
            )
        row = 18 + 17 * number
        parts.append(
            f'<path stroke="{colour}" stroke-width="3"{dash} d="M{legend:.0f} {row - 4}h22"/>'
            + _text(legend + 28, row, _short(curve.name), "")
        )
    parts += _axes(chart.x, chart.y, left, body_width, HEIGHT, HEIGHT + 42)
    names = max(len(_short(curve.name)) for curve in chart.curves)
    width = legend + 36 + CHARACTER * names
    height = max(HEIGHT + 50.0, 26.0 + 17 * len(chart.curves))
    return _svg(width, height, parts, chart.title)


def _ticks(bottom: float, top: float) -> list[float]:
    """Return numbers between two powers of ten: powers, and two or five times such where few."""
    digits = (1,) if top - bottom > 2.5 else (1, 2, 5) if top - bottom > 0.7 else range(1, 10)
    step = max(1, math.ceil((top - bottom) / 8))
    found = [
        digit * 10.0**power
        for power in range(math.floor(bottom), math.ceil(top) + 1, step)
        for digit in digits
    ]
    return [tick for tick in found if bottom <= math.log10(tick) <= top]


def _axes(x: str, y: str, left: float, width: float, height: float, at: float) -> Iterator[str]:
    """Yield what the axes are."""
    if x:
        yield _text(left + width / 2, at, _short(x, 70), "m")
    if y:
        middle = 4 + height / 2
        turn = f' transform="rotate(-90 12 {middle:.0f})"'
        yield _text(12, middle, _short(y, 50), "m", turn=turn)


def _colour(palette: Sequence[str], share: float) -> str:
    """Return a colour between those of a palette."""
    place = max(0.0, min(1.0, share)) * (len(palette) - 1)
    index = min(int(place), len(palette) - 2)
    one, other = (
        [int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in palette[index : index + 2]
    )
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(one, other, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'


def _text(x: float, y: float, words: str, side: str, shade: str = "", turn: str = "") -> str:
    """Return a text; ``side`` is ``m`` where it is in the middle of ``x``, ``e`` before it."""
    name = f' class="{side}"' if side else ""
    fill = f' style="fill:{shade}"' if shade else ""
    return f'<text{name}{fill} x="{x:.1f}" y="{y:.1f}"{turn}>{escape(words)}</text>'


def _short(name: str, longest: int = LONGEST) -> str:
    shown = printable(name[-4 * longest :] if len(name) > 4 * longest else name)
    return shown if len(shown) <= longest else f"…{shown[-longest + 1 :]}"


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    label = escape(_short(title, 120))
    return f'<svg {size} role="img" aria-label="{label}">{"".join(parts)}</svg>'
