"""Many adapters checked at one go: a row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from loratool.adapter.findings import CODES, Findings
from loratool.display.document import Column, Document, Lines, Table
from loratool.display.figures import counted
from loratool.display.folding import listed
from loratool.errors import LoratoolError
from loratool.schemes.folders import Place
from loratool.verbs.inspect import is_adapter
from loratool.verbs.many import Many, Record, Unread, not_read
from loratool.verbs.validate import Checks

__all__ = ["Validated", "Validations"]


@dataclass(frozen=True, slots=True)
class Validated:
    """What was found of one adapter."""

    path: Path
    findings: Findings

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        return {"schema": 1, "path": str(self.path), **self.findings.as_json()}


class Validations(Many[Validated]):
    """What was found of many adapters, one after another.

    Args:
        paths: Files and folders; of a folder of adapters, every one of them.
        checks: What is checked.
        recursive: Look into all folders.
    """

    columns = ("name", "path", "ok", "errors", "warnings", "infos", "codes", "error")

    def __init__(
        self, paths: Sequence[str | PathLike[str]], checks: Checks, *, recursive: bool
    ) -> None:
        super().__init__(paths, recursive=recursive)
        self.checks = checks
        self.models: list[str] = []

    def one(self, place: Place) -> Validated:
        """See :class:`Many`."""
        opened = self.checks.open(place.path)
        return Validated(place.path, self.checks.findings(opened))

    def places(self) -> Iterator[Place]:
        """Yield the adapters; models that nobody has named are left out."""
        named = {Path(path) for path in self.paths}
        self.models = []
        for place in super().places():
            if place.path not in named and _is_model(place.path):
                self.models.append(place.name)
            else:
                yield place

    def notes(self) -> Sequence[str]:
        """See :class:`Many`."""
        return [f"no adapters, left out: {listed(self.models)}"] if self.models else ()

    def record(self, place: Place, found: Validated | Unread) -> Record:
        """See :class:`Many`."""
        row: dict[str, Any] = dict.fromkeys(self.columns)
        row |= {"name": place.name, "path": str(place.path), "codes": []}
        if isinstance(found, Unread):
            return row | {"ok": False, "error": found.error.as_json()}
        counts = Counter(item.severity for item in found.findings)
        return row | {
            "ok": found.findings.ok,
            "errors": counts["error"],
            "warnings": counts["warning"],
            "infos": counts["info"],
            "codes": list(dict.fromkeys(item.code for item in found.findings)),
        }

    def page(self, records: Sequence[Record]) -> Document:
        """See :class:`Many`."""
        known = [row for row in records if not row["error"]]
        columns = (
            Column("name", folds=True, is_kept=True),
            *(Column(title, is_kept=True) for title in ("errors", "warnings")),
            Column("what", folds=True, is_kept=True),
        )
        rows = [
            (row["name"], row["errors"], row["warnings"], tuple(map(_titled, row["codes"])) or "-")
            for row in known
        ]
        faulty = sum(not row["ok"] for row in known)
        words = [counted(len(known), "adapter") + " checked"]
        words += [f"{faulty} with errors" if faulty else "none with errors"]
        words += [f"{len(records) - len(known)} not read"] if len(records) > len(known) else []
        table = Table.of("", columns, rows)
        return Document.of((table, not_read(records), Lines((", ".join(words),))))


def _titled(code: str) -> str:
    return f"{code} {CODES[code][1]}"


def _is_model(path: Path) -> bool:
    """Whether a path is none of an adapter for certain; what is damaged may be one."""
    try:
        return not is_adapter(path)
    except LoratoolError:
        return False
