"""Compact tables of names: ``{a,b}`` stands for either."""

from __future__ import annotations

from itertools import product

__all__ = ["expand"]


def expand(*patterns: str) -> tuple[str, ...]:
    """Return every name that the patterns stand for, in order, each once.

    A pattern holds any number of groups ``{a,b,…}`` that are not nested; an alternative may be
    empty. ``x.{a,b.}{c,d}`` stands for ``x.ac``, ``x.ad``, ``x.b.c`` and ``x.b.d``.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        head, *groups = pattern.split("{")
        choices: list[tuple[str, ...]] = [(head,)]
        for group in groups:
            alternatives, _, tail = group.partition("}")
            choices.append(tuple(f"{each}{tail}" for each in alternatives.split(",")))
        names.update(dict.fromkeys("".join(parts) for parts in product(*choices)))
    return tuple(names)
