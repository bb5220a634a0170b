"""What pictures show, as plain data: heat maps and curves of what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Final, TypeGuard

from loratool.files.places import called
from loratool.names.kinds import Position, positions_of
from loratool.verbs.algebra.result import AdapterReport
from loratool.verbs.comparison.layers import LayerComparison
from loratool.verbs.comparison.result import Comparison, Matrix, ModuleComparison
from loratool.verbs.extraction.result import ExtractReport
from loratool.verbs.inspect import AdapterInfo, ModelInfo
from loratool.verbs.many import Many

__all__ = [
    "Chart",
    "Curve",
    "Curves",
    "Heat",
    "Report",
    "charts_of",
    "charts_of_many",
    "is_drawn",
    "title_of",
]

Report = AdapterInfo | Comparison | LayerComparison | ExtractReport | AdapterReport
MOST_CURVES: Final = 12
MOST_ROWS: Final = 64
MOST_CELLS: Final = 40_000
"""Of all pictures of layers together."""
NOISE: Final = 1e-12
"""Singular values smaller than this, relative to the largest, are zeros that are not exact."""
NUMBERED: Final = 24
"""Adapters whose cosines are written into their cells."""


@dataclass(frozen=True, slots=True)
class Heat:
    """A table of numbers as colours.

    Attributes:
        title: What the numbers are.
        rows: Names of the rows.
        columns: Names of the columns.
        values: A row of numbers for each of ``rows``; ``None`` where there is none.
        x: What the columns are.
        y: What the rows are; empty where their names say it.
        low: The number of the lowest colour; by default the smallest there is.
        high: That of the highest.
        is_diverging: Whether zero is in the middle, and both signs have colours.
        is_numbered: Whether the numbers are written into the cells.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    x: str = ""
    y: str = ""
    low: float | None = None
    high: float | None = None
    is_diverging: bool = False
    is_numbered: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        """The numbers of the lowest and the highest colour."""
        known = [value for row in self.values for value in row if value is not None]
        low = min(known, default=0.0) if self.low is None else self.low
        high = max(known, default=1.0) if self.high is None else self.high
        return (low, high) if high > low else (low - 0.5, low + 0.5)


