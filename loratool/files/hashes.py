"""The hashes by which tools for images know a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from loratool.errors import unreadable
from loratool.files.sources import whole

__all__ = ["hashes_of"]

PIECE: Final = 1 << 20
WINDOW: Final = range(0x100000, 0x110000)
"""The 64 KiB that the oldest of them is about."""


def hashes_of(path: Path) -> dict[str, str]:
    """Return the hashes of a file, from one reading of all of it.

    ``sha256``; ``AutoV2``, its first ten digits; ``AutoV1``, eight digits of that of 64 KiB behind
    the first megabyte; and of a safetensors file ``AutoV3``, that of what lies behind its header,
    which trainers record as ``sshs_model_hash`` and tools show twelve digits of.

    Raises:
        UnreadableError: It cannot be read.
    """
    all_of_it, data, window = (hashlib.sha256() for _ in range(3))
    is_safetensors = path.suffix.lower() == ".safetensors"
    position = 0
    try:
        with whole(path).open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little") if is_safetensors else 0
            file.seek(0)
            while piece := file.read(PIECE):
                all_of_it.update(piece)
                data.update(piece[max(0, start - position) :])
                first, last = WINDOW.start - position, WINDOW.stop - position
                window.update(piece[max(0, first) : max(0, last)])
                position += len(piece)
    except OSError as error:
        raise unreadable(path, error) from None
    found = {"sha256": all_of_it.hexdigest(), "AutoV1": window.hexdigest()[:8]}
    found["AutoV2"] = found["sha256"][:10]
    return found | ({"AutoV3": data.hexdigest()} if is_safetensors else {})
