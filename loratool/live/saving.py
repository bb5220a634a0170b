"""Write an adapter of a live model through the same plans and schemes as any other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loratool.adapter.model import Kind
from loratool.adapter.saving import OutputSite, lora_config, site_key, site_specs
from loratool.adapter.scheme import KeyScheme
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.files.atomic import check_output, staged
from loratool.files.dtypes import dtype_named
from loratool.files.inputs import InputFiles
from loratool.files.spec import TensorSpec
from loratool.live.factors import Factors
from loratool.live.kinds import LayerKind
from loratool.ops.algebra.joining import Joint
from loratool.ops.algebra.plan import WEIGHTS_NAME, AdapterPlan, ModuleJob
from loratool.ops.algebra.planning import check_place, output_scheme
from loratool.ops.algebra.provenance import history_metadata
from loratool.ops.algebra.writing import TensorWriter, fill_adapter
from loratool.ops.conversion.through import through

if TYPE_CHECKING:
    from loratool.live.control import Live

__all__ = ["save"]


def save(
    live: Live, name: str, output: Path, *, to: str, base_model: str | None, force: bool
) -> None:
    """Write the adapter ``name``; see :meth:`Live.save`."""
    with through(output_scheme((), to), output, inputs=(), force=force, dry_run=False) as way:
        _save(live, name, way.place, scheme=way.scheme, base_model=base_model, force=force)


def _save(
    live: Live, name: str, output: Path, *, scheme: KeyScheme, base_model: str | None, force: bool
) -> None:
    has_config = scheme.name == "peft"
    check_place(output, scheme.name, has_config=has_config)
    check_output(output, force=force, inputs=())
    parts = {
        path: (layer.kind, factors)
        for path, layer in live.layers()
        if (factors := layer.factors(name)) is not None
    }
    jobs = [_job(path, kind, factors, scheme) for path, (kind, factors) in parts.items()]
    is_dora = any(factors.magnitude is not None for _, factors in parts.values())
    config = None
    if has_config:
        config = lora_config(
            {},
            [job.output for job in jobs],
            keep_targets=False,
            changes=_changes(parts, base_model, is_dora=is_dora)
            | _targets(list(parts), [path for path, _ in live.layers_and_modules()]),
        )
    plan = AdapterPlan(
        jobs=tuple(jobs),
        carried=(),
        metadata=history_metadata("live", [], {"name": name}),
        config=config,
        sidecars=(),
        weights_name="" if output.suffix.lower() == ".safetensors" else WEIGHTS_NAME,
        stamps={},
    )

    def fill(writer: TensorWriter) -> None:
        for job in jobs:
            _write(job, parts[job.joint.name][1], writer)

    with staged(output, folder=plan.is_folder, force=force, sync=True) as place:
        fill_adapter(plan, place, InputFiles({}), fill)


def _targets(wanted: list[str], paths: list[str]) -> dict[str, Any]:
    """Return the targets as an expression where a list would mean other modules too."""
    endings = tuple(f".{path}" for path in wanted)
    if not any(path.endswith(endings) and path not in wanted for path in paths):
        return {}
    return {"target_modules": "|".join(re.escape(path) for path in wanted)}


def _job(path: str, kind: LayerKind, factors: Factors, scheme: KeyScheme) -> ModuleJob:
    delta = factors.delta()
    if delta.rank == 0:
        raise UnsupportedError(path, "has no rank")
    dtype = dtype_named(str(delta.down.dtype).removeprefix("torch."))
    assert dtype is not None
    into = tuple(factors.down.shape[1:])
    output = OutputSite(
        module=path,
        kind=kind.kind,
        rank=delta.rank,
        alpha=delta.scale * delta.rank,
        dtype=dtype.name,
        out=delta.shape[0],
        into=into,
        pattern_path=path,
        has_bias=factors.bias is not None,
    )
    is_plain = scheme.name != "peft"
    specs = site_specs(scheme, output, with_alpha=is_plain)
    if factors.magnitude is not None:
        key = site_key(scheme, output, Slot.MAGNITUDE)
        shape: tuple[int, ...] = tuple(factors.magnitude.shape)
        if kind.kind is Kind.CONV:
            shape = (1, *shape, *[1] * (len(into) - 1))
        specs[Slot.MAGNITUDE] = TensorSpec(key, dtype.name, shape)
    return ModuleJob(Joint(path, (), output), output, specs, "live")


def _write(job: ModuleJob, factors: Factors, writer: TensorWriter) -> None:
    delta = factors.delta()
    values = {
        Slot.DOWN: delta.down,
        Slot.EMBEDDING_DOWN: delta.down,
        Slot.UP: delta.up,
        Slot.EMBEDDING_UP: delta.up,
        Slot.UP_BIAS: factors.bias,
        Slot.MAGNITUDE: factors.magnitude,
        Slot.ALPHA: torch.tensor(job.output.alpha),
    }
    for slot, spec in job.specs.items():
        value = values[slot]
        assert value is not None
        writer.write(spec, value)


def _changes(
    parts: dict[str, tuple[LayerKind, Factors]], base_model: str | None, *, is_dora: bool
) -> dict[str, Any]:
    dropouts = Counter(getattr(factors.dropout, "p", 0.0) for _, factors in parts.values())
    linear = [kind for kind, _ in parts.values() if kind.kind is Kind.LINEAR]
    return {
        "base_model_name_or_path": base_model,
        "use_dora": is_dora,
        "lora_dropout": dropouts.most_common(1)[0][0],
        "fan_in_fan_out": bool(linear) and all(kind.is_transposed for kind in linear),
    }
