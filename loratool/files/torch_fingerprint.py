"""The identification that torch writes into its zip archives: 40 digits out of names and CRCs.

The record ``.data/serialization_id`` holds two numbers of 64 bits: the hashes of all names of
records, combined, and the CRC-32s of all records that hold anything, combined. torch combines
the names in the order in which ``std::unordered_set<std::string>`` gives them, and so the
number depends on the hash function and the buckets of the C++ library. Both are those of
libstdc++ here, as in the builds of torch for Linux: with them a file is, byte for byte, what
``torch.save`` writes. Nothing ever checks the number.

One oddity is left out: torch takes data that happen to begin as a zip data descriptor does for
one, and combines the four bytes behind that too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["fingerprint"]

WORD: Final = (1 << 64) - 1
MULTIPLIER: Final = 0xC6A4A7935BD1E995
SEED: Final = 0xC70F6907

# How many buckets a growing set has: each time the first of the library's primes that is at
# least twice the one before. The last is beyond what the directory of an archive can hold.
BUCKETS: Final = (
    13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172933, 351061,
    712697, 1447153, 2938679, 5967347, 12117689, 24607243, 49969847, 101473717,
)  # fmt: skip


def fingerprint(names: Iterable[str], checksums: Iterable[int]) -> str:
    """Return the 40 digits of an archive.

    Args:
        names: The records' names without the archive's, in the order they are written.
        checksums: CRC-32 of every record that is not empty, in the same order.
    """
    named = 0
    for value in _as_a_set_gives_them([_hash(name.encode()) for name in names]):
        named = _combine(named, value)
    held = 0
    for value in checksums:
        held = _combine(held, value)
    return f"{named:020d}{held:020d}"


def _combine(seed: int, value: int) -> int:
    return seed ^ ((value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & WORD)


def _hash(data: bytes) -> int:
    """``std::hash<std::string>``: MurmurHash64A, with the library's seed."""
    result = SEED ^ (len(data) * MULTIPLIER & WORD)
    whole = len(data) & ~7
    for start in range(0, whole, 8):
        word = int.from_bytes(data[start : start + 8], "little")
        mixed = _mixed(word * MULTIPLIER & WORD) * MULTIPLIER & WORD
        result = (result ^ mixed) * MULTIPLIER & WORD
    if len(data) > whole:
        result = (result ^ int.from_bytes(data[whole:], "little")) * MULTIPLIER & WORD
    return _mixed(_mixed(result) * MULTIPLIER & WORD)


def _mixed(value: int) -> int:
    return value ^ (value >> 47)


def _as_a_set_gives_them(hashes: list[int]) -> list[int]:
    """Return ``hashes`` as iterating over the set gives them, inserted one by one.

    The elements of a bucket stand together in one list; a new element goes before those of its
    bucket, a new bucket before all others. Growing inserts all of them again in that order.
    """
    order: list[int] = []
    taken = 0
    for count in BUCKETS:
        buckets: dict[int, list[int]] = {}
        following = hashes[taken:count]
        for value in (*order, *following):
            buckets.setdefault(value % count, []).append(value)
        order = [value for bucket in reversed(buckets.values()) for value in reversed(bucket)]
        taken += len(following)
        if taken == len(hashes):
            return order
    raise ValueError("more records than an archive can hold")
