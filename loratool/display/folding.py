"""Fold many module paths into few: ``model.layers.{0..31}.self_attn.{q,k,v,o}_proj``."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["fold_names", "fold_numbers", "is_index", "listed", "shortened"]

LISTED: Final = 8
"""How many names a sentence lists."""
INDEX: Final = re.compile(r"0|[1-9][0-9]{,17}")


def is_index(word: str) -> bool:
    """Whether a word is a number as ``str`` writes it, and no longer than indices are."""
    return INDEX.fullmatch(word) is not None


def fold_numbers(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: ``{0..31}``, ``{0,2,5..7}``, or the one number itself."""
    ordered = sorted(set(numbers))
    parts: list[str] = []
    start = previous = ordered[0]
    for number in [*ordered[1:], None]:
        if number is not None and number == previous + 1:
            previous = number
            continue
        if previous - start > 1:
            parts.append(f"{start}..{previous}")
        else:
            parts += [str(value) for value in range(start, previous + 1)]
        if number is not None:
            start = previous = number
    return parts[0] if is_index(parts[0]) and len(parts) == 1 else f"{{{','.join(parts)}}}"


def fold_names(names: Sequence[str]) -> list[str]:
    """Return patterns that together stand for exactly ``names``.

    Paths that differ in one number are folded first, then paths that differ in one component,
    then children of one module of which some are deeper: ``net.{0.proj,2}``.
    """
    folded = {tuple(name.split(".")) for name in names}
    order = {tuple(name.split(".")): index for index, name in reversed([*enumerate(names)])}
    groups = [(path, order[path]) for path in folded]
    depth = max((len(path) for path in folded), default=0)
    for index in range(depth):
        groups = _merge(groups, index, numeric=True)
    for index in reversed(range(depth)):
        groups = _merge(groups, index, numeric=False)
    groups = _with_tails(groups)
    return [".".join(path) for path, _ in sorted(groups, key=lambda item: item[1])]


def shortened(names: Sequence[str]) -> tuple[str, ...]:
    """Return names, folded where all are dotted paths, the first few and how many more."""
    is_dotted = all(name.count(".") > 1 for name in names)
    shown = fold_names(names) if is_dotted else list(names)
    more = (f"and {len(shown) - LISTED} more",) if len(shown) > LISTED else ()
    return (*shown[:LISTED], *more)


def listed(names: Sequence[str]) -> str:
    """Return the same as one phrase."""
    return ", ".join(shortened(names)).replace(", and ", " and ")


def _merge(
    groups: list[tuple[tuple[str, ...], int]], index: int, *, numeric: bool
) -> list[tuple[tuple[str, ...], int]]:
    """Merge paths that are equal but for the component at ``index``."""
    alike: dict[tuple[object, ...], list[tuple[tuple[str, ...], int]]] = defaultdict(list)
    rest: list[tuple[tuple[str, ...], int]] = []
    for path, place in groups:
        if len(path) > index and is_index(path[index]) == numeric and "{" not in path[index]:
            alike[(len(path), path[:index], path[index + 1 :])].append((path, place))
        else:
            rest.append((path, place))
    for members in alike.values():
        if len(members) == 1:
            rest.append(members[0])
            continue
        members.sort(key=lambda item: item[1])
        parts = [path[index] for path, _ in members]
        word = fold_numbers(int(part) for part in parts) if numeric else _braces(parts)
        first = members[0][0]
        rest.append(((*first[:index], word, *first[index + 1 :]), members[0][1]))
    return rest


def _with_tails(
    groups: list[tuple[tuple[str, ...], int]],
) -> list[tuple[tuple[str, ...], int]]:
    """Merge paths of one parent that are one component longer than it, and those that are two."""
    by_parent: dict[tuple[str, ...], list[tuple[tuple[str, ...], int]]] = defaultdict(list)
    for path, place in sorted(groups, key=lambda item: item[1]):
        for length in (1, 2):
            if len(path) > length:
                by_parent[path[:-length]].append((path, place))
    merged: dict[tuple[str, ...], tuple[tuple[str, ...], int]] = {}
    for parent, members in by_parent.items():
        tails = [path[len(parent) :] for path, _ in members]
        if len({len(tail) for tail in tails}) != 2 or any(path in merged for path, _ in members):
            continue
        words = [word for tail in tails for word in _alternatives(".".join(tail))]
        if sum(len(tail) == 2 for tail in tails) > 1 or any("{" in word for word in words):
            continue  # a level of its own, or braces in braces: clearer apart
        whole = (*parent, _braces(words)), min(place for _, place in members)
        merged |= {path: whole for path, _ in members}
    return list(dict.fromkeys(merged.get(path, (path, place)) for path, place in groups))


def _alternatives(word: str) -> list[str]:
    """Return what a word with one pair of braces at its end stands for."""
    head, brace, rest = word.partition("{")
    if not brace or not rest.endswith("}") or "{" in rest or ".." in rest:
        return [word]
    return [head + item for item in rest.removesuffix("}").split(",")]


def _braces(words: list[str]) -> str:
    """Return ``{q,k,v}_proj`` for words with a common end or beginning."""
    backwards = os.path.commonprefix([word[::-1] for word in words])[::-1]
    suffix = backwards[backwards.index("_") :] if "_" in backwards else ""
    heads = [word.removesuffix(suffix) for word in words]
    if not all(heads):
        suffix, heads = "", words
    common = os.path.commonprefix(heads)
    prefix = common[: common.rindex("_") + 1] if "_" in common else ""
    numbers = [head.removeprefix(prefix) for head in heads]
    if all(map(is_index, numbers)):
        return f"{prefix}{fold_numbers(map(int, numbers))}{suffix}"
    return f"{prefix}{{{','.join(head.removeprefix(prefix) for head in heads)}}}{suffix}"
