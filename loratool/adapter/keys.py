"""Keys of a scheme: one table of templates, used both to parse names and to format them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from loratool.adapter.slots import FACTOR_SLOTS, AdapterKey, Slot
from loratool.errors import UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec

__all__ = [
    "KeyTable",
    "Template",
    "are_transposed",
    "are_upright",
    "transposed",
]

FIELDS: Final = {"module": r"(?P<module>.+)", "adapter": r"(?P<adapter>(?!weight$|bias$).+)"}
MOST_KNOWN: Final = 1 << 17
MOST_KEPT: Final = 1 << 12
"""How many keys are kept from one adapter to the next."""
LONGEST_SUFFIX: Final = 4
"""How many dots the part of a key behind its module has at most."""


@dataclass(frozen=True)
class Template:
    """A key with ``{module}`` and perhaps ``{adapter}`` in it, and the slot that it names.

    Attributes:
        text: The key.
        slot: Its slot.
        is_factor: Whether such a key makes a file an adapter's, as A and B always do.
    """

    text: str
    slot: Slot
    is_factor: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression that recognises such keys."""
        parts = re.split(r"\{(\w+)\}", self.text)
        return re.compile(
            "".join(FIELDS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts)),
            re.DOTALL,
        )

    @property
    def names_adapter(self) -> bool:
        """Whether keys of this form carry the name of the adapter."""
        return "{adapter}" in self.text

    @cached_property
    def marker(self) -> str:
        """The text between module and adapter name: a key without it is none of these."""
        return self.text.partition("{module}")[2].partition("{adapter}")[0]


