"""What travels with an adapter beside its deltas: saved modules, biases, token rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Adapter, Extra, ExtraKind
from loratool.adapter.patterns import matches_target
from loratool.adapter.saved import is_listed
from loratool.base.model import Model
from loratool.errors import AdapterError, BaseModelError, MissingModuleError
from loratool.names.tied import EMBEDDING_LEAVES, HEAD_LEAVES, INNER_HEADS
from loratool.plan.model import Blend, SetRows
from loratool.verbs.merging.context import Share
from loratool.verbs.merging.saved import place_of_saved, plan_cut

__all__ = ["plan_extra", "plan_extras"]

IMPLICIT_HEADS: Final = frozenset(
    ("classifier", "score", "qa_outputs", "pre_classifier", "classification_head")
)
"""Heads that PEFT saves for classification tasks without listing them."""

LOGITS_BIAS: Final = "final_logits_bias"
"""A buffer of BART and its relatives, which no adapter holds."""


def plan_extras(share: Share, base: Model) -> None:
    """Add what the extras of an adapter change to ``share``.

    Args:
        share: The adapter's part; filled in.
        base: The base.

    Raises:
        BaseModelError: A tensor has no place in the base.
        AdapterError: A tensor contradicts the configuration.
    """
    state = [extra.key for extra in share.adapter.extras if extra.kind is ExtraKind.STATE]
    if state:
        share.notes.append(
            f"{len(state)} tensors that only training needs were not used, such as {state[0]!r}"
        )
    in_turn = {ExtraKind.FULL: 0, ExtraKind.BASE_COPY: 1}
    homeless: list[tuple[Extra, MissingModuleError]] = []
    for extra in sorted(share.adapter.extras, key=lambda extra: in_turn.get(extra.kind, 2)):
        try:
            plan_extra(share.at(extra), extra, base)
        except MissingModuleError as error:
            homeless.append((extra, error))
    if homeless:
        raise _all_of(homeless, share.adapter)
    _grow_logits_bias(share, base)


def _all_of(
    homeless: Sequence[tuple[Extra, MissingModuleError]], adapter: Adapter
) -> MissingModuleError:
    """Return the error of the first of several, with a hint that is good for all of them."""
    first = homeless[0][1]
    keys = [extra.key for extra, _ in homeless]
    more = f", nor are {len(keys) - 1} more" if len(keys) > 1 else ""
    which = "it" if len(keys) == 1 else "them"
    hint = f"leave {which} out with {option('--skip', pattern_for(keys, adapter.tensors))}"
    if set(keys) == set(adapter.tensors):
        hint = "is this the base that the adapter was trained on?"
    elif first.hint is not None:
        hint = f"{first.hint}, or {hint}"
    return MissingModuleError(first.where, f"{first.what}{more}", hint=hint)


def _grow_logits_bias(share: Share, base: Model) -> None:
    """Give new tokens a zero in what is added to the logits, as transformers does."""
    known = [name for name in share.changes if name in base.tensors or name in base.hidden]
    sources = [(base.shape(name), share.changes[name].source) for name in known]
    sizes = {(old[:1], new.spec.shape[:1]) for old, new in sources if new is not None}
    for name in base.tensors:
        for old, new in sizes if name.endswith(LOGITS_BIAS) else ():
            shape = base.shape(name)
            if shape[-1:] == old and new > old:
                share.changes[name].grown = (*shape[:-1], *new)


def plan_extra(share: Share, extra: Extra, base: Model) -> None:
    """Add what one extra changes to ``share``; raises as :func:`plan_extras` does."""
    match extra.kind:
        case ExtraKind.FULL:
            _plan_full(share, extra, base)
        case ExtraKind.BASE_COPY:
            _plan_base_copy(share, extra, base)
        case ExtraKind.ROWS:
            _plan_rows(share, extra, base)
        case ExtraKind.STATE | ExtraKind.SHARED:
            pass


def _plan_full(share: Share, extra: Extra, base: Model) -> None:
    module, _, leaf = extra.name.rpartition(".")
    name = (base.parameter(module, leaf) if module else None) or extra.name
    if _is_copy(share, extra, name, base):
        _plan_base_copy(share, extra, base)
    elif name in base.tensors and not base.is_turned(module):
        _replace(share, extra, name, base)
    elif (place := place_of_saved(extra, base)) is not None and place.pieces[
        0
    ].name in base.tensors:
        plan_cut(share, extra, place, base)
    elif name in base.hidden:
        _replace(share, extra, name, base)
    elif _is_saved(share, module) and not base.components:
        if share.weight != 1:
            raise AdapterError(
                share.where(extra.name),
                f"the base has no such tensor, so a weight of {share.weight:g} means nothing",
                code="LT024",
            )
        share.changes[extra.name].replacement = extra.tensor
    else:
        raise _no_place(share, extra, base)


def _is_copy(share: Share, extra: Extra, name: str, base: Model) -> bool:
    """Whether PEFT has stored a tied weight beside what it trained, so that all its names follow.

    What it has trained of a tied module alone it lists, or says that it is tied again.
    """
    config = share.adapter.config
    if config is None or config.flag("ensure_weight_tying") or not base.may_be_tied(name):
        return False
    return not is_listed(share.adapter, extra.name.rpartition(".")[0])


def _is_saved(share: Share, module: str) -> bool:
    listed = is_listed(share.adapter, module) or module.endswith(INNER_HEADS)
    return listed or any(part in IMPLICIT_HEADS for part in module.split("."))


def _no_place(share: Share, extra: Extra, base: Model) -> MissingModuleError:
    module, _, leaf = extra.name.rpartition(".")
    if leaf == "bias" and base.has(module):
        return MissingModuleError(
            share.where(extra.key), f"the base's {module!r} has no bias that it could replace"
        )
    nearest = base.nearest(module)
    words = f" (nearest: {', '.join(nearest)})" if nearest else ""
    return MissingModuleError(
        share.where(extra.key),
        f"is neither part of a delta nor a tensor of the base{words}",
        hint="list its module in modules_to_save to add it",
    )


def _replace(share: Share, extra: Extra, name: str, base: Model) -> None:
    changes = share.changes[name]
    shape, old = extra.tensor.spec.shape, base.shape(name)
    if shape == old and share.weight != 1:
        changes.edits.insert(0, Blend(extra.tensor, share.weight))
        return
    if shape != old:
        _check_resize(share, extra, name, base)
        if share.weight != 1:
            raise AdapterError(
                share.where(extra.name),
                f"has shape {list(shape)}, the base's {list(old)}; only weight 1 can replace it",
                code="LT022",
            )
    changes.replacement = extra.tensor


def _check_resize(share: Share, extra: Extra, name: str, base: Model) -> None:
    """Allow another shape for vocabularies and heads, where it is what was trained."""
    module = name.rpartition(".")[0]
    shape, old = extra.tensor.spec.shape, base.shape(name)
    is_vocabulary = module.rpartition(".")[2] in EMBEDDING_LEAVES | HEAD_LEAVES
    is_vocabulary |= any(base.may_be_tied(one) for one in (name, f"{module}.weight"))
    if (is_vocabulary or _is_saved(share, module)) and shape[1:] == old[1:]:
        return
    raise BaseModelError(
        share.where(extra.name),
        f"has shape {list(shape)}, the base's tensor {list(old)}",
        hint="is this the base that the adapter was trained on?",
        code="LT022",
    )


def _plan_base_copy(share: Share, extra: Extra, base: Model) -> None:
    module, _, leaf = extra.name.rpartition(".")
    name = base.parameter(module, leaf)
    if name is None:
        share.notes.append(f"{extra.key!r}, a copy of a weight that the base lacks, was not used")
        return
    if extra.tensor.spec.shape == base.shape(name):
        share.changes[name].edits.insert(
            0, Blend(extra.tensor, share.weight, only_if_different=True)
        )
    else:
        _check_resize(share, extra, name, base)
        share.changes[name].base = extra.tensor


def _plan_rows(share: Share, extra: Extra, base: Model) -> None:
    name = base.parameter(extra.name, "weight")
    if name is None:
        raise _no_place(share, extra, base)
    shape = base.shape(name)
    indices = _token_indices(share, extra)
    source = share.changes[name].source
    shape = source.spec.shape if source else shape
    if extra.tensor.spec.shape != (len(indices), *shape[1:]):
        raise AdapterError(
            share.where(extra.key),
            f"has shape {list(extra.tensor.spec.shape)}, expected "
            f"{[len(indices), *shape[1:]]}: one row for each of the trained tokens",
            code="LT028",
        )
    if indices and max(indices) >= shape[0]:
        raise BaseModelError(
            share.where(extra.name),
            f"trains token {max(indices)}, but the base has only {shape[0]} rows",
            hint="resize the base's vocabulary first, as the training did",
            code="LT022",
        )
    share.changes[name].edits.append(SetRows(indices, extra.tensor, share.weight))


def _token_indices(share: Share, extra: Extra) -> tuple[int, ...]:
    value = share.adapter.field("trainable_token_indices")
    if isinstance(value, dict):
        matching = [indices for key, indices in value.items() if matches_target((key,), extra.name)]
        value = matching[0] if matching else None
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise AdapterError(
            share.where(extra.key),
            "holds trained token rows, but trainable_token_indices does not say which",
            code="LT028",
        )
    return tuple(value)
