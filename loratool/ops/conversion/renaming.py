"""From the naming of one convention to that of another, where one module may be several.

Original checkpoints fuse projections that diffusers has apart. Rows of B belong to one of them,
so that a fused delta splits exactly: every part takes its rows of B and all of A, or only its
own ranks where B is block-diagonal. The other way, parts that share A stack their rows; others
get ranks of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeVar

from loratool.adapter.model import Kind
from loratool.adapter.slots import Slot
from loratool.errors import OptionError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.names.diffusion import FAMILIES, Family, Fusion, family_named
from loratool.names.pipelines import BACKBONES, component_of
from loratool.ops.conversion.parts import Part
from loratool.ops.conversion.values import Arranged, Constant, Stored, Value, widest
from loratool.ops.conversion.views import block_diagonal, columns, concatenated, rows, scaled
from loratool.ops.naming.paths import families_of_modules

__all__ = ["Naming", "families_of", "names_native", "to_hub", "to_native"]

Found = TypeVar("Found")
MLP_RATIO: Final = {"flux": 4}
"""Rows of the last part of an ``input``-sized fusion over its inputs, where not known."""

PLACES: Final = (None, *BACKBONES)
ROW_SLOTS: Final = (Slot.UP_BIAS, Slot.BIAS, Slot.MAGNITUDE)
"""What else has one number for each output."""


@dataclass(frozen=True)
class Naming:
    """The families that the modules of an adapter may belong to; all agree on what is asked."""

    families: tuple[Family, ...]

    def fusion(self, local: str) -> Fusion | None:
        """Return what a native path is in diffusers, or ``None`` where it is no native path.

        Raises:
            UnsupportedError: The families disagree.
        """
        found = [f.from_native(local) for f in self.families if f.to_native(local) is None]
        return self._one(local, [item for item in found if item is not None])

    def native(self, local: str) -> tuple[str, Fusion] | None:
        """Return the native module that holds a path of diffusers, or ``None``.

        Raises:
            UnsupportedError: The families disagree.
        """
        found = [f.to_native(local) for f in self.families]
        return self._one(local, [item for item in found if item is not None])

    def _one(self, local: str, found: Sequence[Found]) -> Found | None:
        if len(set(found)) > 1:
            names = ", ".join(family.name for family in self.families)
            raise UnsupportedError(
                local,
                f"has different counterparts in {names}, and nothing tells which model this is",
                hint=f"say it: --family {self.families[0].name}",
            )
        return next(iter(found), None)


def families_of(modules: Collection[str], name: str | None) -> Naming:
    """Return the families that the backbone's ``modules`` may belong to.

    Raises:
        OptionError: ``name`` is a family that has none of them.
    """
    locals_ = [local for component, local in map(component_of, modules) if component in PLACES]
    if name is None:
        return Naming(tuple(families_of_modules(modules)))
    family = family_named(name)
    is_empty = any(f.has(local) for f in FAMILIES for local in locals_)
    if is_empty and not any(map(family.has, locals_)):
        raise OptionError("--family", f"{name} has none of the modules, such as {locals_[0]!r}")
    return Naming((family,))


def to_hub(parts: Sequence[Part], naming: Naming) -> list[Part]:
    """Return ``parts`` under diffusers' names: fused modules are split."""
    return [made for part in parts for made in _split(part, naming)]


def _split(part: Part, naming: Naming) -> Iterator[Part]:
    component, local = component_of(part.module)
    fusion = naming.fusion(local) if component is None or component in BACKBONES else None
    if fusion is None:
        yield part
        return
    before = f"{component}." if component else ""
    names = [before + module for module in fusion.modules]
    if len(names) == 1 and not fusion.swapped:
        yield replace(part, module=names[0])
        return
    _check_splittable(part, "split")
    if fusion.swapped:
        yield replace(_swapped(part), module=names[0])
        return
    sizes = _sizes(part, fusion)
    ranks = _blocks(part, sizes)
    _check_magnitude(part, "split")
    start = 0
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        up = rows(part.up, start, start + size)
        down, how = part.down, "split from a fused projection, sharing its A"
        others: dict[Slot, Value] = {
            slot: rows(value, start, start + size)
            for slot, value in part.values.items()
            if slot in ROW_SLOTS
        }
        if ranks is not None:
            first, last = ranks[index]
            last = max(last, first + 1) if others else last
            if (first, last) != (0, part.rank):
                up, down = columns(up, first, last), rows(part.down, first, last)
                how = "split from a fused projection, with its own ranks"
        if ranks is None or first < last:
            made = part.factored(down, up, note=how, alpha=part.alpha if ranks is None else None)
            yield replace(made, module=name, values={**made.values, **others})
        start += size


def _check_magnitude(part: Part, verb: str) -> None:
    """Refuse magnitudes of the inputs, which belong to the columns of the whole weight.

    Raises:
        UnsupportedError: It has such.
    """
    if part.has_input_magnitudes:
        raise UnsupportedError(
            part.module,
            f"has magnitudes of its inputs (LyCORIS, wd_on_out=False), and cannot be {verb}",
            hint="make it a plain LoRA with --to-lora, --base and --rank",
        )


