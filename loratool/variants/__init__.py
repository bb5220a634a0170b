"""Variants, one file each: what LoRA, DoRA, LoHa, OFT, … add to a weight.

A variant is one file of this folder with a ``VARIANT`` and, as a literal, a ``CLAIM``: what its
tensors look like. It is found by itself: the claims are read from the text of the files, and a file
is imported only once a module has one of its signs. No list is edited. A claim holds

- ``signs``: the roles of which one is there wherever the variant is,
- ``flags``: fields of PEFT's configuration that say the same, where no tensor does,
- ``suffixes``: what tensors are called, and their roles, in every tool; ``peft``: in PEFT's alone,
- ``peft_types``: what PEFT's configuration calls it,
- ``evidence``: 1, where its signs make a file an adapter's; 2, where they do so in any scheme,
- ``priority``: which variant is meant where a module has the signs of several: the highest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.keys import Template
from loratool.adapter.slots import FACTOR_SLOTS, Slot
from loratool.adapter.variant import Slots, Variant
from loratool.discovery import Plugins
from loratool.errors import AdapterError

__all__ = [
    "Claim",
    "claims",
    "evident_slots",
    "peft_types",
    "variant_named",
    "variant_of",
    "variant_templates",
]

FILES: Final = Plugins(__name__, "VARIANT")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a variant's tensors look like; see the module."""

    variant: str
    signs: frozenset[str] = frozenset()
    flags: tuple[str, ...] = ()
    suffixes: Mapping[str, str] = field(default_factory=dict)
    peft: Mapping[str, str] = field(default_factory=dict)
    peft_types: tuple[str, ...] = ()
    evidence: int = 0
    priority: int = 0

    @property
    def is_default(self) -> bool:
        """Whether it is what a module is that bears no sign."""
        return not self.signs and not self.flags


@cache
def claims() -> tuple[Claim, ...]:
    """Return the claims of all variants, in the order of their names; none is imported."""
    return tuple(sorted(_read(), key=lambda claim: claim.variant))


def _read() -> Iterator[Claim]:
    for name, claim in FILES.claims().items():
        fields = dict(claim)
        yield Claim(name, frozenset(fields.pop("signs", ())), **fields)


@cache
def variant_named(name: str) -> Variant:
    """Return the variant in the file ``name``, which is imported."""
    made: Variant = FILES.load(name)
    return made


def variant_of(
    module: str, slots: Slots, config: LoraConfig | None, enabled: tuple[bool, ...] = ()
) -> Variant:
    """Return the variant that the tensors of ``module`` make.

    Raises:
        AdapterError: They bear the signs of two, and neither goes before the other.
    """
    best = -1
    found: list[Variant] = []
    for claim in _signed(slots, config, enabled):
        if claim.priority < best:
            continue
        variant = variant_named(claim.variant)
        if variant.fits(slots, enabled):
            if claim.priority > best:
                best, found = claim.priority, []
            found.append(variant)
    if len(found) != 1:
        names = " and ".join(variant.name for variant in found) or "nothing that is known"
        raise AdapterError(module, f"has tensors of {names} at once")
    return found[0]


def _signed(
    slots: Slots, config: LoraConfig | None, enabled: tuple[bool, ...]
) -> tuple[Claim, ...]:
    """Return the claims whose signs a module bears, the most important first."""
    flags = frozenset(f for f in _flags() if config is not None and config.flag(f))
    return _claimed(frozenset(slots), flags | ({"enable_lora"} if any(enabled) else frozenset()))


@cache
def _flags() -> frozenset[str]:
    return frozenset(flag for claim in claims() for flag in claim.flags)


@cache
def _claimed(roles: frozenset[Slot], flags: frozenset[str]) -> tuple[Claim, ...]:
    found = [
        claim
        for claim in claims()
        if claim.is_default or claim.signs & roles or not flags.isdisjoint(claim.flags)
    ]
    return tuple(sorted(found, key=lambda claim: -claim.priority))


def variant_templates(module: str, *, has_peft: bool = False) -> Iterator[Template]:
    """Yield how the tensors of variants are called behind ``module``, a template's beginning.

    Args:
        module: Such as ``{module}``.
        has_peft: Whether to yield the names that only PEFT has, too.
    """
    for claim in claims():
        names = {**claim.suffixes, **(claim.peft if has_peft else {})}
        for suffix, role in names.items():
            is_factor = claim.evidence > 0 and role in claim.signs
            yield Template(module + suffix, Slot(role), is_factor)


def evident_slots() -> frozenset[Slot]:
    """Return the roles that make a key an adapter's in whatever scheme it is one."""
    signs = (Slot(sign) for claim in claims() if claim.evidence > 1 for sign in claim.signs)
    return FACTOR_SLOTS | frozenset(signs)


def peft_types() -> frozenset[str]:
    """Return the values of ``peft_type`` that are read."""
    return frozenset(name for claim in claims() for name in claim.peft_types)
