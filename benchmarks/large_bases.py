"""Bases too large for a machine, as sparse files: headers that are true, and no data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.files.safetensors import canonical_order, format_header
from loratool.files.spec import TensorSpec
from loratool.plan.model import ModelPlan
from loratool.shards.job import Job
from loratool.shards.model import model_job
from loratool.shards.roots import Roots
from loratool.verbs.merging.planning import plan_merge

__all__ = ["LARGE_BASES", "LargeBase", "job_of", "make_large"]

HIDDEN: Final = 7168
WIDTH: Final = 2048
BLOCK: Final = 128
RANK: Final = 8
MODULES: Final = 3000
"""About how many modules the adapters are on."""
ATTENTION: Final = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512),
    "o_proj": (HIDDEN, 16384),
}
EXPERT: Final = {
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}
"""The projections of a layer of DeepSeek-V3, outputs and inputs."""


@dataclass(frozen=True)
class LargeBase:
    """A base as it is published.

    Attributes:
        name: What tables call it.
        shards: Yields the tensors of each file.
        coded: Whether it is in FP8 with blocks, as DeepSeek-V3 is.
    """

    name: str
    shards: Callable[[], Iterator[list[TensorSpec]]]
    coded: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """What a merge into it is given."""
        return ("--quantized", "keep") if self.coded else ()


def _deepseek(dtype: str) -> Iterator[TensorSpec]:
    """Yield the weights of 61 layers, 58 of them with 256 experts and a shared one."""
    yield TensorSpec("model.embed_tokens.weight", "BF16", (129280, HIDDEN))
    for layer in range(61):
        place = f"model.layers.{layer}"
        for leaf, shape in ATTENTION.items():
            yield TensorSpec(f"{place}.self_attn.{leaf}.weight", dtype, shape)
        for norm, size in (("q_a_layernorm", 1536), ("kv_a_layernorm", 512)):
            yield TensorSpec(f"{place}.self_attn.{norm}.weight", "BF16", (size,))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(f"{place}.{norm}.weight", "BF16", (HIDDEN,))
        if layer < 3:
            for leaf, (out, into) in EXPERT.items():
                shape = tuple(18432 if size == WIDTH else size for size in (out, into))
                yield TensorSpec(f"{place}.mlp.{leaf}.weight", dtype, shape)
            continue
        yield TensorSpec(f"{place}.mlp.gate.weight", "BF16", (256, HIDDEN))
        for expert in (*(f"experts.{n}" for n in range(256)), "shared_experts"):
            for leaf, shape in EXPERT.items():
                yield TensorSpec(f"{place}.mlp.{expert}.{leaf}.weight", dtype, shape)
    yield TensorSpec("model.norm.weight", "BF16", (HIDDEN,))
    yield TensorSpec("lm_head.weight", "BF16", (129280, HIDDEN))


def _with_scales(specs: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    for spec in specs:
        yield spec
        if spec.dtype == "F8_E4M3":
            shape = tuple(-(-size // BLOCK) for size in spec.shape)
            yield TensorSpec(f"{spec.name}_scale_inv", "F32", shape)


def _cut(specs: Iterable[TensorSpec], sizes: Iterator[float]) -> Iterator[list[TensorSpec]]:
    """Yield as many tensors at a time as fill a file of a size."""
    some: list[TensorSpec] = []
    filled, size = 0, next(sizes)
    for spec in specs:
        if some and filled + spec.nbytes > size:
            yield some
            some, filled, size = [], 0, next(sizes)
        some.append(spec)
        filled += spec.nbytes
    yield some


def _equal(size: float) -> Iterator[float]:
    while True:
        yield size


def _experts(sizes: Sequence[float]) -> Iterator[list[TensorSpec]]:
    """Yield files of these sizes, filled with experts' projections in bfloat16."""
    number = 0
    for size in sizes:
        some: list[TensorSpec] = []
        filled = 0
        while not some or filled + some[-1].nbytes <= size:
            layer, rest = divmod(number, 256 * len(EXPERT))
            expert, leaf = divmod(rest, len(EXPERT))
            name, shape = list(EXPERT.items())[leaf]
            place = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
            some.append(TensorSpec(place, "BF16", shape))
            filled += some[-1].nbytes
            number += 1
        yield some


def _uneven() -> list[float]:
    sizes = random.Random(0)
    return [sizes.uniform(0.3e9, 4.7e9) for _ in range(400)]


LARGE_BASES: Final = {
    base.name: base
    for base in (
        LargeBase(
            "163 x 4.3 GB",
            lambda: _cut(_with_scales(_deepseek("F8_E4M3")), _equal(4.2e9)),
            coded=True,
        ),
        LargeBase("163 x 8.3 GB", lambda: _cut(_deepseek("BF16"), _equal(8.25e9))),
        LargeBase("62 x 16 GB", lambda: _experts([16e9] * 62)),
        LargeBase("1,000 x 1 GB", lambda: _experts([1e9] * 1000)),
        LargeBase("400 x 0.3 to 4.7 GB", lambda: _experts(_uneven())),
    )
}


def make_large(folder: Path, base: LargeBase) -> tuple[Path, Path, int]:
    """Write a base and an adapter for it; return both, and how many tensors the base has."""
    shards = list(base.shards())
    model, adapter = folder / "base", folder / "adapter"
    model.mkdir(parents=True)
    adapter.mkdir()
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_sparse(model / name, canonical_order(specs))
        weight_map.update((spec.name, name) for spec in specs)
    _write_json(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config: dict[str, Any] = {"model_type": "deepseek_v3", "hidden_size": HIDDEN}
    if base.coded:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    _write_json(model / "config.json", config)
    leaves = _write_adapter(adapter, [spec for specs in shards for spec in specs])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": leaves}
    _write_json(adapter / "adapter_config.json", config)
    return model, adapter, len(weight_map)


def _write_adapter(folder: Path, specs: Sequence[TensorSpec]) -> list[str]:
    """Write factors for all attention and so many experts; return what they are called."""
    weights = [s for s in specs if s.name.endswith(("proj.weight", "_mqa.weight"))]
    attention = [spec for spec in weights if ".self_attn." in spec.name]
    experts = [spec for spec in weights if ".experts." in spec.name]
    every = max(1, len(experts) // (MODULES - len(attention)))
    factors = []
    chosen = attention + experts[::every]
    for spec in chosen:
        key = f"base_model.model.{spec.name.removesuffix('.weight')}"
        out, into = spec.shape
        factors.append(TensorSpec(f"{key}.lora_A.weight", "BF16", (RANK, into)))
        factors.append(TensorSpec(f"{key}.lora_B.weight", "BF16", (out, RANK)))
    _write_sparse(folder / "adapter_model.safetensors", canonical_order(factors))
    return sorted({spec.name.split(".")[-2] for spec in chosen})


def _write_sparse(path: Path, specs: Sequence[TensorSpec]) -> None:
    header = format_header(specs, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def job_of(base: LargeBase, model: Path, adapter: Path, output: Path) -> tuple[ModelPlan, Job]:
    """Return the plan of the merge, and the parts that the command would make of it."""
    plan = plan_merge(
        model, [adapter], quantized="keep" if base.coded else "dequantize", output=output
    )
    roots = Roots.of({"base": model, "adapter 0": adapter})
    return plan, model_job(plan, output, roots, told={})
