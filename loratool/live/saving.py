"""Write an adapter of a live model through the same plans and schemes as any other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter.model import Kind
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.files.dtypes import dtype_named
from loratool.live.factors import Factors
from loratool.live.kinds import LayerKind
from loratool.names.paths.dotted import from_paths
from loratool.plan.history import History
from loratool.plan.plan import write as write_plan
from loratool.values.expr import Expr, Held
from loratool.variants import variant_named
from loratool.verbs.algebra.combination import output_scheme
from loratool.write.adapter import NewAdapter
from loratool.write.options import WriteOptions
from loratool.write.write import write

if TYPE_CHECKING:
    from torch import Tensor

    from loratool.live.control import Live

__all__ = ["save"]


def save(
    live: Live, name: str, output: Path, *, to: str, base_model: str | None, force: bool
) -> None:
    """Write the adapter ``name``; see :meth:`Live.save`."""
    layers = {
        path: (layer.kind, factors)
        for path, layer in live.layers()
        if (factors := layer.factors(name)) is not None
    }
    names = from_paths(list(layers))
    is_dora = any(factors.magnitude is not None for _, factors in layers.values())
    new = NewAdapter(
        parts=tuple(_part(path, kind, factors) for path, (kind, factors) in layers.items()),
        config={},
        config_changes=_changes(layers, base_model, is_dora=is_dora)
        | _targets(list(layers), [path for path, _ in live.layers_and_modules()]),
        family=names.family,
        components=names.components,
        is_native=names.is_native,
        history=History("live", (), {"name": name}),
    )
    plan = write(new, output_scheme((), to), WriteOptions(output))
    write_plan(plan, output, inputs=(), force=force)


def _targets(wanted: list[str], paths: list[str]) -> dict[str, Any]:
    """Return the targets as an expression where a list would mean other modules too."""
    endings = tuple(f".{path}" for path in wanted)
    if not any(path.endswith(endings) and path not in wanted for path in paths):
        return {}
    return {"target_modules": "|".join(re.escape(path) for path in wanted)}


def _part(path: str, kind: LayerKind, factors: Factors) -> Part:
    delta = factors.delta()
    if delta.rank == 0:
        raise UnsupportedError(path, "has no rank")
    is_embedding = kind.kind is Kind.EMBEDDING
    low, high = (Slot.EMBEDDING_DOWN, Slot.EMBEDDING_UP) if is_embedding else (Slot.DOWN, Slot.UP)
    into = tuple(factors.down.shape[1:])
    ones = (1,) * (len(into) - 1)
    values: dict[Slot, Expr] = {
        low: _held(delta.down, (delta.rank, *into)),
        high: _held(delta.up, (delta.shape[0], delta.rank, *ones)),
    }
    if factors.bias is not None:
        values[Slot.UP_BIAS] = _held(factors.bias, tuple(factors.bias.shape))
    if factors.magnitude is not None:
        values[Slot.MAGNITUDE] = _held(factors.magnitude, tuple(factors.magnitude.shape))
    return Part(
        module=path,
        kind=kind.kind,
        variant=variant_named("dora" if factors.magnitude is not None else "lora"),
        values=values,
        rank=delta.rank,
        scale=delta.scale,
        alpha=None,
    )


def _held(tensor: Tensor, shape: tuple[int, ...]) -> Held:
    dtype = dtype_named(str(tensor.dtype).removeprefix("torch."))
    assert dtype is not None

    def read() -> Any:
        return tensor.detach().cpu().double().numpy()

    return Held(read, shape, dtype.name)


def _changes(
    layers: dict[str, tuple[LayerKind, Factors]], base_model: str | None, *, is_dora: bool
) -> dict[str, Any]:
    dropouts = Counter(getattr(factors.dropout, "p", 0.0) for _, factors in layers.values())
    linear = [kind for kind, _ in layers.values() if kind.kind is Kind.LINEAR]
    return {
        "base_model_name_or_path": base_model,
        "use_dora": is_dora,
        "lora_dropout": dropouts.most_common(1)[0][0],
        "fan_in_fan_out": bool(linear) and all(kind.is_transposed for kind in linear),
    }
