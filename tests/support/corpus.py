"""Tiny seeded adapters of every variant and dtype, and what they do to a base, in float64.

The formulas are written out here with numpy, from the papers and from what PEFT and LyCORIS
document; nothing of loratool is used. torch only rounds to the stored dtypes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray
Tensors = dict[str, torch.Tensor]

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DIGITS: Final = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}
"""Significant binary digits."""
LEAST: Final = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126, "F8_E4M3": -6, "F8_E5M2": -14}
"""The exponent below which numbers are subnormal."""


def unit(dtype: str) -> float:
    """Return the largest relative error of one rounding to ``dtype``."""
    return 2.0 ** -DIGITS[dtype]


def spacing(values: Array, dtype: str) -> Array:
    """Return the distance of neighbours in ``dtype`` around each value."""
    exponents = np.frexp(np.abs(values))[1] - 1
    return np.exp2(np.maximum(exponents, LEAST[dtype]) - (DIGITS[dtype] - 1.0))


class Draw:
    """Seeded normal numbers, rounded to a dtype.

    ``RandomState`` is used because its stream is frozen: numbers stay the same with any numpy.
    """

    def __init__(self, seed: str, dtype: str) -> None:
        self._random = np.random.RandomState(zlib.crc32(seed.encode()))
        self._dtype = DTYPES[dtype]

    def __call__(self, *shape: int, size: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        values = mean + size * self._random.standard_normal(shape)
        return torch.from_numpy(np.asarray(values)).to(self._dtype)


def exact(tensor: torch.Tensor) -> Array:
    """Return the values of a stored tensor in float64."""
    return tensor.double().numpy()


@dataclass(frozen=True)
class Change:
    """What one tensor of the base should become.

    Attributes:
        value: The result for a strength of one.
        size: The sum of the absolute values that are added up: what float32 may round.
    """

    value: Array
    size: Array


@dataclass(frozen=True)
class Sample:
    """An adapter, its base, and the truth.

    Attributes:
        name: The variant.
        tensors: The adapter's tensors by their names in the file.
        base: The base's tensors.
        config: ``adapter_config.json``; ``None`` for a single file without one.
        base_config: ``config.json`` of the base.
        deltas: Δ of each module, ``(out, in * kernel)``, scale included, where there is one that
            does not depend on the base.
        merged: What merging changes, by the base's names.
    """

    name: str
    tensors: Tensors
    base: Tensors
    config: dict[str, Any] | None = None
    base_config: dict[str, Any] | None = None
    deltas: Mapping[str, Array] = field(default_factory=dict)
    merged: Mapping[str, Change] = field(default_factory=dict)

    def write(self, folder: Path, name: str = "adapter") -> Path:
        """Write the adapter and return its path."""
        if self.config is None:
            path = folder / f"{name}.safetensors"
            save_file(self.tensors, path)
            return path
        path = folder / name
        path.mkdir(parents=True)
        save_file(self.tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(self.config))
        return path

    def write_base(self, folder: Path, name: str = "base") -> Path:
        """Write the base and return its folder."""
        return write_model(folder / name, self.base, self.base_config)


def write_model(path: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """Write a model folder."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


Q, DOWN = "layers.0.q_proj", "layers.1.down_proj"
SHAPES: Final = {Q: (24, 16), DOWN: (10, 40)}
RANK: Final = 4
PREFIX: Final = "base_model.model."


def _settings(**more: Any) -> dict[str, Any]:
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": 7, "target_modules": [Q, DOWN]}
    return plain | {"init_lora_weights": True} | more


def _added(weight: torch.Tensor, delta: Array, size: Array) -> Change:
    stored = exact(weight)
    return Change(stored + delta.reshape(stored.shape), np.abs(stored) + size.reshape(stored.shape))


def _product(scale: float, up: torch.Tensor, down: torch.Tensor) -> tuple[Array, Array]:
    """Return ``scale · B @ A`` and the same of absolute values, kernels flattened."""
    left, right = exact(up.flatten(1)), exact(down.flatten(1))
    return scale * (left @ right), abs(scale) * (np.abs(left) @ np.abs(right))


def _linear(draw: Draw, weights: Draw, name: str, scale: float, **config: Any) -> Sample:
    tensors, base, deltas, merged = {}, {}, {}, {}
    for module, (out, into) in SHAPES.items():
        down, up = draw(RANK, into), draw(out, RANK, size=0.3)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up
        weight = base[f"{module}.weight"] = weights(out, into)
        deltas[module], size = _product(scale, up, down)
        merged[f"{module}.weight"] = _added(weight, deltas[module], size)
    return Sample(name, tensors, base, _settings(**config), None, deltas, merged)


