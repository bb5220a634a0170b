"""The base that an adapter records: on the disk, in the cache of the hub, or on the hub."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from loratool.adapter.model import Adapter
from loratool.errors import AdapterError, HubError, OptionError
from loratool.files.containers import is_weights
from loratool.files.hub.names import HubName, parse_hub_name
from loratool.files.places import in_cache, on_the_hub
from loratool.schemes.opening import open_adapter

__all__ = ["base_at_hand", "recorded_base"]

MODEL_NAME = "ss_sd_model_name"
"""Where kohya's tools say which file or model they trained on."""
HINT = "name the base yourself: loratool merge BASE ADAPTER -o OUT"


def recorded_base(
    adapter: str | PathLike[str], *, adapter_name: str | None = None
) -> tuple[Path, str]:
    """Return the path of the model that an adapter says it was trained on, and what it says.

    A path is looked for from here and from the adapter's folder; what is no path is looked for in
    the local cache of the hub, then on the hub, at the revision that the adapter records.

    Raises:
        LoratoolError: It records none, or one that is not to be had.
    """
    try:
        opened = open_adapter(adapter, adapter_name=adapter_name)
    except AdapterError as error:
        raise AdapterError(error.where, error.what, hint=error.hint or HINT) from None
    said = _said(opened)
    if said is None:
        raise AdapterError(opened.path, "records no base", hint=HINT)
    place = _on_the_disk(opened, said)
    return place if place is not None else _on_the_hub(opened, said), said


def base_at_hand(adapter: Adapter) -> str | None:
    """Return what names the base that an adapter records, where it is there without the network."""
    said = _said(adapter)
    place = _on_the_disk(adapter, said) if said is not None else None
    if said is None or place is not None:
        return str(place) if place is not None else None
    name = _name(adapter, said)
    return str(name) if name is not None and in_cache(name) is not None else None


def _said(adapter: Adapter) -> str | None:
    """Return what an adapter says that it was trained on."""
    said = adapter.base_model or adapter.metadata.get(MODEL_NAME)
    return said if said and "\0" not in said else None


def _on_the_disk(adapter: Adapter, said: str) -> Path | None:
    try:
        return next((p for p in (Path(said), adapter.folder / said) if p.exists()), None)
    except OSError:  # a name that is too long for one
        return None


def _name(adapter: Adapter, said: str) -> HubName | None:
    """Return which model of the hub an adapter records, at the revision that it records."""
    try:
        name = parse_hub_name(said, alone=True)
    except OptionError:
        return None
    if name is None or is_weights(Path(name.inside or name.repo)):
        return None
    revision = adapter.field("revision")
    if name.revision is None and isinstance(revision, str) and revision:
        pinned = parse_hub_name(f"{name.repo}@{revision.replace('/', '%2F')}", alone=True)
        name = replace(name, revision=pinned.revision if pinned is not None else None)
    return name


def _on_the_hub(adapter: Adapter, said: str) -> Path:
    """Return the path of a model of the hub.

    Raises:
        LoratoolError: It is none, or not to be had.
    """
    name = _name(adapter, said)
    if name is None:
        raise AdapterError(
            adapter.path, f"records {said!r} as its base, which is not here", hint=HINT
        )
    try:
        return on_the_hub(replace(name, is_told=True))
    except HubError as error:
        what = f"records {str(name)!r} as its base: {error.what}"
        hint = f"{error.hint}; or {HINT}" if error.hint else HINT
        raise HubError(adapter.path, what, hint=hint) from None
