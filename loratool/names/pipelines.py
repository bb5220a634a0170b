"""Pipelines of several models: what their components are called in each convention."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from loratool.names.families import FILES, claiming, families, family_named
from loratool.names.family import CLIP_G, CLIP_L, T5, Family
from loratool.names.flattening import BACKBONE, ENCODER_KINDS, unflatten
from loratool.names.vocabulary import flatten

__all__ = [
    "AVERAGES",
    "BACKBONES",
    "COMFY_ENCODERS",
    "COMPONENT",
    "COMPONENTS",
    "ENCODERS",
    "FIRST",
    "KOHYA_ENCODERS",
    "OMI_ENCODERS",
    "SECOND",
    "UNTRAINED",
    "VAE",
    "EncoderNames",
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
    "text_encoder_4",
)
"""The folders of a pipeline that hold models which adapters are for."""


@dataclass(frozen=True, slots=True)
class EncoderNames:
    """What a scheme calls the text encoders of a pipeline.

    Attributes:
        roles: By the role that the encoder has in its family.
        unknown: By component, where the family is not known.
        alone: The only encoder of a family; empty where it is called by its role.
        has_others: Whether encoders of other roles are called as these are; where not, the
            encoders of a family that has such are numbered.
    """

    roles: Mapping[str, str]
    unknown: Mapping[str, str]
    alone: str = ""
    has_others: bool = False

    def of(self, family: str | None) -> Mapping[str, str]:
        """Return the name of each component that is a text encoder of ``family``."""
        roles = family_named(family).encoders if family else {}
        if self.alone and len(roles) == 1:
            return dict.fromkeys(roles, self.alone)
        found = {name: self.roles.get(role, role) for name, role in roles.items()}
        if not self.has_others and not self.roles.keys() >= set(roles.values()):
            found = {name: f"te{number}" for number, name in enumerate(roles, 1)}
        return found if roles else self.unknown

    def component(self, part: str, family: str | None) -> str | None:
        """Return the component that ``part`` may be, where that of the family is not called so."""
        known = {name: component for component, name in self.unknown.items()}
        if part in known:
            return known[part] if family is None else None
        first = family_named(family).encoders.get(ENCODERS[0]) if family else None
        return ENCODERS[0] if first not in self.roles else None

    def family(self, parts: Collection[str], among: Collection[Family] = ()) -> str | None:
        """Return the family that the names of its encoders tell.

        Args:
            parts: These names.
            among: The families that the backbone leaves; where there are none, all that have
                several text encoders.
        """
        by_name = {name: role for role, name in self.roles.items()}
        others = set(parts) if self.has_others else set()
        roles = {by_name.get(part, part) for part in parts if part in by_name or part in others}
        return _family_of_roles(roles, among)


KOHYA_ENCODERS: Final = EncoderNames(
    {CLIP_L: "te1", CLIP_G: "te2", T5: "te3"},
    {"text_encoder": "te", "text_encoder_2": "te2", "text_encoder_3": "te3"},
    alone="te",
)
"""The parts of kohya's prefix."""

