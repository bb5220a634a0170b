"""Metadata and configuration of a converted file: what is true of it, and nothing stale."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from typing import Final

from loratool.adapter.model import Adapter, Kind
from loratool.adapter.part import Part
from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.names.families import family_named
from loratool.names.family import Release
from loratool.names.paths import other_names
from loratool.ops.naming.flat import MODULES_KEY
from loratool.ops.naming.spelling import paths_of
from loratool.write.adapter import NewAdapter
from loratool.write.spelling import Spelled

__all__ = [
    "kept_metadata",
    "kohya_metadata",
    "module_names",
    "positional_metadata",
]

STALE: Final = re.compile(
    r"lora_adapter_metadata|format|loratool\w*|sshs_.*|ss_network_.*|modelspec\.hash_sha256"
    r"|modelspec\.implementation|modelspec\.sai_model_spec|modelspec\.architecture"
    r"|unet|text_encoder|(unet|text_encoder):\d+:rank|<.+>|alpha|ss_output_name"
)
"""Keys that describe the form of a file, which is what a conversion changes."""


def kept_metadata(adapter: Adapter) -> dict[str, str]:
    """Return what the input says about its training, and about what it shows."""
    return {k: v for k, v in adapter.metadata.items() if not STALE.fullmatch(k)}


def kohya_metadata(
    new: NewAdapter, parts: Sequence[Part], family: str | None, title: str
) -> dict[str, str]:
    """Return the keys that sd-scripts, A1111 and their like read (``ss_*``, ``modelspec.*``)."""
    linear = [part for part in parts if part.kind is not Kind.CONV] or list(parts)
    convolutions = [part for part in parts if part.kind is Kind.CONV and part.is_plain]
    kernels = [part for part in convolutions if set(part.down.shape[2:]) != {1}]
    is_lycoris = not all(part.variant.is_plain for part in parts)
    arguments = {}
    if kernels:
        arguments = {
            "conv_dim": _common([str(part.rank) for part in kernels]),
            "conv_alpha": _common([_number(part.written_alpha) for part in kernels]),
        }
    release = _release(parts, family)
    found = {
        "ss_v2": str(release is not None and release.is_v2),
        "ss_network_module": "lycoris.kohya" if is_lycoris else "networks.lora",
        "ss_network_dim": _common([str(part.rank) for part in linear]),
        "ss_network_alpha": _common([_number(part.written_alpha) for part in linear]),
        "ss_network_args": json.dumps(arguments) if arguments else "null",
        "ss_output_name": title,
    }
    if release is None:
        return found
    if "ss_base_model_version" not in new.metadata:
        found["ss_base_model_version"] = release.base_version
    found |= {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{release.architecture}/lora",
        "modelspec.implementation": release.implementation,
    }
    if new.metadata.get("modelspec.title", new.stem) == new.stem:
        found["modelspec.title"] = title
    return found


def _release(parts: Sequence[Part], name: str | None) -> Release | None:
    """Return what metadata call the model that the modules are of."""
    if name is None:
        return None
    family = family_named(name)
    widths = {
        part.down.shape[1]
        for part in parts
        if part.is_plain and part.module.endswith(family.told_by)
    }
    return family.release(widths)


def _common(values: Sequence[str]) -> str:
    unique = set(values)
    return unique.pop() if len(unique) == 1 else "Dynamic"


def _number(value: float) -> str:
    """Return an alpha as its tensor holds it, in float32."""
    (value,) = struct.unpack("<f", struct.pack("<f", value))
    return f"{value:.12g}"


def positional_metadata(spelled: Sequence[Spelled]) -> dict[str, str]:
    """Return what cloneofsimo/lora stores beside positional factors."""
    found = {f"{item.name}:rank": str(item.part.rank) for item in spelled}
    components = {item.name.partition(":")[0] for item in spelled}
    if "unet" in components:
        found["unet"] = json.dumps(["CrossAttention", "Attention", "GEGLU"])
    if "text_encoder" in components:
        found["text_encoder"] = json.dumps(["CLIPAttention"])
    return found


def module_names(spelled: Sequence[Spelled], scheme: KeyScheme) -> dict[str, str]:
    """Return the metadata that records paths which their flattened names do not tell."""
    if scheme.spelling not in (Spelling.FLAT, Spelling.BARE_FLAT):
        return {}
    found = paths_of([item.name for item in spelled], scheme)
    unknown = {
        item.name: item.part.module
        for item in spelled
        if found.get(item.name) not in {(path,) for path in _equal_paths(item.part.module)}
    }
    return {MODULES_KEY: json.dumps(unknown, sort_keys=True)} if unknown else {}


def _equal_paths(module: str) -> list[str]:
    """Return a path, and what the same module is called in the other naming."""
    component = module.partition(".")[0]
    return [module, *(f"{component}.{name}" for name in other_names(module, None))]
