"""Many adapters and models at one look: a row each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from loratool.display.document import Block, Column, Document, Lines, Table
from loratool.display.figures import counted, human_bytes
from loratool.schemes.folders import Place
from loratool.schemes.opening import open_adapter
from loratool.verbs.inspect import AdapterInfo, ModelInfo, inspect
from loratool.verbs.inspection.content import content_key, copies
from loratool.verbs.many import Many, Progress, Record, Unread, not_read

__all__ = ["Inspections"]

COLUMNS: Final = (
    "name",
    "path",
    "kind",
    "scheme",
    "family",
    "base",
    "title",
    "rank",
    "smallest_rank",
    "alpha",
    "smallest_alpha",
    "modules",
    "parameters",
    "bytes",
    "triggers",
    "duplicate_of",
    "error",
)
"""What a row says."""


HASHES: Final = {"AutoV2": "autov2", "AutoV3": "autov3", "sha256": "sha256"}
"""Columns for hashes, where those are asked for."""
SPECTRA: Final = {
    "frobenius_norm": "‖delta‖",
    "effective_rank": "effective",
    "rank_90": "90 %",
    "rank_99": "99 %",
    "rank_99_9": "99.9 %",
}
"""Columns for spectra, where those are asked for, and what is above them in a table."""


class Inspections(Many[AdapterInfo | ModelInfo]):
    """What is at many paths, from headers alone, one after another.

    Args:
        paths: Files and folders; of a folder of adapters, every one of them.
        recursive: Look into all folders.
        duplicates: Whether to say which of them have the same content.
        settings: Those of :func:`loratool.inspect`.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        *,
        recursive: bool = False,
        duplicates: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(paths, recursive=recursive)
        self.compares = duplicates
        self.settings = settings
        self.hashed = tuple(HASHES.items()) if settings.get("hashes") else ()
        self.measured = tuple(SPECTRA) if settings.get("spectrum") else ()
        more = (*self.measured, *(column for _, column in self.hashed))
        self.columns = (*COLUMNS[:-1], *more, COLUMNS[-1])

    def one(self, place: Place) -> AdapterInfo | ModelInfo:
        """See :class:`Many`."""
        return inspect(place.path, **self.settings)

    def record(self, place: Place, found: AdapterInfo | ModelInfo | Unread) -> Record:
        """See :class:`Many`."""
        row: dict[str, Any] = dict.fromkeys(self.columns)
        row |= {"name": place.name, "path": str(place.path), "triggers": []}
        if isinstance(found, Unread):
            return row | {"error": found.error.as_json()}
        row |= {column: found.hashes.get(name) for name, column in self.hashed}
        if isinstance(found, ModelInfo):
            return row | {
                "kind": "model",
                "family": found.model.family or found.model_type,
                "parameters": found.parameters,
                "bytes": found.model.bytes,
            }
        adapter, about = found.adapter, found.about
        ranks = [site.rank for site in adapter.sites]
        alphas = [a for site in adapter.sites if (a := site.scaling.alpha) is not None]
        if self.compares:
            row["content"] = content_key(adapter)
        return row | {
            "kind": "adapter",
            "scheme": adapter.scheme,
            "family": adapter.family,
            "base": about.base or about.architecture,
            "title": about.title,
            "rank": max(ranks, default=None),
            "smallest_rank": min(ranks, default=None),
            "alpha": max(alphas, default=None),
            "smallest_alpha": min(alphas, default=None),
            "modules": len(ranks),
            "parameters": adapter.parameters,
            "bytes": adapter.nbytes,
            "triggers": list(about.triggers),
            **_measured(found),
        }

    def compared(
        self, rows: list[dict[str, Any]], progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Return rows that say in ``duplicate_of`` which earlier one has the same content."""
        if not self.compares:
            return rows
        keys = [(Path(row["path"]), row.pop("content")) for row in rows if "content" in row]
        first = {
            str(path): str(paths[0])
            for paths in copies(keys, self._adapter_at, progress)
            for path in paths[1:]
        }
        return [row | {"duplicate_of": first.get(row["path"])} for row in rows]

    def added(self, row: Record) -> dict[str, Any]:
        """See :class:`Many`."""
        return {"duplicate_of": row["duplicate_of"]} if self.compares else {}

    def _adapter_at(self, path: Path) -> Any:
        return open_adapter(path, adapter_name=self.settings.get("adapter_name"))

    def page(self, records: Sequence[Record]) -> Document:
        """See :class:`Many`."""
        return Document.of(self._blocks(records))

    def _blocks(self, records: Sequence[Record]) -> list[Block]:
        known = [row for row in records if not row["error"]]
        shown = ("AutoV2",) if self.hashed else ()
        spectra = tuple(SPECTRA[column] for column in self.measured)
        titles = ("scheme", "family", "base", "rank", "alpha", "size", *spectra, *shown, "triggers")
        folding = ("base", "triggers")
        columns = (
            Column("name", folds=True, is_kept=True),
            *(Column(title, folds=title in folding) for title in titles),
        )
        table = Table.of(
            "",
            columns,
            [
                (
                    row["name"],
                    row["scheme"] or row["kind"],
                    row["family"] or "",
                    row["base"] or "",
                    _span(row["smallest_rank"], row["rank"]),
                    _span(row["smallest_alpha"], row["alpha"]),
                    human_bytes(row["bytes"]),
                    *(_figure(row[column]) for column in self.measured),
                    *(row[HASHES[name]] or "" for name in shown),
                    ", ".join(row["triggers"]),
                )
                for row in known
            ],
        )
        return [table, _same(known), not_read(records), Lines((_summary(records),))]


def _measured(found: AdapterInfo) -> dict[str, Any]:
    """Return what the spectra of an adapter say of all of it."""
    if not found.spectra:
        return {}
    norms = [spectrum.frobenius_norm for spectrum in found.spectra]
    ranks = found.advice.whole.ranks if found.advice is not None else {}
    effective = fmean(spectrum.effective_rank for spectrum in found.spectra)
    return {"frobenius_norm": math.hypot(*norms), "effective_rank": effective, **ranks}


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "-"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _same(records: Sequence[Record]) -> Table:
    names = {row["path"]: row["name"] for row in records}
    copies = [row for row in records if row["duplicate_of"]]
    return Table.of(
        "the same content",
        (Column("name", folds=True, is_kept=True), Column("as", folds=True, is_kept=True)),
        [(row["name"], names[row["duplicate_of"]]) for row in copies],
    )


def _summary(records: Sequence[Record]) -> str:
    counts = {kind: sum(row["kind"] == kind for row in records) for kind in ("adapter", "model")}
    words = [counted(count, kind) for kind, count in counts.items() if count]
    unread = sum(bool(row["error"]) for row in records)
    words += [f"{unread} not read"] if unread else []
    copies = [row["bytes"] for row in records if row["duplicate_of"]]
    words += [f"{len(copies)} of the same content as another"] if copies else []
    size = sum(row["bytes"] or 0 for row in records)
    return f"{', '.join(words)}; {human_bytes(size)}"
