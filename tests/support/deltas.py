"""The deltas of a PEFT adapter, written out: dense, in float64, from the formula alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."
PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of an adapter folder, or file."""
    if folder.is_file():
        return load_file(folder)
    if (folder / "adapter_model.bin").exists():
        return torch.load(folder / "adapter_model.bin", weights_only=True)
    return load_file(folder / "adapter_model.safetensors")


def load_config(folder: Path) -> dict:
    """Read the configuration of an adapter folder."""
    return json.loads((folder / "adapter_config.json").read_text())


def scale_of(config: dict, module: str, rank: int) -> float:
    """Return what multiplies B @ A, as PEFT finds it."""
    patterns = config.get("alpha_pattern") or {}
    alpha = _first_match(patterns, module, config["lora_alpha"])
    ranks = config.get("rank_pattern") or {}
    configured = _first_match(ranks, module, config["r"])
    assert configured == rank, (module, configured, rank)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _first_match(patterns: dict, module: str, default: float) -> float:
    """Return the value of the first pattern that ends the module's path, as PEFT takes it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def dense_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Return ``scale · B @ A`` of every module, kernels flattened."""
    tensors, config = load_tensors(folder), load_config(folder)
    found = {}
    for key, value in tensors.items():
        for down_suffix, up_suffix in PAIRS:
            if key.endswith(down_suffix):
                module = key.removeprefix(PREFIX).removesuffix(down_suffix)
                down = value.double().flatten(1)
                up = tensors[key.removesuffix(down_suffix) + up_suffix].double().flatten(1)
                found[module] = scale_of(config, module, down.shape[0]) * (up @ down)
    return found


def relative_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Return ``‖found - truth‖ / ‖truth‖`` over all modules; a missing one is zero."""
    assert found.keys() <= truth.keys()
    lost = sum(
        float((truth[name] - found.get(name, torch.zeros(()).double())).square().sum())
        for name in truth
    )
    return math.sqrt(lost / sum(float(value.square().sum()) for value in truth.values()))


def weighted_sum(adapters: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """Return the weighted sum of the deltas of adapters."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in dense_deltas(adapter).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total
