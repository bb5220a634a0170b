"""What people see of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from loratool.display.document import Column, Document, Group, Lines, Row, Table
from loratool.display.figures import span
from loratool.display.folding import listed
from loratool.names.sections import module_groups

if TYPE_CHECKING:
    from loratool.verbs.comparison.layers import LayerComparison
    from loratool.verbs.comparison.result import Comparison, ModuleComparison

__all__ = ["comparison_document", "layers_document"]

WIDEST: Final = 14
"""Adapters whose cosines are a table; those of more are for a picture, or a file."""


def comparison_document(found: Comparison, *, unfolded: bool = False) -> Document:
    """Return the modules of two adapters, or the cosines of more.

    Args:
        found: The comparison.
        unfolded: Whether every module has a row of its own.
    """
    blocks = _pair(found, unfolded) if found.is_pair else _many(found)
    unread = (
        f"not compared: {why if why.startswith(path) else f'{path}: {why}'}"
        for path, why in found.unread
    )
    return Document.of(blocks, (*found.notes, *_alone(found), *unread))


def _pair(found: Comparison, unfolded: bool) -> tuple[Table, Lines]:
    by_chance = any(module.baseline is not None for module in found.modules)
    columns = (
        Column("modules", folds=True, is_kept=True),
        *(() if unfolded else (Column("count", is_kept=True),)),
        Column("cosine", is_kept=True),
        Column("relative distance", is_kept=True),
        Column("subspaces", is_kept=True),
        *((Column("by chance", is_kept=True),) if by_chance else ()),
        Column("‖first‖"),
        Column("‖second‖"),
    )

    def row(folded: tuple[str, ...], members: Sequence[ModuleComparison]) -> Row:
        similar = [m.subspace_similarity for m in members]
        return (
            folded,
            *(() if unfolded else (len(members),)),
            span((m.cosine for m in members if m.cosine is not None), ".4f"),
            span(m.relative_distance for m in members if m.relative_distance is not None),
            span((value for value in similar if value is not None), ".3f"),
            *((_chance(members),) if by_chance else ()),
            span(m.norms[0] for m in members),
            span(m.norms[1] for m in members),
        )

    names = [module.module for module in found.modules]
    table = Table.grouped("", columns, module_groups(found.modules, names, row, unfolded=unfolded))
    words = (
        f"cosine {_number(found.cosine, '.6f')}, relative distance "
        f"{_number(found.relative_distance, '.4g')}, norms "
        f"{found.norms[0]:.4g} and {found.norms[1]:.4g}"
    )
    return table, Lines((words,))


def _many(found: Comparison) -> Iterator[Table | Lines]:
    """Yield the adapters, the like side by side, with their nearest, and what is alike in all."""
    numbers = {place: str(number) for number, place in enumerate(found.order, 1)}
    rows: list[tuple[str, ...]] = []
    for place in found.order:
        others = [
            (value, other)
            for other, value in enumerate(found.cosines[place])
            if other != place and value is not None
        ]
        near, other = max(others, key=lambda item: item[0], default=(None, place))
        rows.append(
            (
                numbers[place],
                found.adapters[place],
                str(found.shared[place][place]),
                f"{found.norms[place]:.4g}",
                numbers[other] if near is not None else "-",
                _number(near, ".4f"),
            )
        )
    yield Table.of(
        "adapters, the like side by side",
        (
            Column("", is_kept=True),
            Column("adapter", folds=True, is_kept=True),
            "modules",
            "‖delta‖",
            Column("nearest", is_kept=True),
            Column("cosine", is_kept=True),
        ),
        rows,
    )
    if len(found.order) > WIDEST:
        yield Lines(("the cosines of each two: --csv, --json, --plot, --report",))
        return
    yield Table.of(
        "cosines",
        (
            Column("", is_kept=True),
            *(Column(numbers[place], is_kept=True) for place in found.order),
        ),
        [
            (numbers[place], *(_short(found.cosines[place][other]) for other in found.order))
            for place in found.order
        ],
    )


def layers_document(found: LayerComparison) -> Document:
    """Return how alike the layers of one adapter are, for each kind of module."""
    groups = [
        Group(
            name,
            tuple(
                (
                    kind.kind,
                    len(kind.modules),
                    span(kind.directions, "d"),
                    *(f"{of[side]:.4f}" for of in (kind.mean, kind.neighbours, kind.expected)),
                )
                for kind in found.kinds
            ),
        )
        for side, name in enumerate(("left subspaces, those of B", "right subspaces, those of A"))
    ]
    table = Table.grouped(
        "φ between layers",
        (
            Column("kind", folds=True, is_kept=True),
            Column("layers", is_kept=True),
            "directions",
            *(Column(what, is_kept=True) for what in ("mean", "next", "by chance")),
        ),
        groups,
    )
    alone = f"not compared, for no other layer has their kind and shape: {listed(found.alone)}"
    return Document.of((table,), (*found.notes, *([alone] if found.alone else [])))


def _short(value: float | None) -> str:
    """Return a cosine in few characters: ``.87``, ``-.02``, ``1``."""
    if value is None:
        return "-"
    text = f"{value:z.2f}"
    return "1" if text == "1.00" else text.replace("0.", ".")


def _alone(found: Comparison) -> Iterator[str]:
    if not found.is_pair:  # the table says how many modules each has
        return
    for path, names in zip(found.adapters, found.only_in, strict=True):
        if names:
            yield f"not in all: {len(names)} modules of {path}: {listed(names)}"


def _chance(members: Sequence[ModuleComparison]) -> str:
    known = [m.baseline.expected_similarity for m in members if m.baseline is not None]
    return span(known, ".3f")


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
