"""The size of an adapter's file as a function of its ranks, without planning it anew."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.errors import LoratoolError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import TensorSpec
from loratool.plan.adapter import AdapterPlan, ModuleOutput

__all__ = ["FileSize"]

Ranks = Mapping[str, int]
ENTRY: Final = ':{"dtype":"","shape":[],"data_offsets":[,]},'
ALIGNMENT: Final = 8
"""A header is filled with spaces up to a multiple of so many bytes."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file.

    Attributes:
        name: Its name.
        dtype: What a header calls its elements.
        text: Length of its entry in the header, without its numbers.
        width: Bytes of an element.
        shape: Its sizes; one that depends on ranks as what a rank of each member adds.
        members: Indices of the rank groups that it depends on; none for one that is always there.
    """

    name: str
    dtype: str
    text: int
    width: float
    shape: tuple[int | float, ...]
    depends: tuple[bool, ...]
    members: tuple[int, ...]

    def is_present(self, ranks: Sequence[int]) -> bool:
        """Whether a module that it belongs to gets any rank."""
        return not self.members or any(ranks[member] for member in self.members)

    def sizes(self, ranks: Sequence[int]) -> tuple[int, ...]:
        total = sum(ranks[member] for member in self.members)
        pairs = zip(self.shape, self.depends, strict=True)
        return tuple(round(size * total) if varies else round(size) for size, varies in pairs)


class FileSize:
    """Bytes of the file for given ranks of groups of modules.

    Told from two plans: the sizes that differ between them are those that depend on ranks.

    Args:
        plan_for: Returns the plan for ranks by group.
        groups: The rank groups, in order.
        group_of: The group of each module, by what its tensors are computed from.
    """

    def __init__(
        self,
        plan_for: Callable[[Ranks], AdapterPlan],
        groups: Sequence[str],
        group_of: Mapping[str, str],
    ) -> None:
        self._plan_for = plan_for
        self._groups = groups
        place = {group: index for index, group in enumerate(groups)}
        one, two = (plan_for(dict.fromkeys(groups, rank)) for rank in (1, 2))
        members = {
            spec.name: _members(item, group_of, place)
            for item in one.parts
            for spec in item.all_specs()
        }
        larger = {spec.name: spec for spec in two.specs}
        self._tensors = [
            _tensor(spec, larger[spec.name], members.get(spec.name, ())) for spec in one.specs
        ]
        self._has_header = bool(one.layout.header)
        self._plan = one
        self._fixed = 0
        _, entries = self._lengths([1] * len(groups))
        self._fixed = len(one.layout.header.rstrip(b" ")) - entries

    def costs(self) -> list[int]:
        """Return the bytes that one rank of each group takes."""
        found = [0.0] * len(self._groups)
        for tensor in self._tensors:
            if not tensor.members:
                continue
            others = math.prod(
                size
                for size, varies in zip(tensor.shape, tensor.depends, strict=True)
                if not varies
            )
            per = [s for s, varies in zip(tensor.shape, tensor.depends, strict=True) if varies]
            for member in tensor.members:
                found[member] += tensor.width * others * math.prod(per) if per else 0.0
        return [max(1, round(cost)) for cost in found]

    def __call__(self, ranks: Sequence[int]) -> int:
        """Return the bytes of the file, within what the metadata says of ranks."""
        if not self._has_header:
            present = (t for t in self._tensors if t.is_present(ranks))
            specs = [TensorSpec(t.name, t.dtype, t.sizes(ranks)) for t in present]
            return self._plan.layout_of(specs).size
        data, header = self._lengths(ranks)
        header += self._fixed
        return data + header + -header % ALIGNMENT

    def _lengths(self, ranks: Sequence[int]) -> tuple[int, int]:
        """Return the bytes of all tensors, and of their entries in the header."""
        offset = header = 0
        for tensor in self._tensors:
            if not tensor.is_present(ranks):
                continue
            sizes = tensor.sizes(ranks)
            end = offset + round(tensor.width * math.prod(sizes))
            numbers = (*sizes, offset, end)
            header += tensor.text + sum(len(str(number)) for number in numbers)
            offset = end
        return offset, header


def _tensor(one: TensorSpec, two: TensorSpec, members: tuple[int, ...]) -> _Tensor:
    depends = tuple(a != b for a, b in zip(one.shape, two.shape, strict=True))
    count = max(1, len(members))
    shape = tuple(
        (b - a) / count if varies else a
        for a, b, varies in zip(one.shape, two.shape, depends, strict=True)
    )
    text = len(json.dumps(one.name, ensure_ascii=False).encode()) + len(one.dtype) + len(ENTRY)
    commas = max(0, len(shape) - 1)
    return _Tensor(
        one.name, one.dtype, text + commas, DTYPES[one.dtype].bits / 8, shape, depends, members
    )


def _members(
    item: ModuleOutput, group_of: Mapping[str, str], place: Mapping[str, int]
) -> tuple[int, ...]:
    names = [together.name for together in item.togethers]
    if not names:
        raise LoratoolError(item.part.module, "does not depend on a rank")
    return tuple(place[group_of[name]] for name in names)
