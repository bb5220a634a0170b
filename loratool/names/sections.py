"""Parts of a pipeline as people speak of them, ``unet down`` and ``te2``, and tables by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, takewhile
from typing import Final, TypeVar

from loratool.display.document import Group, Row
from loratool.display.grouping import group_modules, kind_of, pattern_of
from loratool.names.pipelines import component_of
from loratool.names.spellings import component_names

__all__ = ["module_groups", "section_of", "shared_path"]

Item = TypeVar("Item")
MOST_ROWS: Final = 24
"""Where there are more kinds of modules, those of one parent are one row."""
MOST_SHOWN: Final = 100
"""Where there are still more of one part, the rest is one row."""

STAGES: Final = {
    "down_blocks": "down",
    "input_blocks": "down",
    "mid_block": "mid",
    "middle_block": "mid",
    "up_blocks": "up",
    "output_blocks": "up",
}
"""The halves of a U-Net and what lies between, in the names of diffusers and of checkpoints."""


def section_of(module: str, known: frozenset[str] = frozenset(), family: str | None = None) -> str:
    """Return which part of a pipeline a module is in; empty where it is a model by itself.

    Args:
        module: Its dotted path.
        known: What is a component for certain.
        family: The pipeline, where known.
    """
    component, local = component_of(module, known)
    if component is None:
        return ""
    if component.startswith("text_encoder"):
        return component_names(component, family)[1]  # te1, or te where it has no number
    stage = STAGES.get(local.partition(".")[0], "") if component == "unet" else ""
    return f"{component} {stage}".rstrip()


def shared_path(names: Sequence[str]) -> str:
    """Return what all paths begin with, at most two components and never a whole path."""
    first, last = min(names).split("."), max(names).split(".")
    alike = (a if a == b else "" for a, b in zip(first[:-1], last[:-1], strict=False))
    return ".".join(takewhile(bool, islice(alike, 2)))


def module_groups(
    items: Iterable[Item],
    names: Sequence[str],
    row: Callable[[tuple[str, ...], list[Item]], Row],
    *,
    family: str | None = None,
    unfolded: bool = False,
) -> list[Group]:
    """Return rows of a table for modules, alike ones as one, by parts of the pipeline.

    Args:
        items: What is said of each module.
        names: Their paths.
        row: Makes a row of folded names and what is said of these modules.
        family: The pipeline, where known.
        unfolded: Whether every module has a row of its own.
    """
    if unfolded:
        pairs = zip(items, names, strict=True)
        return [Group("", tuple(row((name,), [item]) for item, name in pairs))]
    key = pattern_of if len(set(map(pattern_of, names))) <= MOST_ROWS else kind_of
    sections: dict[str, list[tuple[Item, str]]] = defaultdict(list)
    for item, name in zip(items, names, strict=True):
        sections[section_of(name, family=family)].append((item, name))
    groups = []
    for section, members in sections.items():
        inside = [name for _, name in members]
        shared = shared_path(inside) if section and len(sections) > 1 else ""
        local = [name.removeprefix(f"{shared}.") for name in inside]
        folded = _few(group_modules([item for item, _ in members], local, key))
        title = f"{section} ({shared})" if shared else section if len(sections) > 1 else ""
        groups.append(Group(title, tuple(row(*pair) for pair in folded)))
    return groups


def _few(
    rows: list[tuple[tuple[str, ...], list[Item]]],
) -> list[tuple[tuple[str, ...], list[Item]]]:
    """Return rows of which those beyond the first are one; names that do not fold are many."""
    if len(rows) <= MOST_SHOWN:
        return rows
    rest = [item for _, items in rows[MOST_SHOWN:] for item in items]
    return [*rows[:MOST_SHOWN], ((f"{len(rest):,} others",), rest)]
