"""The configuration beside an adapter's weights: PEFT's or mlx-lm's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from loratool.adapter.model import Kind
from loratool.adapter.part import Part
from loratool.adapter.scheme import KeyScheme, ScaleRule
from loratool.adapter.slots import Slot
from loratool.names.conv1d import CONV1D_LEAVES
from loratool.write.adapter import NewAdapter
from loratool.write.peft import lora_config

__all__ = ["written_config"]

BLOCK: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(.+)$", re.DOTALL)


def written_config(
    new: NewAdapter, scheme: KeyScheme, parts: Sequence[Part], multiplier: float | None
) -> dict[str, Any]:
    """Return ``adapter_config.json``.

    Args:
        new: The adapter.
        scheme: What is written.
        parts: Its modules under the names that they go by.
        multiplier: The one scale of all modules, where the scheme records that.
    """
    if scheme.scale is ScaleRule.MULTIPLIER:
        return _mlx_config(new, parts, 1.0 if multiplier is None else multiplier)
    raw = dict(new.config or {})
    changes = {**new.extras.config, **new.config_changes}
    if raw.get("fan_in_fan_out") or _looks_like_conv1d(parts):
        changes.setdefault("fan_in_fan_out", True)
    is_dora = any(Slot.MAGNITUDE in part.values for part in parts)
    changes |= {"use_dora": is_dora, "use_rslora": False}
    model = (new.sidecar or {}).get("model")
    if isinstance(model, str) and not raw.get("base_model_name_or_path"):
        changes.setdefault("base_model_name_or_path", model)
    keeps_targets = new.keeps_targets and new.scheme == scheme.name
    return lora_config(raw, parts, keep_targets=keeps_targets, changes=changes)


def _looks_like_conv1d(parts: Sequence[Part]) -> bool:
    """Whether all linear modules are of GPT-2's kind: by their names, and a q, k, v in one."""
    linear = [part for part in parts if part.kind is Kind.LINEAR and part.is_plain]
    leaves = {part.module.rpartition(".")[2] for part in linear}
    return leaves <= CONV1D_LEAVES and any(
        part.module.endswith("c_attn") and part.up.shape[0] == 3 * part.down.shape[1]
        for part in linear
    )


def _mlx_config(new: NewAdapter, parts: Sequence[Part], scale: float) -> dict[str, Any]:
    """Return mlx-lm's ``adapter_config.json``."""
    old = dict(new.sidecar or {})
    config = new.config or {}
    layers = {int(match[1]) for part in parts if (match := BLOCK.search(part.module))}
    ranks = {part.rank for part in parts}
    has_magnitude = any(Slot.MAGNITUDE in part.values for part in parts)
    parameters = {
        "rank": max(ranks),
        "scale": scale,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "keys": sorted({_block_path(part.module) for part in parts}),
    }
    known = {k: v for k, v in old.items() if k not in ("lora_parameters", "fine_tune_type")}
    model = config.get("base_model_name_or_path")
    return {
        **known,
        **({"model": model} if model and "model" not in known else {}),
        "fine_tune_type": "dora" if has_magnitude else "lora",
        "num_layers": known.get("num_layers", _depth(layers)),
        "lora_parameters": parameters,
    }


def _depth(layers: set[int]) -> int:
    """Return how many of the last blocks mlx-lm has to adapt; -1 for all of them."""
    return max(layers) - min(layers) + 1 if layers and min(layers) > 0 else -1


def _block_path(module: str) -> str:
    """Return the path of a module inside its block, as mlx-lm's ``keys`` have it."""
    match = BLOCK.search(module)
    return match[2] if match else module