def _check_splittable(part: Part, verb: str) -> None:
    if not part.is_plain:
        raise UnsupportedError(
            part.module,
            f"is a {part.variant}, and cannot be {verb} as a fused projection",
            hint="make it a plain LoRA with --to-lora",
        )


def _sizes(part: Part, fusion: Fusion) -> list[int]:
    """Return how many rows each part of a fused module has."""
    out, count = part.up.shape[0], len(fusion.modules)
    into = part.down.shape[1]
    if fusion.sizes == "input":
        sizes = [into] * (count - 1)
        sizes.append(out - sum(sizes))
    else:
        sizes = [out // count] * count
    if sum(sizes) != out or min(sizes) <= 0:
        raise UnsupportedError(
            part.module, f"has {out} outputs, which {count} projections cannot share"
        )
    return sizes


def _swapped(part: Part) -> Part:
    """Return a part with the halves of its outputs exchanged."""
    half, odd = divmod(part.up.shape[0], 2)
    if odd:
        raise UnsupportedError(
            part.module, f"has {part.up.shape[0]} outputs, and its halves are to be exchanged"
        )

    def exchange(value: Value) -> Value:
        return concatenated([rows(value, half, 2 * half), rows(value, 0, half)])

    others: dict[Slot, Value] = {
        slot: exchange(v)
        for slot, v in part.values.items()
        if slot in ROW_SLOTS and not (slot is Slot.MAGNITUDE and part.has_input_magnitudes)
    }
    made = part.factored(part.down, exchange(part.up), note="halves of its outputs exchanged")
    return replace(made, alpha=part.alpha, values={**made.values, **others})


def _blocks(part: Part, sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return which ranks each part of a block-diagonal B has; ``None`` where it is dense."""
    up = part.up
    if not isinstance(up, Stored) or len(sizes) == 1:
        return None
    nonzero = _support(up, sizes)
    rank = up.shape[1]
    if not any(found for found in nonzero):
        return None  # untrained
    if rank % len(sizes) == 0:
        step = rank // len(sizes)
        even = [(i * step, (i + 1) * step) for i in range(len(sizes))]
        if all(
            first <= column < last
            for (first, last), found in zip(even, nonzero, strict=True)
            for column in found
        ):
            return [
                span if found else (span[0], span[0])
                for span, found in zip(even, nonzero, strict=True)
            ]
    spans = [(min(found), max(found) + 1) if found else None for found in nonzero]
    present = [span for span in spans if span is not None]
    if any(one[1] > other[0] for one, other in pairwise(present)):
        if len(present) == len(spans):
            return None
        # What has no rows is not adapted; the others share A.
        return [(0, rank) if span is not None else (0, 0) for span in spans]
    # Ranks between two supports are zero in all rows: they may go to either side.
    ends = [span[0] for span in present[1:]] + [rank]
    starts = [0, *ends[:-1]]
    filled = iter(zip(starts, ends, strict=True))
    return [next(filled) if span is not None else (0, 0) for span in spans]


def _support(up: Stored, sizes: Sequence[int]) -> list[list[int]]:
    """Return the columns of B that are not zero in the rows of each part."""
    import numpy as np

    width = up.tensor.spec.nbytes // max(1, up.tensor.spec.elements)
    kind = {2: "<u2", 4: "<u4", 8: "<u8"}[width]
    data = np.frombuffer(read_bytes(up.tensor), kind).reshape(up.shape[0], -1)
    data = data & np.array((1 << (8 * width - 1)) - 1, kind)  # -0.0 is zero too
    found, start = [], 0
    for size in sizes:
        used = data[start : start + size].any(axis=0)
        found.append([int(column) for column in np.flatnonzero(used)])
        start += size
    return found


def to_native(
    parts: Sequence[Part], naming: Naming, shapes: Mapping[str, tuple[int, ...]]
) -> list[Part]:
    """Return ``parts`` under the names of original checkpoints: projections are fused.

    Args:
        parts: Under either naming.
        naming: The families that they may belong to.
        shapes: Shapes of the base's weights by module path, where it is at hand.
    """
    groups: dict[str, tuple[Fusion, dict[str, Part]]] = {}
    order: list[str | Part] = []
    for part in parts:
        component, local = component_of(part.module)
        is_backbone = component is None or component in BACKBONES
        native = naming.native(local) if is_backbone else None
        if native is None:
            order.append(part)
            continue
        before = f"{component}." if component else ""
        name, fusion = before + native[0], native[1]
        if name not in groups:
            groups[name] = (fusion, {})
            order.append(name)
        groups[name][1][local] = part
    made = []
    for item in order:
        if isinstance(item, Part):
            made.append(item)
        else:
            fusion, members = groups[item]
            family = naming.families[0].name
            made.append(_fused(item, fusion, members, shapes, family))
    return made


def _fused(
    name: str,
    fusion: Fusion,
    members: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
    family: str,
) -> Part:
    first = next(iter(members.values()))
    if len(fusion.modules) == 1:
        if not fusion.swapped:
            return replace(first, module=name)
        _check_splittable(first, "exchanged")
        return replace(_swapped(first), module=name)
    for part in members.values():
        _check_splittable(part, "fused")
        _check_magnitude(part, "fused")
        if part.kind is not Kind.LINEAR:
            raise UnsupportedError(part.module, f"is a {part.kind.value} layer, and is not fused")
    heights = _heights(name, fusion, members, shapes, family)
    ordered = [members.get(module) for module in fusion.modules]
    present = [part for part in ordered if part is not None]
    if _share_down(present):
        up = _stacked_rows(ordered, heights)
        joint = first.factored(
            first.down, up, alpha=first.alpha, note="fused; its parts shared one A"
        )
    else:
        scales = {part.scale for part in present}
        scale = scales.pop() if len(scales) == 1 else None
        ups = [
            (part.up if scale is not None else scaled(part.up, part.scale)) if part else None
            for part in ordered
        ]
        joint = first.factored(
            concatenated([part.down for part in present]),
            block_diagonal(ups, heights),
            scale=1.0 if scale is None else scale,
            note="fused; every part has ranks of its own",
        )
    others = _fused_rows(name, ordered, heights)
    return replace(joint, module=name, values={**joint.values, **others})


def _stacked_rows(ordered: Sequence[Part | None], heights: Sequence[int]) -> Value:
    """Return the Bs of parts one below the other, with zeros for those that are absent."""
    present = [part.up for part in ordered if part is not None]
    if len(present) == len(ordered):
        return concatenated(present)
    pieces, row = [], 0
    for part, height in zip(ordered, heights, strict=True):
        if part is not None:
            pieces.append((part.up, row, 0))
        row += height
    dtype = widest([value.dtype for value in present])
    return Arranged(tuple(pieces), (row, *present[0].shape[1:]), dtype)


def _heights(
    name: str,
    fusion: Fusion,
    members: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
    family: str,
) -> list[int]:
    """Return how many rows each part of a fused module has, absent ones included."""
    known = {module: part.up.shape[0] for module, part in members.items()}
    into = next(iter(members.values())).down.shape[1]
    total = shapes.get(name, (None,))[0]
    if fusion.sizes != "input":
        size = next(iter(known.values()))
        return [known.get(module, size) for module in fusion.modules]
    heights = [known.get(module, into) for module in fusion.modules[:-1]]
    last = known.get(fusion.modules[-1])
    if last is None and total is not None:
        last = total - sum(heights)
    elif last is None and family in MLP_RATIO:
        last = MLP_RATIO[family] * into
    if last is None or last <= 0:
        raise UnsupportedError(
            name, "fuses a projection whose size the adapter does not tell", hint="give --base"
        )
    return [*heights, last]


def _share_down(parts: Sequence[Part]) -> bool:
    """Whether all parts have the same A, and the same scale."""
    first = parts[0]
    if any(part.scale != first.scale or part.down.shape != first.down.shape for part in parts[1:]):
        return False
    tensors = [part.down.tensor for part in parts if isinstance(part.down, Stored)]
    if len(tensors) < len(parts) or len({tensor.spec.dtype for tensor in tensors}) > 1:
        return False
    places = {(tensor.path, tensor.offset, tensor.strides) for tensor in tensors}
    return len(places) == 1 or len({read_bytes(tensor) for tensor in tensors}) == 1


def _fused_rows(
    name: str, ordered: Sequence[Part | None], heights: Sequence[int]
) -> dict[Slot, Value]:
    """Return biases and magnitudes of a fused module; absent biases are zero."""
    found: dict[Slot, Value] = {}
    for slot in ROW_SLOTS:
        values = [part.values.get(slot) if part else None for part in ordered]
        present = [value for value in values if value is not None]
        if not present:
            continue
        if slot is Slot.MAGNITUDE and len(present) < len(ordered):
            raise UnsupportedError(
                name, "fuses projections of which only some have magnitudes (DoRA)"
            )
        scales = {part.scale for part in ordered if part is not None}
        if slot is Slot.UP_BIAS and len(scales) > 1:
            raise UnsupportedError(name, "fuses projections with biases and different scales")
        dtype = widest([value.dtype for value in present])
        pieces, row = [], 0
        for value, height in zip(values, heights, strict=True):
            pieces.append((value if value is not None else Constant(0.0, (height,), dtype), row, 0))
            row += height
        found[slot] = Arranged(tuple(pieces), (row, *present[0].shape[1:]), dtype)
    return found


def names_native(family: str | None) -> bool:
    """Whether kohya's files use the native names of a family: all but Stable Diffusion 1 and 2."""
    return family is not None and family != "sd1"