@dataclass(frozen=True)
class KeyTable:
    """How a scheme names tensors.

    The first template of a slot is how it is written; the others are also read. What templates
    cannot express, a table of its own kind does: it overrides ``parse`` and ``format``.

    Attributes:
        templates: The table.
        prefix: What every key begins with, full tensors included; may be empty.
        foreign: Prefixes that mark a key as another scheme's.
        modules: What a module looks like in keys, as a regular expression.
    """

    templates: tuple[Template, ...]
    prefix: str = ""
    foreign: tuple[str, ...] = field(default=())
    modules: str = ".+"

    @property
    def names_adapter(self) -> bool:
        """Whether keys are written with the adapter's name in them."""
        return bool(self.templates) and self.templates[0].names_adapter

    @cached_property
    def _plain(self) -> Mapping[str, tuple[str, Slot]]:
        """What comes before and what each suffix means, for templates without adapter name."""
        found: dict[str, tuple[str, Slot]] = {}
        for template in self.templates:
            before, _, after = template.text.partition("{module}")
            if not template.names_adapter:
                found.setdefault(after, (before, template.slot))
        return found

    @cached_property
    def _named(self) -> tuple[Template, ...]:
        return tuple(template for template in self.templates if template.names_adapter)

    @cached_property
    def _module(self) -> re.Pattern[str]:
        return re.compile(self.modules, re.DOTALL)

    def parse(self, key: str) -> AdapterKey | None:
        """Return what ``key`` means in this scheme, or ``None`` where it is not one of its."""
        known = self._known
        if key not in known:
            if len(known) >= MOST_KNOWN:
                known.clear()
            known[key] = self._parse(key)
        return known[key]

    def forget(self) -> None:
        """Let go of what was asked for, if it is much: the next adapter may have the same keys."""
        if len(self._known) > MOST_KEPT:
            self._known.clear()

    @cached_property
    def _known(self) -> dict[str, AdapterKey | None]:
        """Keys that were asked for: each is asked for when a scheme is found, and when it reads."""
        return {}

    def _parse(self, key: str) -> AdapterKey | None:
        if self.foreign and key.startswith(self.foreign):
            return None
        found = self._parse_plain(key) or self._parse_named(key)
        return found if found is not None and self._module.fullmatch(found.module) else None

    def _parse_plain(self, key: str) -> AdapterKey | None:
        best = None
        end = len(key)
        for _ in range(LONGEST_SUFFIX):
            end = key.rfind(".", 0, end)
            if end < 0:
                break
            before, slot = self._plain.get(key[end:], ("", None))
            if slot is not None and key.startswith(before) and end > len(before):
                best = AdapterKey(key[len(before) : end], slot)
        return best

    def _parse_named(self, key: str) -> AdapterKey | None:
        for template in self._named:
            match = template.pattern.fullmatch(key) if template.marker in key else None
            if match:
                groups = match.groupdict()
                return AdapterKey(groups["module"], template.slot, groups.get("adapter"))
        return None

    def format(self, key: AdapterKey) -> str:
        """Return the name of ``key``, whose module is spelled as the scheme does.

        Raises:
            KeyError: The scheme has no name for this slot.
        """
        for template in self.templates:
            if template.slot is key.slot and template.names_adapter == (key.adapter is not None):
                return template.text.format(module=key.module, adapter=key.adapter)
        raise KeyError(f"there is no name for {key.slot.value}")

    @cached_property
    def factor_slots(self) -> frozenset[Slot]:
        """The roles that make a key recognisable as an adapter's."""
        return FACTOR_SLOTS | {t.slot for t in self.templates if t.is_factor}

    def accepts(self, module: str) -> bool:
        """Whether a module may be spelled so."""
        return self._module.fullmatch(module) is not None

    def has_name_for(self, slot: Slot) -> bool:
        """Whether there is a key for ``slot``."""
        return any(template.slot is slot for template in self.templates)

    def factor_keys(self, keys: Iterable[str]) -> int:
        """Return how many of ``keys`` are factors in this scheme."""
        parsed = (self.parse(key) for key in keys)
        return sum(1 for key in parsed if key is not None and key.slot in self.factor_slots)

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Return how many of ``tensors`` are factors in this scheme, shapes considered."""
        return self.factor_keys(tensors)

    def pairs(self, tensors: Mapping[str, StoredTensor]) -> list[tuple[StoredTensor, StoredTensor]]:
        """Return the stored A and B of every module that has both as matrices."""
        found: dict[tuple[str, str | None], dict[Slot, StoredTensor]] = {}
        for key, tensor in tensors.items():
            parsed = self.parse(key)
            if parsed is not None and parsed.slot in (Slot.DOWN, Slot.UP):
                found.setdefault((parsed.module, parsed.adapter), {})[parsed.slot] = tensor
        return [
            (slots[Slot.DOWN], slots[Slot.UP])
            for slots in found.values()
            if len(slots) == 2 and all(len(item.spec.shape) == 2 for item in slots.values())
        ]


def are_upright(pairs: Sequence[tuple[StoredTensor, StoredTensor]]) -> bool:
    """Return whether factors fit as ``(r, in), (out, r)`` of a small rank, and not transposed.

    Args:
        pairs: A and B of each module, as they are stored, both matrices.
    """
    shapes = [(down.spec.shape, up.spec.shape) for down, up in pairs]
    fit = all(a[0] == b[1] and a[0] <= min(a[1], b[0]) for a, b in shapes)
    return fit and are_transposed(pairs) is False


def are_transposed(pairs: Sequence[tuple[StoredTensor, StoredTensor]]) -> bool | None:
    """Return whether factors are stored transposed, or ``None`` where their shapes do not tell.

    A pair fits as ``(r, in), (out, r)``, as ``(in, r), (r, out)``, or both ways where inputs are as
    many as outputs. Then the rank is the smaller side; of square factors either is.

    Args:
        pairs: A and B of each module, as they are stored, both matrices.
    """
    shapes = [(down.spec.shape, up.spec.shape) for down, up in pairs]
    if not all(down[1] == up[0] for down, up in shapes):
        return False
    if not all(down[0] == up[1] for down, up in shapes):
        return True
    tall = any(down[0] > down[1] for down, _ in shapes)
    wide = any(down[0] < down[1] for down, _ in shapes)
    return None if tall == wide else tall


def transposed(tensor: StoredTensor) -> StoredTensor:
    """Return a stored matrix with rows and columns exchanged; its bytes stay where they are.

    Raises:
        UnsupportedError: It is in blocks, which lie along its rows.
    """
    spec = tensor.spec
    if DTYPES[spec.dtype].block is not None:
        raise UnsupportedError(
            spec.name,
            f"is stored in blocks of {spec.dtype} along the other side, which is not read",
            hint="convert the adapter to GGUF again with --outtype f32",
        )
    rows, columns = spec.shape
    strides = tensor.strides or (columns, 1)
    return replace(
        tensor,
        spec=TensorSpec(spec.name, spec.dtype, (columns, rows)),
        strides=(strides[1], strides[0]),
        steps=None,
    )
