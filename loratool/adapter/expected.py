"""Which tensors a module has to have, and in which shapes: told by a variant in a table."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor

__all__ = ["shape_problems"]

ANY, REST = ".", "..."


def shape_problems(site: Site) -> Iterator[tuple[str, str]]:
    """Yield what is missing or misshapen, by the table of the site's variant.

    A shape is words: numbers, names that mean the same side wherever they stand, ``.`` for any
    side, and ``...`` for any further ones.
    """
    sides: dict[str, int] = {}
    for name, words in site.variant.expected(site.slots).items():
        tensor = site.slots.get(Slot(name)) or site.settings.get(name)
        if not isinstance(tensor, StoredTensor):
            if name not in site.variant.spare:
                yield "LT001", f"is {site.variant.words}, but has no {name}"
            continue
        shape = tensor.spec.shape
        if 0 in shape:
            yield "LT002", f"has an empty {name}: {list(shape)}"
        elif not _fits(shape, words.split(), sides):
            known = ", ".join(f"{side} {size}" for side, size in sides.items())
            told = f" with {known}" if known else ""
            yield "LT003", f"has {name} of shape {list(shape)}, expected ({words}){told}"
        elif name not in site.variant.whole_numbers and not DTYPES[tensor.spec.dtype].is_factor:
            yield "LT004", f"has {name} of dtype {tensor.spec.dtype}, expected a float"


def _fits(shape: tuple[int, ...], words: list[str], sides: dict[str, int]) -> bool:
    if words[-1:] == [REST]:
        words = words[:-1]
        shape = shape[: len(words)]
    if len(shape) != len(words):
        return False
    for size, word in zip(shape, words, strict=True):
        if word == ANY:
            continue
        wanted = int(word) if word.isdigit() else sides.setdefault(word, size)
        if size != wanted:
            return False
    return True
