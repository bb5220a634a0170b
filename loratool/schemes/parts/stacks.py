"""Experts of a layer whose factors are stored as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratool.adapter.model import FUSED_PARAMETERS, Kind, Site
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.errors import UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.values.expr import Piled

__all__ = ["experts_apart", "one_of_stack", "stacked"]


def stacked(name: str, members: Mapping[int, Part]) -> Part:
    """Return the parts of all experts as one called ``name``.

    Args:
        name: What the stack is called.
        members: The parts by expert.

    Raises:
        UnsupportedError: An expert is missing, or has another rank than the rest.
    """
    ordered = [members[index] for index in sorted(members)]
    first = ordered[0]
    if sorted(members) != list(range(len(members))):
        missing = next(index for index in range(len(members)) if index not in members)
        raise UnsupportedError(
            name, f"stacks the experts of a layer, and expert {missing} is not adapted"
        )
    shapes = {(part.down.shape, part.up.shape) for part in ordered}
    if len(shapes) > 1 or not all(part.is_plain for part in ordered):
        raise UnsupportedError(name, "stacks experts, which have different shapes or kinds")
    scales = {part.scale for part in ordered}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ups = [part.up if part.scale == scale else part.up.scaled(part.scale) for part in ordered]
    down = Piled(tuple(part.down for part in ordered))
    joint = first.factored(down, Piled(tuple(ups)), scale=scale, note="experts stacked")
    return replace(joint, module=name, rank=first.rank)


def one_of_stack(site: Site, module: str, index: int) -> Site:
    """Return one of the experts whose factors a site stacks, as a module of its own."""
    slots = {slot: _matrix(stored, index) for slot, stored in site.slots.items()}
    down = slots[Slot.DOWN]
    scaling = replace(site.scaling, rank=down.spec.shape[0])
    return replace(site, module=module, kind=Kind.LINEAR, slots=slots, scaling=scaling)


def experts_apart(site: Site) -> list[Site]:
    """Return one site for each expert where factors of a parameter of all of them are stacked.

    A is ``(experts, r, in)`` and B ``(experts, out, r)``.
    """
    down, up = site.slots.get(Slot.DOWN), site.slots.get(Slot.UP)
    container, _, leaf = site.module.rpartition(".")
    if down is None or up is None or leaf not in FUSED_PARAMETERS or not container:
        return [site]
    shapes = down.spec.shape, up.spec.shape
    is_stack = all(len(shape) == 3 for shape in shapes) and shapes[0][0] == shapes[1][0]
    if not is_stack or shapes[1][2] != shapes[0][1]:
        return [site]
    return [one_of_stack(site, f"{container}.{n}.{leaf}", n) for n in range(shapes[0][0])]


def _matrix(stored: StoredTensor, index: int) -> StoredTensor:
    shape = stored.spec.shape[1:]
    size = stored.spec.nbytes // stored.spec.shape[0]
    return replace(
        stored, spec=replace(stored.spec, shape=shape), offset=stored.offset + index * size
    )
