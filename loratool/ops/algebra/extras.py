"""What travels beside the deltas, where several adapters may disagree about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.adapter.model import Adapter, Extra, ExtraKind
from loratool.adapter.patterns import matches_target
from loratool.adapter.saving import OutputSite
from loratool.adapter.scheme import KeyScheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.ops.algebra.joining import output_dtype

__all__ = ["POLICIES", "Carried", "Extras", "gather_extras"]

POLICIES: Final = ("error", "first", "last", "average")


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor of the output that is no delta.

    Attributes:
        spec: What is written.
        sources: What it comes from: the one tensor, or all that are averaged.
        rows: For rows of an embedding: for each row written, which rows of which tensors of
            ``sources`` it is the mean of.
        factor: What the values are multiplied by.
        constant: The one value of a scalar that does not come from a tensor.
    """

    spec: TensorSpec
    sources: tuple[StoredTensor, ...]
    rows: tuple[tuple[tuple[int, int], ...], ...] = ()
    factor: float = 1.0
    constant: float | None = None


@dataclass
class Extras:
    """All of them, and what the configuration has to say about them.

    Attributes:
        carried: The tensors.
        config: Fields of the configuration.
        notes: What a user should know.
        dropped: Keys that are not written, with the reason.
    """

    carried: list[Carried] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)


def gather_extras(
    adapters: Sequence[Adapter],
    sites: Sequence[OutputSite],
    scheme: KeyScheme,
    *,
    policy: str,
    dtype: str | None = None,
) -> Extras:
    """Decide what becomes of every extra of ``adapters``.

    Args:
        adapters: The adapters, in order.
        sites: The modules that are written; a bias of one is named after its base layer.
        scheme: How keys are named.
        policy: One of ``POLICIES``: what to do where two adapters bring different values.
        dtype: The dtype to write all floats in, or ``None`` for the one they have.

    Raises:
        AdapterError: They disagree, and the policy is ``error``.
        UnsupportedError: The scheme has no name for one of them.
    """
    result = Extras()
    owners: dict[tuple[str, ExtraKind], list[tuple[Adapter, Extra]]] = {}
    for adapter in adapters:
        for extra in adapter.extras:
            if extra.kind is ExtraKind.STATE:
                result.dropped.append((extra.key, "only training needs it"))
            else:
                owners.setdefault((extra.name, extra.kind), []).append((adapter, extra))
    adapted = {site.module for site in sites}
    _check_conflicts(adapters, owners)
    token_indices: dict[str, list[int]] = {}
    for (name, kind), owner in owners.items():
        if kind is ExtraKind.ROWS:
            carried, indices = _rows(name, owner, scheme, policy, dtype)
            result.carried.append(carried)
            token_indices[name] = indices
        else:
            key = _key(owner[0][1], adapted, scheme)
            result.carried.append(_whole(key, name, owner, policy, dtype))
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
            elif kind is ExtraKind.FULL and (leaf != "bias" or _is_saved(adapter, module)):
                ways.setdefault(module, {}).setdefault("saved weights", adapter)
    for module, found in ways.items():
        if len({id(adapter) for adapter in found.values()}) > 1:
            words = " and ".join(f"{way} in {adapter.path}" for way, adapter in found.items())
            raise UnsupportedError(
                module,
                f"has {words}; no adapter can have both",
                hint="leave one out with --skip, or merge one of the adapters first",
            )


def _is_saved(adapter: Adapter, module: str) -> bool:
    names = adapter.config.modules_to_save if adapter.config else ()
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in names)


def _key(extra: Extra, adapted: set[str], scheme: KeyScheme) -> str:
    """Return the name of a whole tensor: under ``base_layer`` where its module is adapted."""
    module, _, leaf = extra.name.rpartition(".")
    if extra.kind is ExtraKind.BASE_COPY:
        wrapper = ".token_adapter" if ".token_adapter." in extra.key else ""
        return f"{scheme.prefix}{module}{wrapper}.base_layer.{leaf}"
    if leaf == "bias" and module in adapted:
        return f"{scheme.prefix}{module}.base_layer.{leaf}"
    return f"{scheme.prefix}{extra.name}"


def _whole(
    key: str,
    name: str,
    owners: Sequence[tuple[Adapter, Extra]],
    policy: str,
    dtype: str | None,
) -> Carried:
    if len({id(adapter) for adapter, _ in owners}) < len(owners):
        keys = " and ".join(repr(extra.key) for _, extra in owners)
        raise AdapterError(f"{owners[0][0].path}: {name}", f"{keys} mean the same parameter")
    tensors = [extra.tensor for _, extra in owners]
    chosen = _choose(name, owners, policy)
    written = _dtype([tensor.spec.dtype for tensor in (chosen or tensors)], dtype)
    shapes = {tensor.spec.shape for tensor in (chosen or tensors)}
    if len(shapes) > 1:
        raise AdapterError(name, f"has different shapes: {', '.join(map(str, shapes))}")
    return Carried(TensorSpec(key, written, shapes.pop()), tuple(chosen or tensors))


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


def _dtype(dtypes: Sequence[str], wanted: str | None) -> str:
    common = output_dtype(dtypes)
    return wanted if wanted is not None and DTYPES[common].is_float else common


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.spec.shape != other.spec.shape:
        return False
    if one.spec.dtype == other.spec.dtype:
        return read_bytes(one) == read_bytes(other)
    from loratool.ops.tensors import read_tensor

    return bool((read_tensor(one).double() == read_tensor(other).double()).all())


def _rows(
    name: str,
    owners: Sequence[tuple[Adapter, Extra]],
    scheme: KeyScheme,
    policy: str,
    dtype: str | None,
) -> tuple[Carried, list[int]]:
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
    try:
        key = scheme.format(AdapterKey(name, Slot.ROWS))
    except KeyError:
        raise UnsupportedError(
            name,
            f"the scheme {scheme.name!r} has no name for trained token rows",
            hint="write another scheme with --to, such as --to peft",
        ) from None
    written = _dtype([tensor.spec.dtype for tensor in tensors], dtype)
    spec = TensorSpec(key, written, (len(order), *widths.pop()))
    if len(owners) == 1:
        return Carried(spec, tuple(tensors)), order
    return Carried(spec, tuple(tensors), tuple(rows)), order


def _same_rows(tensors: Sequence[StoredTensor], places: Sequence[tuple[int, int]]) -> bool:
    if len(places) == 1:
        return True
    from loratool.ops.tensors import read_tensor

    values = [read_tensor(tensors[number])[position].double() for number, position in places]
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
            saved += sorted(m for m in modules if m and not _is_saved(adapter, m))
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
