"""Open adapters with every scheme that loratool knows."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from loratool.adapter.model import Adapter
from loratool.adapter.opening import open_adapter_file
from loratool.schemes import builtin_schemes

__all__ = ["open_adapter"]


def open_adapter(
    path: str | PathLike[str],
    *,
    adapter_name: str | None = None,
    alpha: float | None = None,
    skip: Sequence[str] = (),
) -> Adapter:
    """Open the adapter at ``path``: headers only, no tensor data.

    Args:
        path: The weights file, or the folder that holds it and its sidecars.
        adapter_name: Which adapter, where a folder or a file holds several.
        alpha: Alpha for all modules, where nothing records it.
        skip: Regular expressions; keys that match anywhere are left out.

    Raises:
        FileFormatError: A file breaks the rules of its format.
        AdapterError: There is no adapter, or it contradicts itself.
        UnsupportedError: It is of a kind that is not read.
    """
    return open_adapter_file(
        Path(path), builtin_schemes(), adapter_name=adapter_name, alpha=alpha, skip=skip
    )
