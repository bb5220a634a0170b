"""Flat rows of a report as text that other programs read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["csv_text"]


def csv_text(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as CSV with a line of names first; what is not known is empty.

    Numbers have all of their digits, texts are as they are.
    """
    rows = list(records)
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
