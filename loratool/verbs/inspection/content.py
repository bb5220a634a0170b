"""Adapters of the same content: the same values at the same strength, whatever they are called."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.files.container import read_view
from loratool.files.spec import StoredTensor

__all__ = ["content_key", "copies"]


def content_key(adapter: Adapter) -> str:
    """Return what two adapters have in common that may have the same content, from headers alone.

    Names do not count. Alphas do as the scale that they make; what only training needs does not.
    """
    return _joined(adapter, lambda tensor: "")


def copies(
    keys: Iterable[tuple[Path, str]],
    open_at: Callable[[Path], Adapter],
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[Path, ...]]:
    """Return the paths of each content that several adapters have, in the order of ``keys``.

    Only adapters of one key are read; each tensor of theirs is hashed.

    Args:
        keys: Paths of adapters, with their keys.
        open_at: Opens the adapter at a path.
        progress: Called with how many of those that are read are, and how many these are.
    """
    alike: dict[str, list[Path]] = defaultdict(list)
    for path, key in keys:
        alike[key].append(path)
    to_read = [path for paths in alike.values() if len(paths) > 1 for path in paths]
    found: dict[str, list[Path]] = defaultdict(list)
    for number, path in enumerate(to_read, 1):
        found[_joined(open_at(path), _digest)].append(path)
        if progress is not None:
            progress(number, len(to_read))
    return [tuple(paths) for paths in found.values() if len(paths) > 1]


def _digest(tensor: StoredTensor) -> str:
    return hashlib.sha256(read_view(tensor)).hexdigest()


def _joined(adapter: Adapter, values: Callable[[StoredTensor], str]) -> str:
    """Return a digest of everything that an adapter adds, in an order that no name decides."""
    sites = sorted(_of_site(site, values) for site in adapter.sites)
    extras = sorted(_of_tensor(extra.tensor, values) for extra in adapter.extras)
    return hashlib.sha256(repr((sites, extras)).encode()).hexdigest()


def _of_site(site: Site, values: Callable[[StoredTensor], str]) -> tuple[Any, ...]:
    slots = sorted(
        (slot.value, _of_tensor(tensor, values))
        for slot, tensor in site.slots.items()
        if slot is not Slot.ALPHA
    )
    return site.variant.name, site.kind.value, repr(site.scaling.factor), slots


def _of_tensor(
    tensor: StoredTensor, values: Callable[[StoredTensor], str]
) -> tuple[str, tuple[int, ...], str]:
    return tensor.spec.dtype, tensor.spec.shape, values(tensor)
