"""Move many ranges of bytes to where a file needs them, in blocks and on several threads.

The ranges of a renamed file are short and begin anywhere, for which copying inside the kernel is
slower than through a buffer that stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratool.files.transfer import read_into, write_all

__all__ = ["Piece", "gather"]

BLOCK: Final = 1 << 20
THREADS: Final = 2
WORTH_A_THREAD: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of bytes and where it goes.

    Attributes:
        offset: Where it goes.
        size: How long it is.
        source: The file that it comes from; ``None`` for ``data``.
        source_offset: Where it begins there.
        data: The bytes themselves.
    """

    offset: int
    size: int
    source: Path | None = None
    source_offset: int = 0
    data: bytes = b""


def gather(pieces: Sequence[Piece], target: int, descriptor: Callable[[Path], int]) -> None:
    """Write ``pieces`` to the open file ``target``.

    Args:
        pieces: In any order; no two overlap.
        target: A descriptor that can be written.
        descriptor: Returns the descriptor of a source.

    Raises:
        FileFormatError: A source ended early.
        OSError: Writing failed.
    """
    ordered = sorted(pieces, key=lambda piece: piece.offset)
    total = sum(piece.size for piece in ordered)
    if total < WORTH_A_THREAD:
        _move(ordered, target, descriptor)
        return
    shares: list[list[Piece]] = [[] for _ in range(THREADS)]
    done = 0
    for piece in ordered:
        shares[min(THREADS - 1, done * THREADS // total)].append(piece)
        done += piece.size
    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(_move, share, target, descriptor) for share in shares]:
            future.result()


def _move(pieces: Sequence[Piece], target: int, descriptor: Callable[[Path], int]) -> None:
    buffer = memoryview(bytearray(BLOCK))
    begin = filled = 0
    for piece in pieces:
        done = 0
        while done < piece.size:
            place = piece.offset + done
            if filled == BLOCK or (filled and place != begin + filled):
                write_all(target, buffer[:filled], begin)
                filled = 0
            if not filled:
                begin = place
            size = min(piece.size - done, BLOCK - filled)
            view = buffer[filled : filled + size]
            if piece.source is None:
                view[:] = piece.data[done : done + size]
            else:
                source = descriptor(piece.source)
                read_into(source, view, piece.source_offset + done, path=piece.source)
            filled += size
            done += size
    if filled:
        write_all(target, buffer[:filled], begin)
