"""Where loaders take the factor of a module's delta from; those of one loader are in its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

from loratool.adapter.build import read_scalar
from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.loaders.loader import ScaleReading

__all__ = [
    "GLOBAL",
    "GLOBAL_ALPHA",
    "GLOBAL_STABILISED",
    "MODULE_ALPHA",
    "MULTIPLIER",
    "own_alpha",
]


def own_alpha(site: Site) -> float:
    """Return a module's alpha tensor over its rank, or 1 where it has none."""
    stored = site.slots.get(Slot.ALPHA)
    return read_scalar(stored) / site.rank if stored is not None else 1.0


def _configured(
    factor: Callable[[Site, LoraConfig], float], adapter: Adapter
) -> Callable[[Site], float | None]:
    config = adapter.config
    if config is None:
        return lambda site: None
    return lambda site: factor(site, config)


def _stabilised(site: Site, config: LoraConfig) -> float:
    # vLLM's layers of experts leave rsLoRA out (vllm#55545).
    is_expert = bool(site.parameters) or ".experts." in f"{site.module}."
    is_root = config.use_rslora and not is_expert
    return config.alpha / (math.sqrt(config.rank) if is_root else config.rank)


GLOBAL: Final = ScaleReading(
    "lora_alpha / r of adapter_config.json, the same for every module",
    partial(_configured, lambda site, config: config.alpha / config.rank),
)
GLOBAL_STABILISED: Final = ScaleReading(
    "lora_alpha / r of adapter_config.json, or lora_alpha / sqrt(r) with use_rslora, the same "
    "for every module",
    partial(_configured, _stabilised),
)
GLOBAL_ALPHA: Final = ScaleReading(
    "one lora_alpha over the rank of each module's tensors; an alpha of 0 counts as 1",
    partial(_configured, lambda site, config: config.alpha / site.rank if config.alpha else 1.0),
)
MODULE_ALPHA: Final = ScaleReading(
    "each module's alpha tensor over its rank, or 1 where it has none", lambda _: own_alpha
)
MULTIPLIER: Final = ScaleReading(
    "lora_parameters.scale of adapter_config.json, as it is",
    lambda _: lambda site: site.scaling.factor,
)
