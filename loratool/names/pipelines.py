"""Pipelines of several models: what their components are called in each convention."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from loratool.names.diffusion import FAMILIES, unflatten
from loratool.names.diffusion.flattening import flatten

__all__ = [
    "BACKBONES",
    "BACKBONE_KINDS",
    "COMFY_ENCODERS",
    "COMPONENT",
    "COMPONENTS",
    "ENCODERS",
    "KOHYA_ENCODERS",
    "component_of",
    "encoder_component",
    "encoder_kinds",
    "family_of_encoders",
    "flat_prefix",
    "is_text_model",
    "native_prefix",
    "sole_component",
    "split_flat",
    "split_native",
]

COMPONENT: Final = re.compile(
    r"(?P<component>unet|transformer(_\d)?|text_encoder(_\d)?|prior)\.(?P<local>.+)", re.DOTALL
)
"""What may be a component and a path inside it. Many models have a ``transformer`` of their own."""

COMPONENTS: Final = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)
"""The folders of a pipeline that hold models which adapters are for."""

BACKBONE_KINDS: Final = (
    "unet",
    "ldm-unet",
    "flux",
    "bfl-flux",
    "flux2",
    "bfl-flux2",
    "sd3",
    "mmdit-sd3",
    "wan",
    "native-wan",
    "qwen-image",
)
"""The vocabularies of backbones."""
ENCODER_KINDS: Final = ("clip", "t5", "language-model")
"""The vocabularies of text encoders."""

KOHYA_ENCODERS: Final[Mapping[str | None, Mapping[str, str]]] = MappingProxyType(
    {
        "sd1": {"text_encoder": "te"},
        "sdxl": {"text_encoder": "te1", "text_encoder_2": "te2"},
        "flux": {"text_encoder": "te1", "text_encoder_2": "te3"},
        "sd3": {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"},
        None: {"text_encoder": "te", "text_encoder_2": "te2", "text_encoder_3": "te3"},
    }
)
"""Family to component to the part of kohya's prefix that means it."""

COMFY_ENCODERS: Final[Mapping[str | None, Mapping[str, str]]] = MappingProxyType(
    {
        "sd1": {"text_encoder": "clip_l"},
        "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
        "sd3": {
            "text_encoder": "clip_l",
            "text_encoder_2": "clip_g",
            "text_encoder_3": "t5xxl",
        },
        None: {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    }
)
"""Family to component to ComfyUI's name of that text encoder."""

FLAT: Final = re.compile(
    r"(?:lora|oft|boft)_(?:(?P<part>unet|transformer|te\d?|prior_unet|prior_te)_)?_?"
    r"(?:unet_)?(?P<flat>.+)",
    re.DOTALL,
)
LYCORIS: Final = re.compile(r"lycoris_(?:(?P<part>unet|te\d?)_)?(?P<flat>.+)", re.DOTALL)
"""The wrapper of LyCORIS flattens the path inside one model; some tools add a component."""
NATIVE_ENCODER: Final = re.compile(
    r"text_encoders\.(?P<encoder>[a-z0-9_]+)\.transformer\.(?P<local>.+)", re.DOTALL
)
ENCODERS: Final = ("text_encoder", "text_encoder_2", "text_encoder_3")
BACKBONES: Final = ("unet", "transformer")


@lru_cache(maxsize=1 << 17)
def component_of(module: str, known: frozenset[str] = frozenset()) -> tuple[str | None, str]:
    """Return the component of a pipeline that a path begins with, and the path inside it.

    Args:
        module: A dotted path.
        known: What is a component for certain, whatever is inside; others are where a
            vocabulary has the rest of the path.
    """
    match = COMPONENT.fullmatch(module)
    if match is None:
        return None, module
    component, local = match["component"], match["local"]
    if component in known or _is_inside(component, local):
        return component, local
    return None, module


def _is_inside(component: str, local: str) -> bool:
    if component.startswith("text_encoder"):
        kinds: tuple[str, ...] = ENCODER_KINDS
    elif any(family.has(local) for family in FAMILIES):
        return True
    else:
        kinds = BACKBONE_KINDS
    return any(local in unflatten(flatten(local), kind) for kind in kinds)


def is_text_model(module: str) -> bool:
    """Whether a path without component is inside the text encoder of CLIP."""
    return module.startswith("text_model.") and ".layers." in module


def split_flat(module: str) -> tuple[str, str]:
    """Return which component kohya's prefix means (``te1``; empty if none), and the flat path."""
    match = LYCORIS.fullmatch(module) or FLAT.fullmatch(module)
    return ((match["part"] or ""), match["flat"]) if match else ("", module)


def flat_prefix(component: str | None, family: str | None) -> str:
    """Return what kohya puts before the flattened path of a module of ``component``.

    Raises:
        KeyError: It has no name for that component.
    """
    if component is None:
        return "lora_"
    if component in BACKBONES:
        return "lora_unet_"
    if component == "prior":
        return "lora_prior_unet_"
    return f"lora_{encoders_of(KOHYA_ENCODERS, family)[component]}_"


def encoders_of(
    table: Mapping[str | None, Mapping[str, str]], family: str | None
) -> Mapping[str, str]:
    """Return what ``table`` calls the text encoders of a family; ``sd3-large`` is an ``sd3``."""
    name = family.partition("-")[0] if family else None
    return table.get(name, table[None])


def encoder_kinds(part: str) -> tuple[str, ...]:
    """Return what a text encoder may be that kohya calls ``part`` (``te3``)."""
    return ENCODER_KINDS if part.startswith(("te", "prior_te")) else ()


def encoder_component(
    part: str, family: str | None, table: Mapping[str | None, Mapping[str, str]]
) -> str | None:
    """Return the component that ``part`` of one of the tables above means."""
    found = {value: key for key, value in encoders_of(table, family).items()}
    if part in found:
        return found[part]
    # OneTrainer calls Flux's T5 te2, and some tools SD 1.5's encoder te1.
    return {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}.get(part)


def split_native(module: str) -> tuple[str, str]:
    """Return ``diffusion_model`` or ComfyUI's name of a text encoder, and the path inside it."""
    if module.startswith("diffusion_model."):
        return "diffusion_model", module.removeprefix("diffusion_model.")
    match = NATIVE_ENCODER.fullmatch(module)
    return (match["encoder"], match["local"]) if match else ("", module)


def native_prefix(component: str | None, family: str | None) -> str:
    """Return what ComfyUI puts before the native path of a module of ``component``.

    Raises:
        KeyError: It has no name for that component.
    """
    if component is None or component in BACKBONES:
        return "diffusion_model."
    return f"text_encoders.{encoders_of(COMFY_ENCODERS, family)[component]}.transformer."


def sole_component(modules: Collection[str], known: frozenset[str] = frozenset()) -> str | None:
    """Return the component that all of ``modules`` are in, or ``None`` if there is not one."""
    found = {component_of(module, known)[0] for module in modules}
    return found.pop() if len(found) == 1 else None


def family_of_encoders(modules: Collection[str]) -> str | None:
    """Return the family that the components of text encoders tell, without any backbone.

    Only SD3 has a third one; a second one that is a T5 is Flux's, another one SDXL's.
    """
    encoders = {c: local for c, local in map(component_of, modules) if c in ENCODERS}
    if "text_encoder_3" in encoders:
        return "sd3"
    if "text_encoder_2" in encoders:
        is_t5 = encoders["text_encoder_2"].startswith(("encoder.block.", "shared"))
        return "flux" if is_t5 else "sdxl"
    return None
