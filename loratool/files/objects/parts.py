"""How an object is put together: parts that the store copies, and parts that are sent.

S3's rules: a part has 5 MiB to 5 GiB, but for the last, which may be shorter, and there are at
most 10,000. What is between two parts that are copied is sent, and with it bytes that an input
has too where a part were too short without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

__all__ = ["LONGEST", "SENT_BYTES", "Kept", "Part", "parts_of"]

SHORTEST: Final = 5 << 20
"""Bytes of every part but the last, at least."""
LONGEST: Final = 5 << 30
"""Bytes of a part at most, and of an object that is copied in one request."""
MOST_PARTS: Final = 10_000
SENT_BYTES: Final = 8 << 20
"""Bytes of a part that is sent, as long as there are not too many of them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of an object that another one has already.

    Attributes:
        start: Where they begin.
        size: How many.
        source: The other one: whatever names it.
        offset: Where they begin there.
    """

    start: int
    size: int
    source: object
    offset: int

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.start + self.size

    def cut(self, start: int, stop: int) -> Kept:
        """Return those from ``start`` to ``stop`` of the object, both within."""
        return replace(
            self, start=start, size=stop - start, offset=self.offset + start - self.start
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an object.

    Attributes:
        start: Where it begins.
        stop: Where it ends.
        kept: Of what the store copies it; ``None`` for one that is sent.
    """

    start: int
    stop: int
    kept: Kept | None = None

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


def parts_of(size: int, kept: Iterable[Kept]) -> tuple[Part, ...]:
    """Return the parts of an object of ``size`` bytes, in order; none of an empty one.

    Args:
        size: Its bytes.
        kept: What the store can copy of it, in order, none overlapping; neighbours that are
            neighbours in their source too are one.
    """
    joined = _joined(kept)
    shortest = SHORTEST
    while True:
        copied = _copied(size, joined, shortest)
        parts = _cut(size, copied)
        if len(parts) <= MOST_PARTS:
            return parts
        shortest *= 2


def _joined(kept: Iterable[Kept]) -> list[Kept]:
    found: list[Kept] = []
    for each in kept:
        last = found[-1] if found else None
        if (
            last is not None
            and last.source == each.source
            and (last.stop, last.offset + last.size) == (each.start, each.offset)
        ):
            found[-1] = replace(last, size=last.size + each.size)
        elif each.size:
            found.append(each)
    return found


def _copied(size: int, kept: Sequence[Kept], shortest: int) -> list[Kept]:
    """Return what is copied: all that can be, but where less than a part were between two.

    Each piece has ``shortest`` bytes, but for one that ends the object; so has what is between.
    """
    copied: list[Kept] = []
    for each in kept:
        piece: Kept | None = each
        while piece is not None:
            before = copied[-1] if copied else None
            gap = piece.start - (before.stop if before is not None else 0)
            lacking = shortest - gap if gap else 0
            spare = min(max(0, lacking), before.size - shortest) if before is not None else 0
            begin = piece.start + max(0, lacking) - spare
            is_long = piece.stop - begin >= (1 if piece.stop == size else shortest)
            if is_long:
                if before is not None and spare:
                    copied[-1] = before.cut(before.start, before.stop - spare)
                copied.append(piece.cut(begin, piece.stop))
            elif before is not None and lacking > 0 and before.size < piece.size >= shortest:
                copied.pop()  # of two that are too close, the longer one
                continue
            piece = None
    return copied


def _cut(size: int, copied: Sequence[Kept]) -> tuple[Part, ...]:
    """Return the parts: pieces that are too long in equal ones, and what is between them."""
    sent = size - sum(each.size for each in copied)
    most = max(SENT_BYTES, -(-sent // (MOST_PARTS // 2)))
    parts: list[Part] = []
    end = 0
    for each in copied:
        parts += [Part(*piece) for piece in _pieces(end, each.start, most)]
        end = each.stop
        cuts = _pieces(each.start, end, LONGEST)
        parts += [Part(first, last, each.cut(first, last)) for first, last in cuts]
    return (*parts, *(Part(*piece) for piece in _pieces(end, size, most)))


def _pieces(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield equal pieces of about ``most`` bytes, none of which is too short to be a part."""
    size = stop - start
    count = min(-(-size // most), max(1, size // SHORTEST)) if size else 0
    for number in range(count):
        yield start + size * number // count, start + size * (number + 1) // count
