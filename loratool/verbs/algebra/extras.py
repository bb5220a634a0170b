"""What travels beside the deltas, where several adapters may disagree about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratool.adapter.model import Adapter, Extra, ExtraKind
from loratool.adapter.patterns import matches_target
from loratool.adapter.saved import is_listed
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor
from loratool.values.arrays import decode
from loratool.values.expr import Expr, Mean, Stored, computed_dtype
from loratool.write.extras import Extras, NewExtra

__all__ = ["POLICIES", "gather_extras"]

POLICIES: Final = ("error", "first", "last", "average")


def gather_extras(adapters: Sequence[Adapter], *, policy: str = "error") -> Extras:
    """Decide what becomes of every extra of ``adapters``.

    Args:
        adapters: The adapters, in order.
        policy: One of ``POLICIES``: what to do where two adapters bring different values.

    Raises:
        AdapterError: They disagree, and the policy is ``error``.
        UnsupportedError: No adapter can hold what they bring together.
    """
    result = Extras()
    owners: dict[tuple[str, ExtraKind], list[tuple[Adapter, Extra]]] = {}
    for adapter in adapters:
        for extra in adapter.extras:
            if extra.kind is ExtraKind.STATE:
                result.dropped.append((extra.key, "only training needs it"))
            else:
                owners.setdefault((extra.name, extra.kind), []).append((adapter, extra))
    _check_conflicts(adapters, owners)
    token_indices: dict[str, list[int]] = {}
    for (name, kind), owner in owners.items():
        if kind is ExtraKind.ROWS:
            value, token_indices[name] = _rows(name, owner, policy)
        else:
            value = _whole(name, owner, policy)
        result.items.append(NewExtra(name, kind, value, owner[0][1].key))
        if len(adapters) > len(owner):
            result.notes.append(f"{name!r} is brought by {len(owner)} of {len(adapters)} adapters")
    if len(adapters) > 1 or adapters[0].config is None:
        result.config |= _config(adapters, token_indices)
    return result


def _check_conflicts(
    adapters: Sequence[Adapter], owners: Mapping[tuple[str, ExtraKind], list[tuple[Adapter, Extra]]]
) -> None:
    """Refuse what PEFT cannot apply to one module at a time: a delta, saved weights, rows.

    Raises:
        UnsupportedError: Two adapters treat one module in different ways.
    """
    ways: dict[str, dict[str, Adapter]] = {}
    for adapter in adapters:
        for site in adapter.sites:
            ways.setdefault(site.module, {}).setdefault("a delta", adapter)
    for (name, kind), owner in owners.items():
        module, _, leaf = name.rpartition(".")
        for adapter, _ in owner:
            if kind is ExtraKind.ROWS:
                ways.setdefault(name, {}).setdefault("trained rows", adapter)
            elif kind is ExtraKind.FULL and (leaf != "bias" or is_listed(adapter, module)):
                ways.setdefault(module, {}).setdefault("saved weights", adapter)
    for module, found in ways.items():
        if len({id(adapter) for adapter in found.values()}) > 1:
            words = " and ".join(f"{way} in {adapter.path}" for way, adapter in found.items())
            raise UnsupportedError(
                module,
                f"has {words}; no adapter can have both",
                hint="leave one out with --skip, or merge one of the adapters first",
            )


def _whole(name: str, owners: Sequence[tuple[Adapter, Extra]], policy: str) -> Expr:
    if len({id(adapter) for adapter, _ in owners}) < len(owners):
        keys = " and ".join(repr(extra.key) for _, extra in owners)
        raise AdapterError(f"{owners[0][0].path}: {name}", f"{keys} mean the same parameter")
    chosen = _choose(name, owners, policy) or [extra.tensor for _, extra in owners]
    if len(chosen) == 1:
        return Stored(chosen[0])
    shapes = {tensor.spec.shape for tensor in chosen}
    if len(shapes) > 1:
        raise AdapterError(name, f"has different shapes: {', '.join(map(str, shapes))}")
    return Mean(tuple(map(Stored, chosen)), (), computed_dtype([t.spec.dtype for t in chosen]))


def _choose(
    name: str, owners: Sequence[tuple[Adapter, Extra]], policy: str
) -> list[StoredTensor] | None:
    """Return the one tensor to take, or ``None`` for the mean of all."""
    tensors = [extra.tensor for _, extra in owners]
    if policy == "last":
        return tensors[-1:]
    if policy == "first" or all(_same(tensors[0], other) for other in tensors[1:]):
        return tensors[:1]
    if policy == "average":
        return None
    paths = " and ".join(str(adapter.path) for adapter, _ in owners)
    raise AdapterError(
        name,
        f"{paths} bring different values for it, and it is not a delta that could be added up",
        hint="choose with --extras first, last or average",
    )


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.spec.shape != other.spec.shape:
        return False
    if one.spec.dtype == other.spec.dtype:
        return read_bytes(one) == read_bytes(other)
    return bool((decode(one) == decode(other)).all())


def _rows(
    name: str, owners: Sequence[tuple[Adapter, Extra]], policy: str
) -> tuple[Expr, list[int]]:
    """Return the union of the trained rows of an embedding, and their indices."""
    places: dict[int, list[tuple[int, int]]] = {}
    tensors = [extra.tensor for _, extra in owners]
    widths = {tensor.spec.shape[1:] for tensor in tensors}
    if len(widths) > 1:
        raise AdapterError(name, f"trained rows of different sizes: {', '.join(map(str, widths))}")
    for number, (adapter, extra) in enumerate(owners):
        indices = _indices(adapter, extra)
        for position, index in enumerate(indices):
            places.setdefault(index, []).append((number, position))
    order = list(places) if len(owners) == 1 else sorted(places)
    rows = []
    for index in order:
        candidates = places[index]
        if policy == "last":
            candidates = candidates[-1:]
        elif policy == "first" or _same_rows(tensors, candidates):
            candidates = candidates[:1]
        elif policy == "error":
            raise AdapterError(
                name,
                f"the adapters bring different values for token {index}",
                hint="choose with --extras first, last or average",
            )
        rows.append(tuple(candidates))
    if len(owners) == 1:
        return Stored(tensors[0]), order
    dtype = computed_dtype([tensor.spec.dtype for tensor in tensors])
    return Mean(tuple(map(Stored, tensors)), tuple(rows), dtype), order


def _same_rows(tensors: Sequence[StoredTensor], places: Sequence[tuple[int, int]]) -> bool:
    if len(places) == 1:
        return True
    values = [decode(tensors[number])[position] for number, position in places]
    return all(bool((values[0] == other).all()) for other in values[1:])


def _indices(adapter: Adapter, extra: Extra) -> Sequence[int]:
    value = adapter.field("trainable_token_indices")
    if isinstance(value, dict):
        value = next((v for k, v in value.items() if matches_target((k,), extra.name)), None)
    count = extra.tensor.spec.shape[0] if extra.tensor.spec.shape else 0
    is_list = isinstance(value, list) and all(type(index) is int for index in value)
    if not is_list or len(value) != count:
        raise AdapterError(
            f"{adapter.path}: {extra.key}",
            "holds trained token rows, but trainable_token_indices does not say which",
        )
    assert isinstance(value, list)
    return value


def _config(
    adapters: Sequence[Adapter], token_indices: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return the fields that say what the extras of several adapters are."""
    saved = [name for a in adapters if a.config for name in a.config.modules_to_save]
    kinds = {str(adapter.field("bias") or "none") for adapter in adapters}
    is_tied = all(adapter.field("ensure_weight_tying") for adapter in adapters)
    for adapter in adapters:
        if adapter.config is None or (adapter.field("ensure_weight_tying") and not is_tied):
            # Nothing says what is saved, or a tie did that holds no more.
            whole = [extra.name for extra in adapter.extras if extra.kind is ExtraKind.FULL]
            modules = {name.rpartition(".")[0] for name in whole if not name.endswith(".bias")}
            saved += sorted(m for m in modules if m and not is_listed(adapter, m))
            alone = {name.rpartition(".")[0] for name in whole} - modules
            if adapter.config is None and alone:
                kinds.add("all")
    found: dict[str, Any] = {
        "modules_to_save": list(dict.fromkeys(saved)) or None,
        "bias": next((kind for kind in ("all", "lora_only") if kind in kinds), "none"),
    }
    if token_indices:
        fields = [adapter.field("trainable_token_indices") for adapter in adapters]
        is_list = all(isinstance(value, list) for value in fields if value is not None)
        if is_list and len(token_indices) == 1:
            found["trainable_token_indices"] = list(next(iter(token_indices.values())))
        else:
            found["trainable_token_indices"] = {
                name: list(rows) for name, rows in token_indices.items()
            }
    return found