@dataclass(frozen=True, slots=True)
class Curve:
    """Numbers over 1, 2, 3 …, with how far they range.

    Attributes:
        name: What they are of.
        mean: The numbers.
        low: The smallest that each is the mean of.
        high: The largest.
    """

    name: str
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves over one axis, the other logarithmic.

    Attributes:
        title: What the numbers are.
        curves: At least one where there is anything to see.
        x: What the first axis is.
        y: What the second is.
    """

    title: str
    curves: tuple[Curve, ...]
    x: str
    y: str


Chart = Heat | Curves


def is_drawn(report: object) -> TypeGuard[Report]:
    """Whether there are charts of a report."""
    return isinstance(report, Report)


def title_of(report: object) -> str:
    """Return what a picture or a page of a report is about."""
    if isinstance(report, AdapterInfo):
        return called(report.adapter.path)
    if isinstance(report, ModelInfo):
        return called(report.model.path)
    if isinstance(report, LayerComparison):
        return f"layers of {_name(report.adapter)}"
    if isinstance(report, Comparison):
        if report.is_pair:
            return " and ".join(_unlike(report.adapters))
        return f"{len(report.adapters)} adapters"
    if isinstance(report, Many):
        return ", ".join(Path(path).resolve().name for path in report.paths)
    output = getattr(report, "output", None)
    return _name(str(output)) if output is not None else type(report).__name__


def charts_of(report: Report) -> tuple[Chart, ...]:
    """Return the charts of a report, the most telling first."""
    if isinstance(report, AdapterInfo):
        return _of_adapter(report) if report.spectra else ()
    if isinstance(report, LayerComparison):
        return _of_layers(report)
    if isinstance(report, Comparison):
        return _of_pair(report) if report.is_pair else (_of_many(report),)
    return _of_written(report)


def _of_adapter(info: AdapterInfo) -> tuple[Chart, ...]:
    names = [spectrum.module for spectrum in info.spectra]
    positions = positions_of(names, info.adapter.components, info.adapter.family)
    groups: dict[str, list[Sequence[float]]] = {}
    for position, spectrum in zip(positions, info.spectra, strict=True):
        groups.setdefault(_kind(position), []).append(spectrum.singular_values)
    by_size = sorted(groups, key=lambda name: -_energy(groups[name]))[:MOST_CURVES]
    curves = [_band(name, groups[name]) for name in groups if name in by_size]
    what = "singular values of each kind of module: mean and range"
    if len(groups) > MOST_CURVES:
        what = (
            f"singular values, the {MOST_CURVES} strongest of {len(groups)} kinds: mean and range"
        )
    return (
        Curves(
            what,
            tuple(curve for curve in curves if curve.mean),
            "index of the singular value",
            "singular value of the delta",
        ),
        _by_layer(
            "Frobenius norm of the delta",
            positions,
            [spectrum.frobenius_norm for spectrum in info.spectra],
            low=0.0,
        ),
        _by_layer(
            "effective rank of the delta",
            positions,
            [spectrum.effective_rank for spectrum in info.spectra],
            low=0.0,
        ),
        _by_layer(
            "rank that holds 99 % of ‖delta‖²",
            positions,
            [float(spectrum.energy_ranks["rank_99"]) for spectrum in info.spectra],
            low=0.0,
        ),
    )


def charts_of_many(items: Mapping[str, AdapterInfo]) -> tuple[Chart, ...]:
    """Return the charts of many adapters whose spectra were read, by their names."""
    spectra = {
        name: [spectrum.singular_values for spectrum in info.spectra]
        for name, info in items.items()
        if info.spectra
    }
    if not spectra:
        return ()
    strongest = sorted(spectra, key=lambda name: -_energy(spectra[name]))[:MOST_CURVES]
    what = "singular values of each adapter: mean and range over its modules"
    if len(spectra) > MOST_CURVES:
        what = f"singular values, the {MOST_CURVES} strongest of {len(spectra)} adapters"
    bands = (_band(name, spectra[name]) for name in spectra if name in strongest)
    rows = [*spectra][:MOST_ROWS]
    norms = {name: _norms(items[name]) for name in rows}
    kinds = [*dict.fromkeys(kind for row in norms.values() for kind in row)][:MOST_ROWS]
    title = "Frobenius norm of each kind of module"
    if len(spectra) > MOST_ROWS:
        title += f", the first {MOST_ROWS} adapters"
    return (
        Curves(
            what,
            tuple(curve for curve in bands if curve.mean),
            "index of the singular value",
            "singular value of the delta",
        ),
        Heat(
            title,
            tuple(rows),
            tuple(kinds),
            tuple(tuple(norms[name].get(kind) for kind in kinds) for name in rows),
            low=0.0,
        ),
    )


def _norms(info: AdapterInfo) -> dict[str, float]:
    """Return the norm of what an adapter adds to each kind of module."""
    names = [spectrum.module for spectrum in info.spectra]
    positions = positions_of(names, info.adapter.components, info.adapter.family)
    squares: dict[str, float] = {}
    for position, spectrum in zip(positions, info.spectra, strict=True):
        kind = _kind(position)
        squares[kind] = squares.get(kind, 0.0) + spectrum.frobenius_norm**2
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def _of_pair(found: Comparison) -> tuple[Chart, ...]:
    first, second = _unlike(found.adapters)
    charts: list[Chart] = []
    sides: tuple[tuple[str, Callable[[ModuleComparison], Matrix]], ...] = (
        ("left singular vectors (B)", lambda module: module.phi_left),
        ("right singular vectors (A)", lambda module: module.phi_right),
    )
    for side, grid in sides:
        charts.append(
            _grid(f"φ(i, j), {side}, mean over modules", map(grid, found.modules), first, second)
        )
    known = [module.baseline for module in found.modules if module.baseline is not None]
    if known:
        for side, grids in (
            ("left", [baseline.random_left for baseline in known]),
            ("right", [baseline.random_right for baseline in known]),
        ):
            charts.append(_grid(f"φ(i, j), {side}, by chance", grids, first, "random matrices"))
    positions = positions_of([module.module for module in found.modules])
    charts += [
        _by_layer("cosine", positions, [m.cosine for m in found.modules], -1.0, 1.0),
        _by_layer(
            f"distance, relative to ‖{first}‖",
            positions,
            [m.relative_distance for m in found.modules],
            low=0.0,
        ),
        _by_layer(
            "φ of the whole subspaces",
            positions,
            [m.subspace_similarity for m in found.modules],
            low=0.0,
            high=1.0,
        ),
    ]
    return tuple(charts)


def _of_many(found: Comparison) -> Heat:
    names = _unlike([found.adapters[place] for place in found.order])
    return Heat(
        "cosines of the whole deltas, the like side by side",
        names,
        names,
        tuple(tuple(found.cosines[i][j] for j in found.order) for i in found.order),
        low=-1.0,
        high=1.0,
        is_diverging=True,
        is_numbered=len(names) <= NUMBERED,
    )


def _of_layers(found: LayerComparison) -> tuple[Chart, ...]:
    charts: list[Chart] = []
    room = MOST_CELLS
    for kind in found.kinds:
        cells = 2 * len(kind.layers) ** 2
        if charts and cells > room:  # the table has all of them
            continue
        room -= cells
        for side, table, expected in zip(
            ("left (B)", "right (A)"), (kind.left, kind.right), kind.expected, strict=True
        ):
            charts.append(
                Heat(
                    f"{kind.kind}, {side}; by chance {expected:.3g}",
                    kind.layers,
                    kind.layers,
                    table,
                    "layer",
                    "layer",
                    0.0,
                    1.0,
                )
            )
    return tuple(charts)


def _of_written(report: ExtractReport | AdapterReport) -> tuple[Chart, ...]:
    positions = positions_of([module.module for module in report.modules])
    charts = [
        _by_layer("rank", positions, [float(m.rank) for m in report.modules], low=0.0),
        _by_layer(
            "Frobenius norm of the exact delta",
            positions,
            [math.sqrt(m.squared_norm) for m in report.modules],
            low=0.0,
        ),
    ]
    if report.is_written:
        errors = [m.relative_error for m in report.modules]
        charts.insert(0, _by_layer("relative error", positions, errors, low=0.0))
    return tuple(charts)


def _by_layer(
    title: str,
    positions: Sequence[Position],
    values: Sequence[float | None],
    low: float | None = None,
    high: float | None = None,
) -> Heat:
    """Return a number for each module: kinds are rows, layers are columns.

    A cell that several modules share, such as experts, shows their mean. Layers with several
    numbers stand in their order, within their section. Modules outside of layers stand last.
    """
    by_section: dict[str, set[tuple[int, ...]]] = {}
    for position in positions:
        by_section.setdefault(position.section, set()).add(position.numbers)
    layers = {section: _deepest(numbers) for section, numbers in by_section.items()}
    is_flat = all(len(numbers) < 2 for numbers in chain(*layers.values()))
    if is_flat:
        found = _deepest(set().union(*by_section.values()))
        layers = dict.fromkeys(layers, found)
        columns = [str(numbers[0]) if numbers else "-" for numbers in found]
    else:
        most = max(map(len, layers.values()))
        columns = [str(number) for number in range(1, most + 1)]
    cells: dict[tuple[str, int], list[float]] = {}
    for position, value in zip(positions, values, strict=True):
        if value is not None:
            held = layers[position.section]
            column = next(i for i, n in enumerate(held) if _is_in(position.numbers, n))
            cells.setdefault((position.row, column), []).append(value)
    order = _in_order(positions)
    rows = order[:MOST_ROWS]
    table = [
        tuple(
            fmean(there) if (there := cells.get((row, column))) else None
            for column in range(len(columns))
        )
        for row in rows
    ]
    if len(order) > MOST_ROWS:
        title += f", the first {MOST_ROWS} rows"
    return Heat(
        title,
        tuple(rows),
        tuple(columns),
        tuple(table),
        "layer" if is_flat else "layer of each section, in order",
        low=low,
        high=high,
        is_diverging=low is not None and low < 0,
    )


def _deepest(layers: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the layers that hold no others, in order; what is outside of layers is last."""
    ordered = sorted(layers)
    kept = [
        numbers
        for numbers, following in zip_longest(ordered, ordered[1:], fillvalue=())
        if not numbers or following[: len(numbers)] != numbers
    ]
    return sorted(kept, key=lambda numbers: (not numbers, numbers))


