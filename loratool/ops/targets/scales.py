"""Which factor a loader multiplies the delta of each module with."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from loratool.adapter.build import read_scalar
from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.names.pipelines import component_of
from loratool.ops.targets.target import ScaleReading

__all__ = ["applied_factor", "common_alphas"]

ATTENTION: Final = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "out_proj")


def applied_factor(
    site: Site, adapter: Adapter, reading: ScaleReading, alphas: dict[str, float]
) -> float | None:
    """Return the factor that a loader applies to ``site``, or ``None`` if it finds none.

    Args:
        site: A module with A and B.
        adapter: What it is part of.
        reading: How the loader finds it.
        alphas: The commonest alpha of each component, as ``common_alphas`` counts them.
    """
    config, rank = adapter.config, site.rank
    if rank == 0:
        return None
    match reading:
        case ScaleReading.MODULE_ALPHA:
            return _own_alpha(site, 1.0)
        case ScaleReading.DIFFUSERS:
            return _of_diffusers(site, adapter, alphas)
        case ScaleReading.MULTIPLIER:
            return site.scaling.factor
        case _ if config is None:
            return None
        case ScaleReading.GLOBAL:
            return config.alpha / config.rank
        case ScaleReading.GLOBAL_STABILISED:
            # vLLM's layers of experts leave rsLoRA out (vllm#55545).
            is_expert = bool(site.parameters) or ".experts." in f"{site.module}."
            is_root = config.use_rslora and not is_expert
            return config.alpha / (math.sqrt(config.rank) if is_root else config.rank)
        case ScaleReading.GLOBAL_ALPHA:
            return config.alpha / rank if config.alpha else 1.0
    return None


def common_alphas(adapter: Adapter) -> dict[str, float]:
    """Return the alpha that most modules of each component have, where some record one.

    Nothing for a pipeline with a transformer, whose converters look at each module's own alpha.
    """
    counts: dict[str, Counter[float]] = {}
    if any(component_of(site.module)[0] == "transformer" for site in adapter.sites):
        return {}
    for site in adapter.sites:
        if Slot.ALPHA in site.slots and site.is_plain:
            component = component_of(site.module)[0] or ""
            counts.setdefault(component, Counter())[read_scalar(site.slots[Slot.ALPHA])] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}


def _own_alpha(site: Site, default: float) -> float:
    stored = site.slots.get(Slot.ALPHA)
    return read_scalar(stored) / site.rank if stored is not None else default


def _of_diffusers(site: Site, adapter: Adapter, alphas: dict[str, float]) -> float:
    """Return what diffusers' converters make of the alphas of a file.

    Those of Stable Diffusion take the commonest alpha for all, and exceptions from it reach the
    feed-forward layers only, because the patterns for attention name tensors, not modules. Those
    of transformers fold alpha into the factors. Under PEFT's names most pipelines drop alphas.
    """
    component, local = component_of(site.module)
    has_alpha = Slot.ALPHA in site.slots
    if adapter.scheme not in ("kohya", "comfy"):
        is_flux = adapter.family is not None and adapter.family.startswith("flux")
        return site.scaling.factor if not has_alpha or is_flux else 1.0
    common = alphas.get(component or "")
    if common is None:
        return _own_alpha(site, 1.0)
    leaves = ATTENTION if component == "unet" else TEXT_ATTENTION
    is_lost = local.endswith(tuple(f".{leaf}" for leaf in leaves)) or not has_alpha
    return common / site.rank if is_lost else _own_alpha(site, 1.0)
