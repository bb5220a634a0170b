"""``schemes``: which key schemes there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratool.display.document import Column, Document, Table
from loratool.display.shown import Shown
from loratool.schemes import builtin_schemes

__all__ = ["SchemeInfo", "Schemes", "schemes"]


@dataclass(frozen=True, slots=True)
class SchemeInfo:
    """One key scheme: its name, whether it is read and written, and what its keys look like."""

    name: str
    reads: bool
    writes: bool
    example: str
    summary: str


class Schemes(Shown, tuple[SchemeInfo, ...]):
    """All key schemes, in the order of their names."""

    __slots__ = ()

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        rows = [
            {"name": s.name, "reads": s.reads, "writes": s.writes, "example": s.example}
            for s in self
        ]
        return {"schema": 1, "schemes": rows}

    def document(self) -> Document:
        """Return what people see of it."""
        words = {True: "yes", False: "not yet"}
        table = Table.of(
            "",
            (
                "scheme",
                Column("read", is_kept=True),
                "written",
                Column("who writes it", folds=True),
                Column("example", folds=True),
            ),
            [(s.name, words[s.reads], words[s.writes], s.summary, s.example) for s in self],
        )
        return Document((table,))


def schemes() -> Schemes:
    """Return every key scheme, in the order of their names."""
    return Schemes(
        SchemeInfo(scheme.name, True, scheme.is_written, scheme.example, scheme.summary)
        for scheme in builtin_schemes()
    )