def _is_in(layer: tuple[int, ...], deepest: tuple[int, ...]) -> bool:
    """Whether a layer is, or holds, another one."""
    return layer == deepest if not layer else deepest[: len(layer)] == layer


def _in_order(positions: Sequence[Position]) -> list[str]:
    """Return rows with those of one section together, what is outside of layers last in each."""
    sections = {name: i for i, name in enumerate(dict.fromkeys(p.section for p in positions))}
    ranked = sorted(positions, key=lambda p: (sections[p.section], not p.numbers))
    return list(dict.fromkeys(position.row for position in ranked))


def _kind(position: Position) -> str:
    """Return the kind of a module, with the component that it is in."""
    return " ".join(filter(None, (position.component, position.kind)))


def _energy(spectra: Sequence[Sequence[float]]) -> float:
    return math.fsum(value * value for values in spectra for value in values)


def _band(name: str, spectra: Sequence[Sequence[float]]) -> Curve:
    told = ([value for value in values if value > NOISE * values[0]] for values in spectra)
    columns = [[value for value in column if value is not None] for column in zip_longest(*told)]
    known = [column for column in columns if column]
    return Curve(
        name,
        tuple(map(fmean, known)),
        tuple(map(min, known)),
        tuple(map(max, known)),
    )


def _grid(title: str, matrices: Iterable[Matrix], first: str, second: str) -> Heat:
    """Return the mean of matrices, each element over those that are large enough."""
    sized = [matrix for matrix in matrices if matrix]
    rows = max((len(matrix) for matrix in sized), default=0)
    columns = max((len(matrix[0]) for matrix in sized), default=0)
    return Heat(
        title,
        tuple(str(i + 1) for i in range(rows)),
        tuple(str(j + 1) for j in range(columns)),
        tuple(
            tuple(
                fmean(known)
                if (known := [m[i][j] for m in sized if len(m) > i and len(m[0]) > j])
                else None
                for j in range(columns)
            )
            for i in range(rows)
        ),
        f"j, of {second}",
        f"i, of {first}",
        0.0,
        1.0,
    )


def _unlike(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the ends of paths, as long as it takes to tell them apart."""
    names: Mapping[str, str] = {path: _name(path) for path in paths}
    for depth in range(2, 6):
        if len(set(names.values())) == len(set(paths)):
            break
        names = {path: "/".join(Path(path).parts[-depth:]) for path in paths}
    return tuple(names[path] for path in paths)


def _name(path: str) -> str:
    return Path(path).name or path
