"""What people see of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loratool.display.document import Column, Document, Lines, Row, Table
from loratool.display.figures import span
from loratool.display.folding import listed
from loratool.names.sections import module_groups

if TYPE_CHECKING:
    from loratool.verbs.compare import Comparison, ModuleComparison

__all__ = ["comparison_document"]


def comparison_document(found: Comparison, *, unfolded: bool = False) -> Document:
    """Return the modules of two adapters, or the cosines of more.

    Args:
        found: The comparison.
        unfolded: Whether every module has a row of its own.
    """
    blocks = _pair(found, unfolded) if len(found.adapters) == 2 else (_matrix(found),)
    return Document.of(blocks, (*found.notes, *_alone(found)))


def _pair(found: Comparison, unfolded: bool) -> tuple[Table, Lines]:
    columns = (
        Column("modules", folds=True, is_kept=True),
        *(() if unfolded else (Column("count", is_kept=True),)),
        Column("cosine", is_kept=True),
        Column("relative distance", is_kept=True),
        Column("subspaces", is_kept=True),
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


def _matrix(found: Comparison) -> Table:
    letters = [str(index + 1) for index in range(len(found.adapters))]
    return Table.of(
        "cosines",
        (
            Column("", is_kept=True),
            Column("adapter", folds=True, is_kept=True),
            *(Column(letter, is_kept=True) for letter in letters),
        ),
        [
            (letter, path, *(_number(value, ".4f") for value in row))
            for letter, path, row in zip(letters, found.adapters, found.cosines, strict=True)
        ],
    )


def _alone(found: Comparison) -> Iterator[str]:
    for path, names in zip(found.adapters, found.only_in, strict=True):
        if names:
            yield f"not in all: {len(names)} modules of {path}: {listed(names)}"


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
