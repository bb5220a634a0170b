"""What an adapter holds that loaders treat differently."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import HEAD_LEAVES, Adapter, ExtraKind, Kind, Site
from loratool.adapter.slots import Slot
from loratool.loaders.loader import Feature

__all__ = ["Found", "features_of"]

NORM: Final = re.compile(r"_layernorm|\.norm")
"""What llama.cpp's converter takes a norm's weight by."""
LANGUAGE_HEADS: Final = HEAD_LEAVES - {"proj_out"}
"""Heads of language models; diffusion transformers have a ``proj_out`` that is none."""


@dataclass(slots=True)
class Found:
    """Where a feature is.

    Attributes:
        names: Modules and tensors that have it.
        fields: Fields of the configuration that say so.
    """

    names: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)


def features_of(adapter: Adapter) -> dict[Feature, Found]:
    """Return every feature that ``adapter`` has, with where it is."""
    found: dict[Feature, Found] = {}
    for site in adapter.sites:
        for feature in _of_site(site):
            found.setdefault(feature, Found()).names.append(site.label)
    for extra in adapter.extras:
        name = extra.name
        if extra.kind is ExtraKind.ROWS:
            found.setdefault(Feature.TOKEN_ROWS, Found()).names.append(extra.key)
        elif extra.kind is ExtraKind.FULL:
            feature = Feature.SAVED
            if name.endswith(".bias"):
                feature = Feature.BIASES
            elif NORM.search(name):
                feature = Feature.NORMS
            found.setdefault(feature, Found()).names.append(extra.key)
    if adapter.config is not None:
        for feature, name in _of_config(adapter.config):
            found.setdefault(feature, Found()).fields.append(name)
    return found


def _of_site(site: Site) -> Iterator[Feature]:
    slots = site.slots
    if Slot.MAGNITUDE in slots:
        yield Feature.DORA
    if site.is_plain and (Slot.UP_BIAS in slots or Slot.BIAS in slots):
        yield Feature.BIASES
    if site.kind is Kind.EMBEDDING:
        yield Feature.EMBEDDING
    if site.kind is Kind.CONV:
        yield Feature.CONVOLUTION
    if site.module.rpartition(".")[2] in LANGUAGE_HEADS:
        yield Feature.HEAD
    if site.parameters:
        yield Feature.PARAMETERS
    variant = site.variant
    if variant.is_compact:
        yield Feature.COMPACT
    elif not site.is_plain:  # loaders know some by name
        yield Feature.__members__.get(variant.name.upper(), Feature.UNFACTORED)
    elif variant.undetermined and not variant.is_decomposed:
        yield Feature.BASE_DEPENDENT


def _of_config(config: LoraConfig) -> Iterator[tuple[Feature, str]]:
    if config.use_dora:
        yield Feature.DORA, "use_dora"
    if config.raw.get("bias") not in (None, "none"):
        yield Feature.BIASES, f"bias {str(config.raw['bias'])[:20]!r}"
    if config.modules_to_save:
        yield Feature.SAVED, "modules_to_save"
    if config.flag("trainable_token_indices"):
        yield Feature.TOKEN_ROWS, "trainable_token_indices"
    if config.init.changes_base:
        yield Feature.CHANGED_BASE, f"init_lora_weights {config.init.name[:20]!r}"
    if config.flag("alora_invocation_tokens"):
        yield Feature.CONDITIONAL, "alora_invocation_tokens"
    if config.peft_type != "ADALORA":  # whose pattern is a mask
        defaults: tuple[tuple[str, Any, Any], ...] = (
            ("rank_pattern", config.rank_pattern, config.rank),
            ("alpha_pattern", config.alpha_pattern, config.alpha),
        )
        for name, pattern, default in defaults:
            if any(value != default for value in pattern.values()):
                yield Feature.PATTERNS, name
