"""The tensors of a module in the roles, shapes and orientation that a scheme has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Kind
from loratool.adapter.part import Part
from loratool.adapter.problems import is_matrix, plain_options
from loratool.adapter.scheme import NoPlaceError, Scheme
from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.values.expr import Constant, Placed
from loratool.variants import variant_named
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
            code="LT022",
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
            if not scheme.roles.has_variants:
                slotted(parts, scheme)
            options = plain_options(part.variant, part.values)
            raise UnsupportedError(
                part.module, f"is {part.variant.words}, which has no ranks", hint=f"add {options}"
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


def slotted(parts: Sequence[Part], scheme: Scheme) -> list[Part]:
    """Return ``parts`` with their tensors in the roles that ``scheme`` has.

    Raises:
        UnsupportedError: It has no place for one of them; the hint is good for all of them.
    """
    made: list[Part] = []
    homeless: list[tuple[Part, NoPlaceError]] = []
    for part in parts:
        try:
            made.append(_slotted(part, scheme))
        except NoPlaceError as error:
            homeless.append((part, error))
    if homeless:
        first, what = homeless[0][0], homeless[0][1].what
        raise UnsupportedError(
            first.module,
            f"the scheme {scheme.name!r} has no place for {what}",
            hint=_hint(homeless, parts, scheme),
        )
    return made


def _slotted(part: Part, scheme: Scheme) -> Part:
    made = scheme.roles.stored(part)
    for slot in made.values:
        if not scheme.keys.has_name_for(slot):
            words = part.variant.words if not part.is_plain else None
            raise NoPlaceError(words or f"its {slot.value}", slot)
    if not part.is_plain and not scheme.roles.has_variants:
        raise NoPlaceError(part.variant.words)
    carrier = part.variant.scale_slot(made.values)
    if carrier is not None and part.scale != 1:
        values = {**made.values, carrier: made.values[carrier].scaled(part.scale)}
        note = f"its scale {part.scale:g} was multiplied into {carrier}"
        made = replace(made, values=values, scale=1.0, alpha=None, notes=(*made.notes, note))
    return made


def _hint(
    homeless: Sequence[tuple[Part, NoPlaceError]], parts: Sequence[Part], scheme: Scheme
) -> str:
    """Return what can be done about modules that a scheme does not express, all at once."""
    plain: set[str] = set()
    keys: set[str] = set()
    labels: set[str] = set()
    for part, error in homeless:
        stored = _stored(part, error.slot)
        is_bias = error.slot in (Slot.BIAS, Slot.UP_BIAS)
        if not (part.is_plain and is_bias) and _has_plain_place(part, scheme):
            plain.add(plain_options(part.variant, part.values))
        elif part.is_plain and stored is not None:
            keys.add(stored.spec.name)
        else:
            labels.add(part.label)
    deltas = {part.label for part in parts if part.site is not None and is_matrix(part.site)}
    if labels == {part.label for part in parts} or (plain and labels & deltas):
        return _elsewhere(parts)
    said = []
    if plain:
        said.append(f"make plain LoRAs with {max(plain, key=len)}")
    if keys:
        known = [s.spec.name for p in parts if p.site is not None for s in p.site.slots.values()]
        said.append(f"leave tensors out with {option('--skip', pattern_for(keys, known))}")
    if labels:
        pattern = pattern_for(labels, [part.label for part in parts])
        said.append(f"leave modules out with {option('--drop', pattern)}")
    return ", and ".join(said) + (", which changes the model" if keys or labels else "")


def _elsewhere(parts: Sequence[Part]) -> str:
    """Return which scheme has a place for all modules, where this one has none for any."""
    others = [part for part in parts if not part.is_plain]
    if any(part.site is None or not is_matrix(part.site) for part in others):
        return "write another scheme, such as with --to comfy"
    options = {plain_options(part.variant, part.values) for part in parts if not part.is_plain}
    more = f" {max(options, key=len)}" if options else ""
    return f"write another scheme, such as with --to peft{more}"


def _stored(part: Part, slot: Slot | None) -> StoredTensor | None:
    """Return the one tensor that has no place, where the rest of its module has one."""
    if slot is Slot.UP_BIAS and part.stored(slot) is None:
        slot = Slot.BIAS
    return part.stored(slot) if slot is not None else None


def _has_plain_place(part: Part, scheme: Scheme) -> bool:
    """Whether a scheme has a place for the plain LoRA that a module would be."""
    if part.site is None or not is_matrix(part.site):
        return False
    kernel = (1, 1) if part.kind is Kind.CONV else ()
    values = {slot: Constant(0.0, (1, 1, *kernel), "F32") for slot in part.slots}
    if part.variant.changes_bias(part.site) or {Slot.BIAS, Slot.UP_BIAS} & part.values.keys():
        values[Slot.UP_BIAS] = Constant(0.0, (1,), "F32")
    stand_in = replace(part, variant=variant_named("lora"), values=values, rank=1, scale=1.0)
    try:
        _slotted(stand_in, scheme)
    except NoPlaceError:
        return False
    except UnsupportedError:
        return True  # it has, though not for one number
    return True
