"""Key schemes: one table of templates, used both to parse names and to format them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from loratool.adapter.slots import FACTOR_SLOTS, AdapterKey, Slot

__all__ = ["KeyScheme", "Template"]

FIELDS = {"module": r"(?P<module>.+)", "adapter": r"(?P<adapter>(?!weight$|bias$).+)"}


@dataclass(frozen=True)
class Template:
    """A key with ``{module}`` and perhaps ``{adapter}`` in it, and the slot that it names."""

    text: str
    slot: Slot

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


@dataclass(frozen=True)
class KeyScheme:
    """One way to name the tensors of an adapter.

    The first template of a slot is how it is written; the others are also read. A scheme that
    templates cannot express may override ``parse`` and ``format``.

    Attributes:
        name: What the command line calls it.
        summary: One line on who writes it.
        example: A key, as people see it.
        templates: The table.
        prefix: What every key of the scheme begins with, full tensors included; may be empty.
        foreign: Prefixes that mark a key as another scheme's.
        writes: Whether loratool also writes it.
    """

    name: str
    summary: str
    example: str
    templates: tuple[Template, ...]
    prefix: str = ""
    foreign: tuple[str, ...] = field(default=())
    writes: bool = False

    def parse(self, key: str) -> AdapterKey | None:
        """Return what ``key`` means in this scheme, or ``None`` where it is not one of its."""
        if self.foreign and key.startswith(self.foreign):
            return None
        for template in self.templates:
            match = template.pattern.fullmatch(key)
            if match:
                groups = match.groupdict()
                return AdapterKey(groups["module"], template.slot, groups.get("adapter"))
        return None

    def format(self, key: AdapterKey) -> str:
        """Return the name of ``key``.

        Raises:
            KeyError: The scheme has no name for this slot.
        """
        for template in self.templates:
            if template.slot is key.slot and template.names_adapter == (key.adapter is not None):
                return template.text.format(module=key.module, adapter=key.adapter)
        raise KeyError(f"{self.name} has no name for {key.slot.value}")

    def factor_keys(self, keys: Iterable[str]) -> int:
        """Return how many of ``keys`` are factors in this scheme."""
        parsed = (self.parse(key) for key in keys)
        return sum(1 for key in parsed if key is not None and key.slot in FACTOR_SLOTS)