def lora(draw: Draw, weights: Draw) -> Sample:
    return _linear(draw, weights, "lora", 7 / RANK)


def rslora(draw: Draw, weights: Draw) -> Sample:
    return _linear(draw, weights, "rslora", 7 / math.sqrt(RANK), use_rslora=True)


def patterns(draw: Draw, weights: Draw) -> Sample:
    plain = _linear(draw, weights, "patterns", 1.0, alpha_pattern={"q_proj": 3, "down_proj": -5})
    scales = {Q: 3 / RANK, DOWN: -5 / RANK}
    deltas = {module: scales[module] * delta for module, delta in plain.deltas.items()}
    merged = {}
    for module, delta in deltas.items():
        name = f"{module}.weight"
        weight = exact(plain.base[name])
        size = abs(scales[module]) * (plain.merged[name].size - np.abs(weight))
        merged[name] = _added(plain.base[name], delta, size)
    return replace(plain, deltas=deltas, merged=merged)


def adalora(draw: Draw, weights: Draw) -> Sample:
    plain = _linear(draw, weights, "adalora", 1.0)
    tensors, deltas, merged = {}, {}, {}
    scale = 7 / (RANK + 1e-5)
    for module in SHAPES:
        down = plain.tensors[f"{PREFIX}{module}.lora_A.weight"]
        up = plain.tensors[f"{PREFIX}{module}.lora_B.weight"]
        values = draw(RANK, 1)
        tensors[f"{PREFIX}{module}.lora_A"] = down
        tensors[f"{PREFIX}{module}.lora_B"] = up
        tensors[f"{PREFIX}{module}.lora_E"] = values
        left, right = exact(up), exact(values) * exact(down)
        deltas[module] = scale * (left @ right)
        size = scale * (np.abs(left) @ np.abs(right))
        merged[f"{module}.weight"] = _added(plain.base[f"{module}.weight"], deltas[module], size)
    config = _settings(peft_type="ADALORA", init_r=RANK, target_r=2, total_step=10)
    return replace(plain, tensors=tensors, config=config, deltas=deltas, merged=merged)


def _decomposed(
    weight: Array, delta: Array, size: Array, magnitude: Array, axes: tuple[int, ...]
) -> Change:
    """DoRA: ``m / ‖W + Δ‖ · (W + Δ)``, norms over ``axes``."""
    moved = weight + delta
    norms = np.sqrt(np.sum(moved * moved, axis=axes, keepdims=True))
    factor = magnitude.reshape(norms.shape) / norms
    return Change(moved * factor, (np.abs(weight) + size) * np.abs(factor))


def dora(draw: Draw, weights: Draw) -> Sample:
    plain = _linear(draw, weights, "dora", 7 / RANK, use_dora=True)
    tensors, merged = dict(plain.tensors), {}
    for module, (out, _) in SHAPES.items():
        magnitude = draw(out, size=0.3, mean=4.0)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        name = f"{module}.weight"
        weight = exact(plain.base[name])
        size = plain.merged[name].size - np.abs(weight)
        merged[name] = _decomposed(weight, plain.deltas[module], size, exact(magnitude), (1,))
    return replace(plain, tensors=tensors, deltas={}, merged=merged)


def _convolution(draw: Draw, weights: Draw, *, is_dora: bool) -> Sample:
    module, scale = "conv", 5 / RANK
    down, up = draw(RANK, 6, 3, 3, size=0.3), draw(8, RANK, 1, 1)
    weight = weights(8, 6, 3, 3)
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": down,
        f"{PREFIX}{module}.lora_B.weight": up,
    }
    delta, size = _product(scale, up, down)
    change = _added(weight, delta, size)
    if is_dora:
        magnitude = draw(1, 8, 1, 1, size=0.3, mean=4.0)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        stored = exact(weight)
        parts = (delta.reshape(stored.shape), size.reshape(stored.shape))
        change = _decomposed(stored, *parts, exact(magnitude), (1, 2, 3))
    config = _settings(lora_alpha=5, target_modules=[module], use_dora=is_dora)
    deltas = {} if is_dora else {module: delta}
    name = "dora-conv" if is_dora else "conv"
    return Sample(
        name, tensors, {f"{module}.weight": weight}, config, None, deltas, {"conv.weight": change}
    )