COMFY_ENCODERS: Final = EncoderNames(
    {CLIP_L: "clip_l", CLIP_G: "clip_g", T5: "t5xxl"},
    {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    has_others=True,
)
"""ComfyUI's names."""

OMI_ENCODERS: Final = EncoderNames(
    {CLIP_L: "clip_l", CLIP_G: "clip_g", T5: "t5"},
    {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"},
    has_others=True,
)
"""OneTrainer's names."""

FLAT: Final = re.compile(
    r"(?:lora|oft|boft|Hunyuan_video_I2V_lora)_"
    r"(?:(?P<part>unet|transformer|te\d?|prior_unet|prior_te)_)?_?(?:unet_)?(?P<flat>.+)",
    re.DOTALL,
)
"""kohya's names, and those of HunyuanVideo's own trainer."""
LYCORIS: Final = re.compile(r"lycoris_(?:(?P<part>unet|te\d?)_)?(?P<flat>.+)", re.DOTALL)
"""The wrapper of LyCORIS flattens the path inside one model; some tools add a component."""
NATIVE_ENCODER: Final = re.compile(
    r"text_encoders\.(?P<encoder>[a-z0-9_]+)\.transformer\.(?P<local>.+)", re.DOTALL
)
ENCODERS: Final = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
VAE: Final = "vae"
AVERAGES: Final = "ema"
"""Copies of a backbone, averaged over its training, which nothing but training reads."""
UNTRAINED: Final = {VAE: "the autoencoder", AVERAGES: "averages of the weights over training"}
"""Components that no adapter is for, in words."""
FIRST, SECOND = "transformer", "transformer_2"
"""The experts for the early and the late steps of a model that has two (Wan 2.2).

Outside diffusers each is a model in a file of its own, and no name tells which of them it is.
"""
BACKBONES: Final = ("unet", FIRST, SECOND, "prior")


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
    return _component_of(module, match["component"], match["local"], known, FILES.names())


@lru_cache(maxsize=1 << 17)
def _component_of(
    module: str, component: str, local: str, known: frozenset[str], families: tuple[str, ...]
) -> tuple[str | None, str]:
    if component in known or _is_inside(component, local):
        return component, local
    return None, module


def _is_inside(component: str, local: str) -> bool:
    kinds: tuple[str, ...] = (BACKBONE,)
    if component.startswith("text_encoder"):
        kinds = ENCODER_KINDS
    elif any(family.has(local) for family in claiming([local])):
        return True
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
    before = "lora_prior_" if "prior" in (component, _backbone(family)) else "lora_"
    if component in BACKBONES:
        return f"{before}unet_"
    return f"{before}{KOHYA_ENCODERS.of(family)[component]}_"


def _backbone(family: str | None) -> str | None:
    return family_named(family).backbone if family else None


def encoder_kinds(part: str) -> tuple[str, ...]:
    """Return what a text encoder may be that kohya calls ``part`` (``te3``)."""
    return ENCODER_KINDS if part.removeprefix("prior_").startswith("te") else ()


def encoder_component(part: str, family: str | None, names: EncoderNames) -> str | None:
    """Return the component that ``part``, a name that a scheme has for it, means."""
    found = {value: key for key, value in names.of(family).items()}
    part = part.removeprefix("prior_")
    if part in found:
        return found[part]
    if names.has_others:
        # One that the family is not known to have, or of no family: by what it is.
        return names.component(part, family)
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
    return f"text_encoders.{COMFY_ENCODERS.of(family)[component]}.transformer."


def sole_component(modules: Collection[str], known: frozenset[str] = frozenset()) -> str | None:
    """Return the component that all of ``modules`` are in, or ``None`` if there is not one."""
    found = {component_of(module, known)[0] for module in modules}
    return found.pop() if len(found) == 1 else None


def family_of_encoders(modules: Collection[str]) -> str | None:
    """Return the family that the components of text encoders tell, without any backbone.

    The last of them tells it, where it is not the only one that a family has: a third one is
    Stable Diffusion 3's, a second one that is a T5 is Flux's, another one SDXL's.
    """
    encoders = {c: local for c, local in map(component_of, modules) if c in ENCODERS[1:]}
    if not encoders:
        return None
    last = max(encoders)
    is_t5 = encoders[last].startswith(("encoder.block.", "shared"))
    found = [family for family in families() if not family.refines and last in family.encoders]
    if len(found) > 1:
        found = [family for family in found if (family.encoders[last] == T5) == is_t5]
    return _smallest(found)


def _family_of_roles(roles: Collection[str], among: Collection[Family]) -> str | None:
    """Return the family whose text encoders have these roles, and fewest others."""
    if set(roles) <= {CLIP_L}:  # which nearly all have
        return None
    among = among or [family for family in families() if len(family.encoders) > 1]
    return _smallest([f for f in among if not f.refines and set(roles) <= set(f.encoders.values())])


def _smallest(found: Collection[Family]) -> str | None:
    """Return the one family that has fewest text encoders, or ``None``."""
    least = min((len(family.encoders) for family in found), default=0)
    smallest = [family.name for family in found if len(family.encoders) == least]
    return smallest[0] if len(smallest) == 1 else None
