"""Open adapters with every scheme that loratool knows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from loratool.adapter.model import Adapter, ExtraKind
from loratool.adapter.opening import open_adapter_file
from loratool.errors import OptionError
from loratool.ops.naming.spelling import spell_out
from loratool.schemes import builtin_schemes, scheme_named
from loratool.variants import evident_slots, peft_types, variant_of

__all__ = ["open_adapter"]


def open_adapter(
    path: str | PathLike[str],
    *,
    adapter_name: str | None = None,
    alpha: float | None = None,
    skip: Sequence[str] = (),
    scheme: str | None = None,
    base_modules: Collection[str] = (),
    enabled: Sequence[bool] = (),
) -> Adapter:
    """Open the adapter at ``path``: headers only, no tensor data.

    Args:
        path: The weights file, or the folder that holds it and its sidecars.
        adapter_name: Which adapter, where a folder or a file holds several.
        alpha: Alpha for all modules, where nothing records it.
        skip: Regular expressions; keys that match anywhere are left out.
        scheme: The key scheme to read it in; by default the one that recognises most of it.
        base_modules: Module paths of the base, from which flattened names are restored.
        enabled: Which parts of a merged projection stacked factors are for (``enable_lora``),
            where no configuration says so.

    Raises:
        FileFormatError: A file breaks the rules of its format.
        AdapterError: There is no adapter, or it contradicts itself.
        UnsupportedError: It is of a kind that is not read.
        OptionError: There is no such scheme.
    """
    schemes = builtin_schemes()
    if scheme is not None:
        known = {item.name: item for item in schemes}
        if scheme not in known:
            raise OptionError("--from", f"{scheme!r} is none of {', '.join(known)}")
        schemes = (known[scheme],)
    opened = open_adapter_file(
        Path(path),
        schemes,
        variant_of,
        types=peft_types(),
        adapter_name=adapter_name,
        alpha=alpha,
        skip=skip,
        enabled=enabled,
    )
    found = spell_out(opened, scheme_named(opened.scheme), base_modules)
    return replace(found, mixed=tuple(_foreign_factors(found)))


def _foreign_factors(adapter: Adapter) -> Iterator[str]:
    """Yield the keys that mean nothing in the adapter's scheme, and are factors in another."""
    foreign = evident_slots()
    others = [scheme for scheme in builtin_schemes() if scheme.name != adapter.scheme]
    for extra in adapter.extras:
        if extra.kind is ExtraKind.FULL:
            meanings = (scheme.parse(extra.key) for scheme in others)
            if any(key is not None and key.slot in foreign for key in meanings):
                yield extra.key
