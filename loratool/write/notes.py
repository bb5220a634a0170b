"""What a user should know about a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from loratool.adapter.part import Part
from loratool.files.dtypes import DTYPES
from loratool.write.conventions import Naming

__all__ = ["dtype_notes", "unknown_notes"]

WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")


def dtype_notes(parts: Sequence[Part]) -> Iterator[str]:
    """Yield that few loaders read what is written, where it has uncommon dtypes."""
    dtypes = {value.dtype for part in parts for value in part.values.values()}
    strange = {d for d in dtypes if d not in WEIGHT_DTYPES and DTYPES[d].is_float}
    if strange:
        yield f"has factors of {', '.join(sorted(strange))}; few loaders read them (--dtype)"


def unknown_notes(parts: Sequence[Part], naming: Naming, known: frozenset[str]) -> Iterator[str]:
    """Yield a note on modules of a backbone that its family does not have."""
    modules = (part.module for part in parts)
    foreign = naming.unknown(modules, known) if naming.families else []
    if foreign:
        yield (
            f"{len(foreign)} modules are none of {naming} and keep their names, such as "
            f"{foreign[0]!r}"
        )
