"""Files with a dictionary for each adapter: which of them is meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from loratool.adapter.wrapped import unwrapped_names
from loratool.errors import AdapterError
from loratool.files.container import WeightsFile
from loratool.names.pipelines import component_of

__all__ = ["one_group"]

LAYER: Final = re.compile(r"(^|[._])\d+[._]")
"""What a path through the layers of a model has in it."""
IN_LAYERS: Final = re.compile(
    r"(?P<layer>.+)\.(lora_)?adapters\.(?P<name>[^.]+)\.(?P<factor>lora_[AB](\.weight)?)", re.DOTALL
)
"""Factors in a dictionary that each layer has, by the names of adapters."""
PARTS: Final = frozenset(
    (
        *("model", "base_model", "transformer", "encoder", "decoder", "backbone", "bert", "llama"),
        *("vision_model", "text_model", "language_model", "visual", "vision_tower", "head"),
    )
)
"""What dictionaries of one model's parts are called, and those of adapters are not."""
SIDES: Final = (
    frozenset(("lora_A", "lora_B")),
    frozenset(("A", "B")),
    frozenset(("lora_down", "lora_up")),
)
"""What the two dictionaries of a file are called that has all A in one, and all B in the other."""
WHOLE: Final = ("base_model.", "model.", "transformer.", "encoder.", "decoder.", "bert.", "unet.")
"""What the paths of a whole model begin with."""


def one_group(
    file: WeightsFile, adapter_name: str | None, where: Path
) -> tuple[WeightsFile, str | None]:
    """Return a file with the tensors of one adapter, and its name, where it holds such apart.

    Args:
        file: The weights.
        adapter_name: The one that is meant, if somebody said so.
        where: The file, for messages.

    Raises:
        AdapterError: There are several, and nobody said which.
    """
    inside = {
        group: {
            name[len(group) + 1 :]: stored
            for name, stored in file.tensors.items()
            if name.startswith(f"{group}.")
        }
        for group in file.groups
    }
    named = _named_in_layers(file)
    if named and (adapter_name is None or adapter_name in named):
        return _one_named(file, named, adapter_name, where)
    if inside.keys() in SIDES:
        turned = {
            f"{name}.{side}": t for side, found in inside.items() for name, t in found.items()
        }
        return replace(file, tensors=turned), None
    if adapter_name not in inside:
        if not all(_is_name(group) for group in inside):
            return file, None
        paths = [set(tensors) for tensors in inside.values()]
        if len(paths) > 1 and all(
            names == paths[0] and all(map(LAYER.search, names)) for names in paths
        ):
            raise AdapterError(
                where,
                f"holds several adapters: {', '.join(inside)}",
                hint="choose one with --adapter-name",
            )
        if len(paths) != 1 or not all(name.startswith(WHOLE) for name in paths[0]):
            return file, None
        (adapter_name,) = inside
    left = len(file.tensors) - len(inside[adapter_name])
    note = f"{left} tensors of other adapters in the file were not read"
    notes = (*file.notes, note) if left else file.notes
    return replace(file, tensors=inside[adapter_name], notes=notes), adapter_name


def _named_in_layers(file: WeightsFile) -> dict[str, dict[str, str]]:
    """Return the keys of adapters that each layer holds by name: by name, with what they become.

    The wrapped weight beside them tells that what holds them is one layer, and no block of some.
    """
    found: dict[str, dict[str, str]] = {}
    layers: dict[str, set[str]] = {}
    for key in file.tensors:
        match = IN_LAYERS.fullmatch(key)
        if match is not None:
            found.setdefault(match["name"], {})[key] = f"{match['layer']}.{match['factor']}"
            layers.setdefault(match["layer"], set()).add(match["name"])
    weights = unwrapped_names(file.tensors, layers).values() if layers else ()
    is_wrapped = layers.keys() <= {name.removesuffix(".weight") for name in weights}
    return found if layers and is_wrapped else {}


def _one_named(
    file: WeightsFile, named: Mapping[str, Mapping[str, str]], name: str | None, where: Path
) -> tuple[WeightsFile, str]:
    """Return a file with the tensors of one of the adapters that layers hold by name.

    Raises:
        AdapterError: There are several, and nobody said which.
    """
    if name is None and len(named) > 1:
        raise AdapterError(
            where,
            f"holds several adapters: {', '.join(named)}",
            hint="choose one with --adapter-name",
        )
    name = name or next(iter(named))
    others = {key for keys in named.values() for key in keys}
    kept = {key: stored for key, stored in file.tensors.items() if key not in others}
    chosen = {spelled: file.tensors[key] for key, spelled in named[name].items()}
    left = len(others) - len(chosen)
    notes = (f"{left} tensors of other adapters in the file were not read",) if left else ()
    return replace(file, tensors={**chosen, **kept}, notes=(*file.notes, *notes)), name


def _is_name(group: str) -> bool:
    """Whether a dictionary is called as an adapter may be, and no part of a model is."""
    return not (group in PARTS or group[-1:].isdigit() or component_of(f"{group}.x")[0] is not None)
