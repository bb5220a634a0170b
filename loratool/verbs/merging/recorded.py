"""The base that an adapter records: on the disk, in the cache of the hub, or on the hub."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from loratool.adapter.model import Adapter
from loratool.errors import AdapterError, HubError, OptionError
from loratool.files.containers import is_weights
from loratool.files.hub.names import parse_hub_name
from loratool.files.places import located, on_the_hub
from loratool.schemes.opening import open_adapter

__all__ = ["recorded_base"]

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
    said = opened.base_model or opened.metadata.get(MODEL_NAME)
    if not said or "\0" in said:
        raise AdapterError(opened.path, "records no base", hint=HINT)
    for place in (Path(said), opened.folder / said):
        if place.exists():
            return place, said
    return _on_the_hub(opened, said), said


def _on_the_hub(adapter: Adapter, said: str) -> Path:
    """Return the path of a model of the hub.

    Raises:
        LoratoolError: It is none, or not to be had.
    """
    try:
        name = parse_hub_name(said, alone=True)
    except OptionError:
        name = None
    if name is None or is_weights(Path(name.inside or name.repo)):
        raise AdapterError(
            adapter.path, f"records {said!r} as its base, which is not here", hint=HINT
        )
    revision = adapter.field("revision")
    if name.revision is None and isinstance(revision, str) and revision:
        pinned = parse_hub_name(f"hf://{name.repo}@{revision.replace('/', '%2F')}")
        name = replace(name, revision=pinned.revision if pinned is not None else None)
    try:
        return on_the_hub(replace(name, is_told=True))
    except HubError as error:
        what = f"records {str(name)!r} as its base: {error.what}"
        raise HubError(located(adapter.path), what, hint=error.hint or HINT) from None
