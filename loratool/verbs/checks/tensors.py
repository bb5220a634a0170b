"""What the tensors of an adapter say about themselves."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Final

from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter, ExtraKind, unknown_scale
from loratool.adapter.problems import site_problems
from loratool.adapter.slots import Slot
from loratool.errors import printable
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.sources import whole
from loratool.files.spec import StoredTensor

__all__ = ["check_tensors"]

ARCHIVE: Final = b"PK\x03\x04"
"""What a zip archive begins with: files of torch and NumPy are such."""
LONGEST_NAME: Final = 500
UNUSUAL_SCALE: Final = 32.0
WIDER: Final = frozenset((Slot.ALPHA, Slot.MAGNITUDE))
"""What tools, this one too, write in float32 beside factors of 16 bits."""


def check_tensors(adapter: Adapter, *, deep: bool) -> Iterator[Finding]:
    """Yield findings on pairs, shapes, dtypes, names and, if ``deep``, values."""
    for site in adapter.sites:
        for code, problem in site_problems(site, adapter):
            yield finding(code, site.label, problem)
    if adapter.mixed:
        yield finding(
            "LT032",
            adapter.mixed[0],
            f"is one of {len(adapter.mixed)} factors in another scheme than {adapter.scheme!r}, as "
            "which the file was read; nothing would use them",
            "leave out one part with --skip",
        )
    for module, paths in adapter.unresolved.items():
        words = f"could be {' or '.join(paths[:4])}" if paths else "is not known"
        reason = f"is not known: {adapter.unknown}" if adapter.unknown is not None else None
        yield finding("LT033", module, reason or f"is a flattened name, and its path {words}")
    yield from _names(adapter)
    yield from _dtypes(adapter)
    yield from _notes(adapter)
    yield from _scales(adapter)
    if deep:
        yield from _checksums(adapter)
        yield from _values(adapter)


def _names(adapter: Adapter) -> Iterator[Finding]:
    for key in adapter.tensors:
        if printable(key) != key:
            yield finding("LT019", key, "its name holds control or invisible characters")
        elif "/" in key or "\\" in key or ".." in key:
            yield finding("LT019", key, "its name looks like a path")
        elif len(key) > LONGEST_NAME:
            yield finding("LT019", key[:60] + "…", f"its name is {len(key)} characters long")
    if adapter.name == "lora":
        yield finding("LT019", adapter.weights, "an adapter named 'lora' confuses PEFT's loader")


def _dtypes(adapter: Adapter) -> Iterator[Finding]:
    counts = Counter(
        stored.spec.dtype
        for site in adapter.sites
        for slot, stored in site.slots.items()
        if slot not in WIDER
    )
    if len(counts) > 1:
        listed = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
        yield finding("LT020", adapter.weights, f"its factors have mixed dtypes: {listed}")


def _notes(adapter: Adapter) -> Iterator[Finding]:
    for note in adapter.notes:
        if "beside" in note:
            yield finding("LT025", adapter.path, note)
        elif "prefix" in note:
            yield finding("LT026", adapter.path, note)
        else:
            yield finding("LT031", adapter.path, note)


def _scales(adapter: Adapter) -> Iterator[Finding]:
    if unknown := unknown_scale(adapter):
        yield finding(
            "LT009",
            adapter.weights,
            unknown,
            "if it was trained with another, merge with --alpha",
        )
    for site in adapter.sites:
        factor = site.scaling.factor
        if factor == 0:
            yield finding("LT029", site.label, "its scale is 0: it does nothing")
        elif abs(factor) > UNUSUAL_SCALE:
            yield finding("LT029", site.label, f"its scale is {factor:g}")


def _checksums(adapter: Adapter) -> Iterator[Finding]:
    """Yield the records of zip archives whose bytes are not those that were written."""
    for path in dict.fromkeys(stored.path for stored in adapter.tensors.values()):
        with whole(path).open("rb") as file:
            if file.read(len(ARCHIVE)) != ARCHIVE:
                continue
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
        if broken is not None:
            yield finding("LT036", path, f"the record {broken!r} has another checksum")


def _values(adapter: Adapter) -> Iterator[Finding]:
    for key, stored in adapter.tensors.items():
        if not _all_finite(stored):
            yield finding("LT017", key, "holds NaN or infinity")
    untrained = [site.label for site in adapter.sites if site.up and _all_zero(site.up)]
    if untrained and len(untrained) == len(adapter.sites):
        yield finding(
            "LT018", adapter.weights, "B is zero in every module: it was saved before training"
        )
    else:
        for label in untrained:
            yield finding("LT018", label, "B is all zero: this module was not trained")
    for extra in adapter.extras:
        if extra.kind is ExtraKind.ROWS and _all_zero(extra.tensor):
            yield finding("LT018", extra.key, "the trained token rows are all zero")


def _all_finite(stored: StoredTensor) -> bool:
    import numpy as np

    data = read_bytes(stored)
    match stored.spec.dtype:
        case "BF16":
            return not bool((np.frombuffer(data, "<u2") & 0x7F80 == 0x7F80).any())
        case "F16" | "F32" | "F64":
            kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[stored.spec.dtype]
            return bool(np.isfinite(np.frombuffer(data, kind)).all())
        case dtype if DTYPES[dtype].is_factor:
            from loratool.codecs.numbers import decode

            return bool(np.isfinite(decode(data, dtype, stored.spec.shape, np.float32)).all())
        case _:
            return True


def _all_zero(stored: StoredTensor) -> bool:
    data = read_bytes(stored)
    # Only the sign bit may be set: -0.0 is zero too.
    return stored.spec.elements > 0 and not data.strip(b"\x00\x80")
