"""``schemes``: which key schemes there are."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.schemes import builtin_schemes

__all__ = ["SchemeInfo", "schemes"]


@dataclass(frozen=True, slots=True)
class SchemeInfo:
    """One key scheme: its name, whether it is read and written, and what its keys look like."""

    name: str
    reads: bool
    writes: bool
    example: str
    summary: str


def schemes() -> tuple[SchemeInfo, ...]:
    """Return every key scheme, in the order of their names."""
    return tuple(
        SchemeInfo(scheme.name, True, scheme.is_written, scheme.example, scheme.summary)
        for scheme in builtin_schemes()
    )