def conv(draw: Draw, weights: Draw) -> Sample:
    return _convolution(draw, weights, is_dora=False)


def dora_conv(draw: Draw, weights: Draw) -> Sample:
    return _convolution(draw, weights, is_dora=True)


def _transposed(draw: Draw, weights: Draw, *, is_dora: bool) -> Sample:
    """GPT-2's Conv1D, whose weight is ``(in, out)``."""
    module, scale = "h.0.attn.c_attn", 7 / RANK
    down, up = draw(RANK, 16), draw(24, RANK, size=0.3)
    weight = weights(16, 24)
    tensors = {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    delta, size = _product(scale, up, down)
    change = _added(weight, delta.T.copy(), size.T.copy())
    if is_dora:
        magnitude = draw(24, size=0.3, mean=4.0)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        change = _decomposed(exact(weight), delta.T, size.T, exact(magnitude), (0,))
    config = _settings(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=is_dora)
    return Sample(
        "dora-conv1d" if is_dora else "conv1d",
        tensors,
        {f"{module}.weight": weight},
        config,
        None,
        {} if is_dora else {module: delta},
        {f"{module}.weight": change},
    )


def conv1d(draw: Draw, weights: Draw) -> Sample:
    return _transposed(draw, weights, is_dora=False)


def dora_conv1d(draw: Draw, weights: Draw) -> Sample:
    return _transposed(draw, weights, is_dora=True)


def _embedding(draw: Draw, weights: Draw, *, is_dora: bool) -> Sample:
    module, scale = "embed_tokens", 7 / RANK
    down, up = draw(RANK, 30), draw(16, RANK, size=0.3)
    weight = weights(30, 16)
    tensors = {f"{PREFIX}{module}.lora_embedding_A": down, f"{PREFIX}{module}.lora_embedding_B": up}
    delta, size = _product(scale, up, down)
    change = _added(weight, delta.T.copy(), size.T.copy())
    if is_dora:
        magnitude = draw(16, size=0.3, mean=5.0)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        change = _decomposed(exact(weight), delta.T, size.T, exact(magnitude), (0,))
    config = _settings(target_modules=[module], use_dora=is_dora)
    return Sample(
        "dora-embedding" if is_dora else "embedding",
        tensors,
        {f"{module}.weight": weight},
        config,
        None,
        {} if is_dora else {module: delta},
        {f"{module}.weight": change},
    )


def embedding(draw: Draw, weights: Draw) -> Sample:
    return _embedding(draw, weights, is_dora=False)


def dora_embedding(draw: Draw, weights: Draw) -> Sample:
    return _embedding(draw, weights, is_dora=True)


def lora_bias(draw: Draw, weights: Draw) -> Sample:
    plain = _linear(draw, weights, "lora-bias", 7 / RANK, lora_bias=True)
    tensors, base, merged = dict(plain.tensors), dict(plain.base), dict(plain.merged)
    for module, (out, _) in SHAPES.items():
        added, bias = draw(out), weights(out)
        tensors[f"{PREFIX}{module}.lora_B.bias"] = added
        base[f"{module}.bias"] = bias
        delta = 7 / RANK * exact(added)
        merged[f"{module}.bias"] = _added(bias, delta, np.abs(delta))
    return replace(plain, tensors=tensors, base=base, merged=merged)


def experts(draw: Draw, weights: Draw) -> Sample:
    """A stacked parameter ``(experts, in, out)``; its factors hold all experts."""
    count, out, into = 3, 16, 24
    module, scale = "layers.0.mlp.experts", 7 / RANK
    down, up = draw(count * RANK, into), draw(out, count * RANK, size=0.3)
    weight = weights(count, into, out)
    downs = exact(down).reshape(count, RANK, into)
    ups = exact(up).reshape(out, RANK, count)
    delta = scale * np.einsum("ore,eri->eio", ups, downs)
    size = scale * np.einsum("ore,eri->eio", np.abs(ups), np.abs(downs))
    tensors = {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    config = _settings(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    name = f"{module}.down_proj"
    merged = {name: _added(weight, delta, size)}
    return Sample("experts", tensors, {name: weight}, config, None, {}, merged)


def _principal(draw: Draw, weights: Draw, kind: str) -> Sample:
    """What an initialisation took out of the base is taken out again before Δ is added."""
    plain = _linear(draw, weights, kind, 7 / RANK, init_lora_weights=kind)
    merged = {}
    for module in SHAPES:
        name = f"{module}.weight"
        weight = exact(plain.base[name])
        if kind == "pissa":
            left, values, right = np.linalg.svd(weight, full_matrices=False)
            taken = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
        else:
            left, right = np.linalg.qr(weight)
            taken = 7 / RANK * (left[:, :RANK] @ right[:RANK])
        value = weight - taken + plain.deltas[module]
        merged[name] = Change(value, plain.merged[name].size + np.abs(taken))
    return replace(plain, deltas={}, merged=merged)


def pissa(draw: Draw, weights: Draw) -> Sample:
    return _principal(draw, weights, "pissa")


def olora(draw: Draw, weights: Draw) -> Sample:
    return _principal(draw, weights, "olora")


def kasa(draw: Draw, weights: Draw) -> Sample:
    """``B diag(d) A`` on the base without its ``r`` smallest singular components."""
    plain = _linear(draw, weights, "kasa", 1.0, kasa_config={"beta": 1e-4, "gamma": 1e-3})
    tensors, merged = dict(plain.tensors), {}
    for module in SHAPES:
        values = tensors[f"{PREFIX}{module}.lora_diag"] = draw(RANK)
        up = exact(tensors[f"{PREFIX}{module}.lora_B.weight"])
        down = exact(values)[:, None] * exact(tensors[f"{PREFIX}{module}.lora_A.weight"])
        weight = exact(plain.base[f"{module}.weight"])
        left, sigma, right = np.linalg.svd(weight, full_matrices=False)
        kept = len(sigma) - RANK
        residual = (left[:, :kept] * sigma[:kept]) @ right[:kept]
        size = np.abs(weight) + 7 / RANK * (np.abs(up) @ np.abs(down))
        merged[f"{module}.weight"] = Change(residual + 7 / RANK * (up @ down), size)
    return replace(plain, tensors=tensors, deltas={}, merged=merged)


def peft_ia3(draw: Draw, weights: Draw) -> Sample:
    """``l ∘ W`` of outputs, the bias with them, or ``W ∘ l`` of the inputs of a feed-forward."""
    tensors, base, merged = {}, {}, {}
    for module, (out, into) in SHAPES.items():
        is_on_input = module == DOWN
        shape = (1, into) if is_on_input else (out, 1)
        factors = tensors[f"{PREFIX}{module}.ia3_l"] = draw(*shape, size=0.3, mean=1.0)
        weight, bias = weights(out, into), weights(out)
        base |= {f"{module}.weight": weight, f"{module}.bias": bias}
        value = exact(weight) * exact(factors)
        merged[f"{module}.weight"] = Change(value, np.abs(value))
        if not is_on_input:
            value = exact(bias) * exact(factors).reshape(-1)
            merged[f"{module}.bias"] = Change(value, np.abs(value))
    config = {"peft_type": "IA3", "target_modules": [Q, DOWN], "feedforward_modules": [DOWN]}
    return Sample("peft-ia3", tensors, base, config, None, {}, merged)


UNET = "lora_unet_mid_block_attentions_0_proj_in"
UNET_CONV = "lora_unet_mid_block_resnets_0_conv1"
UNET_PATHS: Final = {
    UNET: ("mid_block.attentions.0.proj_in", ()),
    UNET_CONV: ("mid_block.resnets.0.conv1", (3, 3)),
}
"""The modules that they are, and their kernels."""
ALPHA: Final = 3.0


def _kohya(name: str, module: str, tensors: Tensors, delta: Array) -> Sample:
    named = {f"{module}.{key}": value for key, value in tensors.items()}
    named[f"{module}.alpha"] = torch.tensor(ALPHA)
    return Sample(name, named, {}, None, None, {module: delta})


def kohya(draw: Draw, weights: Draw) -> Sample:
    down, up = draw(RANK, 32), draw(32, RANK, size=0.3)
    delta, _ = _product(ALPHA / RANK, up, down)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    return _kohya("kohya", UNET, tensors, delta)


def loha(draw: Draw, weights: Draw) -> Sample:
    """``(a₁ b₁) ∘ (a₂ b₂)``."""
    parts = {
        "hada_w1_a": draw(32, 2),
        "hada_w1_b": draw(2, 32),
        "hada_w2_a": draw(32, 2),
        "hada_w2_b": draw(2, 32),
    }
    one, other = (exact(parts[f"hada_w{i}_a"]) @ exact(parts[f"hada_w{i}_b"]) for i in (1, 2))
    return _kohya("loha", UNET, parts, ALPHA / 2 * one * other)


def loha_conv(draw: Draw, weights: Draw) -> Sample:
    """Tucker: ``w = Σ t[i, j] b[j] a[i]`` for both, and their product."""
    parts = {}
    made = []
    for i in (1, 2):
        core, first, second = draw(2, 2, 3, 3), draw(2, 12), draw(2, 8)
        parts |= {f"hada_t{i}": core, f"hada_w{i}_a": first, f"hada_w{i}_b": second}
        made.append(np.einsum("ijkl,jr,ip->prkl", exact(core), exact(second), exact(first)))
    delta = ALPHA / 2 * made[0] * made[1]
    return _kohya("loha-conv", UNET_CONV, parts, delta.reshape(12, -1))


def lokr(draw: Draw, weights: Draw) -> Sample:
    """``w₁ ⊗ (a b)``."""
    parts = {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(8, 2), "lokr_w2_b": draw(2, 8)}
    right = exact(parts["lokr_w2_a"]) @ exact(parts["lokr_w2_b"])
    return _kohya("lokr", UNET, parts, ALPHA / 2 * np.kron(exact(parts["lokr_w1"]), right))


def lokr_full(draw: Draw, weights: Draw) -> Sample:
    """Two whole matrices: LyCORIS scales those by one."""
    parts = {"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8)}
    return _kohya(
        "lokr-full", UNET, parts, np.kron(exact(parts["lokr_w1"]), exact(parts["lokr_w2"]))
    )


def cp(draw: Draw, weights: Draw) -> Sample:
    """A convolution in three factors."""
    down, mid, up = draw(RANK, 8, 1, 1), draw(RANK, RANK, 3, 3), draw(12, RANK, 1, 1)
    delta = np.einsum("oa,abkl,bi->oikl", *map(exact, (up.flatten(1), mid, down.flatten(1))))
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return _kohya("cp", UNET_CONV, parts, ALPHA / RANK * delta.reshape(12, -1))


def vera(draw: Draw, weights: Draw) -> Sample:
    """``diag(b) B diag(d) A`` with shared projections, cut to each module's size."""
    most_out, most_in = (max(shape[i] for shape in SHAPES.values()) for i in (0, 1))
    shared_a, shared_b = draw(RANK, most_in), draw(most_out, RANK)
    tensors = {"base_model.vera_A": shared_a, "base_model.vera_B": shared_b}
    base, deltas = {}, {}
    for module, (out, into) in SHAPES.items():
        rows, values = draw(out), draw(RANK)
        tensors[f"{PREFIX}{module}.vera_lambda_b"] = rows
        tensors[f"{PREFIX}{module}.vera_lambda_d"] = values
        base[f"{module}.weight"] = weights(out, into)
        left = exact(rows)[:, None] * exact(shared_b)[:out]
        deltas[module] = left @ (exact(values)[:, None] * exact(shared_a)[:, :into])
    config = {"peft_type": "VERA", "r": RANK, "target_modules": [Q, DOWN], "save_projection": True}
    return Sample("vera", tensors, base, config, None, deltas)


def _on_base(name: str, tensors: Tensors, weight: torch.Tensor, delta: Array) -> Sample:
    """A delta of LyCORIS that depends on the weight of one linear layer."""
    plain = _kohya(name, UNET, tensors, delta)
    return replace(plain, base={"mid_block.attentions.0.proj_in.weight": weight})


def oft(draw: Draw, weights: Draw) -> Sample:
    """Blocks of rows that are rotated: ``Rᵀ W - W``, ``R = (I + Q)(I - Q)⁻¹``; alpha is a limit."""
    blocks, weight = draw(4, 8, 8, size=0.1), weights(32, 32)
    values, stored = exact(blocks), exact(weight)
    skew = values - values.transpose(0, 2, 1)
    eye = np.eye(8)
    turned = [
        ((eye + q) @ np.linalg.inv(eye - q)).T @ rows
        for q, rows in zip(skew, stored.reshape(4, 8, 32), strict=True)
    ]
    return _on_base("oft", {"oft_blocks": blocks}, weight, np.concatenate(turned) - stored)


def boft(draw: Draw, weights: Draw) -> Sample:
    """Rotations of blocks of rows that lie apart, twice as far in each stage; ``R`` as in OFT."""
    stages, count, size = 2, 8, 4
    blocks, weight = draw(stages, count, size, size, size=0.1), weights(32, 32)
    stored = exact(weight)
    rows, eye = stored, np.eye(size)
    for stage, values in enumerate(exact(blocks)):
        distance = 2**stage * size // 2
        # Row i and the row a distance away are neighbours before they are cut into blocks.
        order = np.arange(32).reshape(-1, 2, distance).swapaxes(1, 2).reshape(-1)
        turned = [
            np.linalg.inv(eye - q) @ (eye + q) @ part
            for q, part in zip(
                values - values.transpose(0, 2, 1),
                rows[order].reshape(count, size, 32),
                strict=True,
            )
        ]
        rows = np.empty_like(rows)
        rows[order] = np.concatenate(turned)
    return _on_base("boft", {"oft_blocks": blocks}, weight, rows - stored)


def ia3(draw: Draw, weights: Draw) -> Sample:
    scale, weight = draw(32, 1, size=0.2), weights(32, 32)
    tensors = {"weight": scale, "on_input": torch.tensor(False)}
    return _on_base("ia3", tensors, weight, exact(scale) * exact(weight))


def glora(draw: Draw, weights: Draw) -> Sample:
    """``W a₁ a₂ + b₁ b₂``."""
    parts = {
        "a1.weight": draw(32, RANK, size=0.2),
        "a2.weight": draw(RANK, 32, size=0.2),
        "b1.weight": draw(32, RANK),
        "b2.weight": draw(RANK, 32, size=0.3),
    }
    weight = weights(32, 32)
    a1, a2, b1, b2 = map(exact, parts.values())
    delta = ALPHA / RANK * (exact(weight) @ a1 @ a2 + b1 @ b2)
    return _on_base("glora", parts, weight, delta)


WAN: Final = "diffusion_model.blocks.0"
"""Of ComfyUI's files; the base has the rest of the path."""


def _whole(name: str, added: Mapping[str, torch.Tensor], base: Tensors) -> Sample:
    """Stored tensors that are added to parameters of their shape, by the parameters' names.

    A factor pair of another module lies beside them, as in the files that have such tensors.
    """
    keys = {
        parameter: f"diffusion_model.{parameter.rpartition('.')[0]}.{role}"
        for parameter, role in ROLES[name].items()
    }
    tensors = {keys[parameter]: value for parameter, value in added.items()}
    merged = {n: _added(base[n], exact(v), np.abs(exact(v))) for n, v in added.items()}
    return Sample(name, tensors, base, None, None, {}, merged)


ROLES: Final = {
    "full": {"blocks.0.cross_attn.o.weight": "diff", "blocks.0.cross_attn.o.bias": "diff_b"},
    "norm": {"blocks.0.norm3.weight": "w_norm", "blocks.0.norm3.bias": "b_norm"},
    "modulation": {"blocks.0.modulation": "diff_m"},
}


def _with_factors(draw: Draw, weights: Draw, made: Sample) -> Sample:
    """Add the factors of one layer, by which a file is told to be an adapter's."""
    name = "blocks.0.self_attn.q"
    down, up, weight = draw(RANK, 24), draw(24, RANK, size=0.3), weights(24, 24)
    delta, size = _product(1.0, up, down)
    pair = {"lora_A.weight": down, "lora_B.weight": up}
    tensors = {f"diffusion_model.{name}.{key}": value for key, value in pair.items()}
    return replace(
        made,
        tensors=made.tensors | tensors,
        base=made.base | {f"{name}.weight": weight},
        merged={**made.merged, f"{name}.weight": _added(weight, delta, size)},
    )


def full(draw: Draw, weights: Draw) -> Sample:
    names = list(ROLES["full"])
    added = dict(zip(names, (draw(24, 16), draw(24)), strict=True))
    base = dict(zip(names, (weights(24, 16), weights(24)), strict=True))
    return _with_factors(draw, weights, _whole("full", added, base))


def norm(draw: Draw, weights: Draw) -> Sample:
    names = list(ROLES["norm"])
    base = {name: weights(24) for name in names}
    return _with_factors(draw, weights, _whole("norm", {n: draw(24) for n in names}, base))


def modulation(draw: Draw, weights: Draw) -> Sample:
    added, base = {f"{WAN[16:]}.modulation": draw(1, 6, 24)}, weights(1, 6, 24)
    made = _whole("modulation", added, dict.fromkeys(added, base))
    return _with_factors(draw, weights, made)


def replacement(draw: Draw, weights: Draw) -> Sample:
    """A parameter that is overwritten, under the module's name and under its own."""
    names = {"blocks.0.norm3.weight": "blocks.0.norm3", "blocks.0.scale": "blocks.0.scale"}
    base = {name: weights(24) for name in names}
    new = {name: draw(24) for name in names}
    tensors = {f"diffusion_model.{names[n]}.set_weight": value for n, value in new.items()}
    merged = {
        n: Change(exact(v), np.abs(exact(v)) + np.abs(exact(base[n]))) for n, v in new.items()
    }
    made = Sample("replacement", tensors, base, None, None, {}, merged)
    return _with_factors(draw, weights, made)


def diff_b(draw: Draw, weights: Draw) -> Sample:
    """A bias of its own beside a delta: no scale multiplies it."""
    made = _with_factors(draw, weights, Sample("diff-b", {}, {}))
    added, bias = draw(24), weights(24)
    merged = {
        **made.merged,
        "blocks.0.self_attn.q.bias": _added(bias, exact(added), np.abs(exact(added))),
    }
    tensors = {**made.tensors, f"{WAN}.self_attn.q.diff_b": added}
    base = {**made.base, "blocks.0.self_attn.q.bias": bias}
    return replace(made, tensors=tensors, base=base, merged=merged)


def _lycoris_dora(draw: Draw, weights: Draw, *, of_inputs: bool, kernel: tuple[int, ...]) -> Sample:
    """``dora_scale`` along either axis; with kernels norms run over these too."""
    module = UNET_CONV if kernel else UNET
    path = f"mid_block.{'resnets.0.conv1' if kernel else 'attentions.0.proj_in'}.weight"
    ones = (1,) * len(kernel)
    down, up = draw(RANK, 8, *kernel, size=0.3), draw(12, RANK, *ones)
    weight = weights(12, 8, *kernel)
    delta, size = _product(ALPHA / RANK, up, down)
    shape = (1, 8, *ones) if of_inputs else (12, 1, *ones)
    scale = draw(*shape, size=0.3, mean=4.0)
    axes = tuple(axis for axis, length in enumerate(shape) if length == 1)
    stored = exact(weight)
    parts = (delta.reshape(stored.shape), size.reshape(stored.shape))
    change = _decomposed(stored, *parts, exact(scale), axes)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}
    axis = "inputs" if of_inputs else "outputs"
    made = _kohya(f"dora-of-{axis}{'-conv' if kernel else ''}", module, tensors, delta)
    return replace(made, base={path: weight}, deltas={}, merged={path: change})


def dora_of_inputs(draw: Draw, weights: Draw) -> Sample:
    return _lycoris_dora(draw, weights, of_inputs=True, kernel=())


def dora_of_inputs_conv(draw: Draw, weights: Draw) -> Sample:
    return _lycoris_dora(draw, weights, of_inputs=True, kernel=(3, 3))


def dora_of_outputs_conv(draw: Draw, weights: Draw) -> Sample:
    return _lycoris_dora(draw, weights, of_inputs=False, kernel=(3, 3))


def control(draw: Draw, weights: Draw) -> Sample:
    """A layer that gets as many inputs again, zeros in the base's weight."""
    name, weight, bias = "diffusion_model.patch_embedding", weights(6, 4), weights(6)
    down, up, added = draw(RANK, 8), draw(6, RANK), draw(6)
    tensors = {
        f"{name}.lora_A.weight": down,
        f"{name}.lora_B.weight": up,
        f"{name}.diff_b": added,
        f"{name}.reshape_weight": torch.tensor([6, 8]),
    }
    base = {"patch_embedding.weight": weight, "patch_embedding.bias": bias}
    delta, size = _product(1.0, up, down)
    grown = torch.from_numpy(np.pad(exact(weight), ((0, 0), (0, 4))))
    merged = {
        "patch_embedding.weight": _added(grown, delta, size),
        "patch_embedding.bias": _added(bias, exact(added), np.abs(exact(added))),
    }
    return _with_factors(draw, weights, Sample("control", tensors, base, None, None, {}, merged))


Builder = Callable[[Draw, Draw], Sample]
MERGEABLE: Final[dict[str, Builder]] = {
    "lora": lora,
    "rslora": rslora,
    "patterns": patterns,
    "adalora": adalora,
    "dora": dora,
    "dora-conv": dora_conv,
    "dora-conv1d": dora_conv1d,
    "dora-embedding": dora_embedding,
    "conv": conv,
    "conv1d": conv1d,
    "embedding": embedding,
    "lora-bias": lora_bias,
    "experts": experts,
    "pissa": pissa,
    "olora": olora,
    "kasa": kasa,
    "peft-ia3": peft_ia3,
}
"""What ``merge`` takes."""
EXACT: Final[dict[str, Builder]] = {
    "loha": loha,
    "loha-conv": loha_conv,
    "lokr": lokr,
    "lokr-full": lokr_full,
    "cp": cp,
    "vera": vera,
}
"""What equals a plain LoRA of some rank."""
NEAREST: Final[dict[str, Builder]] = {"oft": oft, "boft": boft, "ia3": ia3, "glora": glora}
"""What depends on the base's weight."""
WHOLE: Final[dict[str, Builder]] = {
    "full": full,
    "norm": norm,
    "modulation": modulation,
    "replacement": replacement,
    "diff-b": diff_b,
}
"""What is added to whole parameters, or takes their place."""
LYCORIS_DORAS: Final[dict[str, Builder]] = {
    "dora-of-inputs": dora_of_inputs,
    "dora-of-inputs-conv": dora_of_inputs_conv,
    "dora-of-outputs-conv": dora_of_outputs_conv,
}
GROWING: Final[dict[str, Builder]] = {"control": control}
"""What is for a weight with more inputs than that of the base."""
VARIANTS: Final = MERGEABLE | EXACT | NEAREST | WHOLE | LYCORIS_DORAS | GROWING | {"kohya": kohya}


def sample(variant: str, dtype: str = "F32", base: str | None = None, seed: str = "") -> Sample:
    """Return a sample of ``variant`` with factors of ``dtype``, on a base of ``base``'s."""
    kind = base or ("F32" if dtype.startswith("F8") else dtype)
    return VARIANTS[variant](Draw(f"{variant} {seed}", dtype), Draw("base", kind))


def deltas_of(path: Path) -> dict[str, Array]:
    """Read a written adapter back: module to Δ, by suffixes alone.

    Knows the files of peft (one scale, anchored or bare patterns), kohya, mlx, and those without
    a scale: module-path, loralib (linear layers), transposed.
    """
    folder = path if path.is_dir() else path.parent
    weights = next(
        (
            folder / name
            for name in ("adapter_model.safetensors", "adapters.safetensors")
            if path.is_dir() and (folder / name).exists()
        ),
        path,
    )
    tensors = load_file(weights)
    config: dict[str, Any] = {}
    if path.is_dir() and (path / "adapter_config.json").exists():
        config = json.loads((path / "adapter_config.json").read_text())
    found = {}
    for key in tensors:
        for down_end, up_end, is_turned in ENDINGS:
            if not key.endswith(down_end):
                continue
            name = key.removesuffix(down_end)
            down = exact(tensors[key].flatten(1))
            up = exact(tensors[name + up_end].flatten(1))
            if is_turned(down, up):
                down, up = down.T, up.T
            module = name.removeprefix(PREFIX)
            alpha = tensors.get(f"{name}.alpha")
            scale = _scale(config, module, len(down))
            if alpha is not None:
                scale = float(alpha) / len(down)
            found[module] = scale * (up @ down)
    return found


def _is_plain(down: Array, up: Array) -> bool:
    return False


def _is_turned(down: Array, up: Array) -> bool:
    return True


def _looks_turned(down: Array, up: Array) -> bool:
    return down.shape[0] != up.shape[1]


ENDINGS: Final = (
    (".lora_A.weight", ".lora_B.weight", _is_plain),
    (".lora_embedding_A", ".lora_embedding_B", _is_plain),
    (".lora_down.weight", ".lora_up.weight", _is_plain),
    (".lora_a", ".lora_b", _is_turned),
    (".lora_A", ".lora_B", _looks_turned),
)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    if not config:
        return 1.0
    if "lora_parameters" in config:  # mlx
        return float(config["lora_parameters"]["scale"])
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if module == plain or module.endswith(f".{plain}"):
            alpha = float(value)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
