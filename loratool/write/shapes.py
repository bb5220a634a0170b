"""The tensors of a module in the roles, shapes and orientation that a scheme has for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.model import Kind
from loratool.adapter.part import Part
from loratool.adapter.scheme import NoPlaceError, Scheme
from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.values.expr import Placed
from loratool.write.kernels import shaped_like

__all__ = ["fitted", "padded", "slotted"]


def fitted(part: Part, base: Model) -> Part:
    """Return ``part`` with kernels as the base has them; its shapes are checked.

    Raises:
        AdapterError: It does not fit.
    """
    place = base.find(part.module)
    if place is None or not part.is_plain:
        return part
    shape = place.stored_shape
    made = shaped_like(part, shape)
    out, into = made.up.shape[0], made.down.shape[1:]
    # GPT-2's Conv1D is (in, out), and an embedding (vocabulary, dim).
    if shape != (*into, out) and (shape != (out, *into) or made.kind is Kind.EMBEDDING):
        raise AdapterError(
            part.module,
            f"its delta has the shape {[out, *into]}, the base's weight {list(shape)}",
            hint="is this the base that it was trained on?",
        )
    return made


def padded(parts: Sequence[Part], rank: int | None, scheme: Scheme) -> list[Part]:
    """Return parts of one rank where that is asked for, or needed by the scheme.

    Raises:
        OptionError: A module has a higher rank.
    """
    if scheme.scale.has_one_rank and rank is None:
        rank = max(part.rank for part in parts)
    if rank is None:
        return list(parts)
    made = []
    for part in parts:
        if not part.is_plain:
            raise UnsupportedError(
                part.module, f"is {part.variant.words}, which has no ranks", hint="add --to-lora"
            )
        if part.rank > rank:
            raise OptionError(
                f"rank {rank}",
                f"{part.module!r} has rank {part.rank}",
                hint=f"shrink it first: loratool truncate ADAPTER --rank {rank} -o OUT",
            )
        made.append(part if part.rank == rank else _widened(part, rank))
    return made


def _widened(part: Part, rank: int) -> Part:
    down, up = part.down, part.up
    wide_down = Placed(((down, 0, 0),), (rank, *down.shape[1:]), down.dtype)
    wide_up = Placed(((up, 0, 0),), (up.shape[0], rank, *up.shape[2:]), up.dtype)
    return part.factored(wide_down, wide_up, note=f"filled with zeros up to rank {rank}")


def slotted(part: Part, scheme: Scheme) -> Part:
    """Return ``part`` with its tensors in the roles that ``scheme`` has.

    Raises:
        UnsupportedError: It has no place for one of them.
    """
    try:
        made = scheme.roles.stored(part)
    except NoPlaceError as error:
        raise _no_place(part, scheme, error.what, error.slot) from None
    for slot in made.values:
        if not scheme.keys.has_name_for(slot):
            words = part.variant.words if not part.is_plain else None
            raise _no_place(part, scheme, words or f"its {slot.value}", slot)
    if not part.is_plain and not scheme.roles.has_variants:
        raise _no_place(part, scheme, part.variant.words)
    carrier = part.variant.scale_slot(made.values)
    if carrier is not None and part.scale != 1:
        values = {**made.values, carrier: made.values[carrier].scaled(part.scale)}
        note = f"its scale {part.scale:g} was multiplied into {carrier}"
        made = replace(made, values=values, scale=1.0, alpha=None, notes=(*made.notes, note))
    return made


def _no_place(part: Part, scheme: Scheme, what: str, slot: Slot | None = None) -> UnsupportedError:
    """Return the error of a module that the scheme cannot express, with what can be done.

    Args:
        part: The module.
        scheme: The scheme.
        what: What has no place in it.
        slot: The one tensor that it is, where the rest of the module has a place.
    """
    stored = part.stored(slot) if slot is not None else None
    if not part.is_plain and part.variant.has_matrix:
        more = ", --base and --rank" if part.variant.needs_base else ""
        hint = f"make it a plain LoRA with --to-lora{more}"
    elif slot is Slot.MAGNITUDE:
        hint = "make it a plain LoRA with --to-lora, --base and --rank"
    elif stored is not None:
        hint = (
            f"leave it out with --skip '^{re.escape(stored.spec.name)}$', which changes the model"
        )
    else:
        hint = f"leave the module out with --drop '^{re.escape(part.label)}$'"
    return UnsupportedError(
        part.module, f"the scheme {scheme.name!r} has no place for {what}", hint=hint
    )
