"""How strong each module of each adapter is: ``0.8``, ``te1=0.5``, ``2:layers.0-11=0``.

Numbers are positional, one for each adapter. ``PATTERN=N`` multiplies them where the pattern means
a module; of several that do the last one counts. ``K:PATTERN=N`` holds for one adapter: the K-th,
or the one whose file is called so.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from loratool.adapter.model import Adapter, Extra, ExtraKind, Site, without
from loratool.adapter.selectors import (
    EXPRESSION,
    GLOB,
    PartlyMeantError,
    Selector,
    Spellings,
    selector,
)
from loratool.errors import OptionError
from loratool.names.pipelines import component_of
from loratool.names.spellings import component_names, spellings_of, spellings_of_extra
from loratool.names.vocabulary import is_number

__all__ = ["Strength", "Weights", "recorded_weights", "strengths", "with_strengths"]

Weights = Sequence[float | str] | Mapping[str, float]
OPTION: Final = "-w"
PLACE: Final = re.compile(r"[1-9][0-9]{0,8}")
MOST_SHOWN: Final = 6


@dataclass(frozen=True, slots=True)
class Strength:
    """What the tensors of one adapter are multiplied by.

    Attributes:
        number: What holds where no pattern does.
        sites: By the label of a site, where a pattern means it.
        extras: The same for tensors beside the deltas, by key.
    """

    number: float = 1.0
    sites: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)

    def of(self, site: Site) -> float:
        """Return that of a site."""
        return self.sites.get(site.label, self.number)

    def of_extra(self, extra: Extra) -> float:
        """Return that of a tensor beside the deltas."""
        return self.extras.get(extra.key, self.number)


@dataclass(frozen=True, slots=True)
class _Entry:
    """``PATTERN=NUMBER``, for one adapter or for all."""

    selector: Selector
    number: float
    adapter: int | None

    def holds_for(self, index: int) -> bool:
        return self.adapter in (None, index)


def recorded_weights(weights: Weights, count: int) -> list[float | str]:
    """Return weights as they are recorded: a number for each adapter, then the patterns."""
    listed = _listed(weights)
    numbers = [number for item in listed if (number := _number(item)) is not None]
    patterns = [str(item) for item in listed if _number(item) is None]
    return [*numbers, *[1.0] * (count - len(numbers)), *patterns]


def with_strengths(
    adapters: Sequence[Adapter], weights: Weights
) -> tuple[list[Adapter], list[Strength], list[str]]:
    """Return ``adapters`` without what has a weight of 0, their strengths, and notes.

    Raises:
        OptionError: Something is no weight, or a pattern means nothing.
    """
    found = strengths(adapters, weights)
    kept, notes = [], []
    for adapter, strength in zip(adapters, found, strict=True):
        sites = {site.label for site in adapter.sites if strength.of(site) == 0}
        extras = {extra.key for extra in adapter.extras if strength.of_extra(extra) == 0}
        if sites or extras:
            adapter = without(adapter, sites, extras)
            first = min(sites or extras)
            what = f"{len(sites)} modules" if sites else f"{len(extras)} tensors"
            notes.append(
                f"{adapter.path}: {what} were left out, for their weight is 0, such as {first!r}"
            )
        kept.append(adapter)
    return kept, found, notes


def strengths(adapters: Sequence[Adapter], weights: Weights) -> list[Strength]:
    """Return how strong the modules of each adapter are.

    Args:
        adapters: The adapters, in order.
        weights: Numbers, one for each adapter (missing ones are 1), and patterns with numbers.

    Raises:
        OptionError: Something is no weight, or a pattern means nothing.
    """
    listed = _listed(weights)
    numbers = [number for item in listed if (number := _number(item)) is not None]
    if len(numbers) > len(adapters):
        adapter = f"{len(adapters)} adapter{'s' * (len(adapters) > 1)}"
        raise OptionError(
            OPTION,
            f"{len(numbers)} weights for {adapter}",
            hint="give one number for each adapter, in their order, or PATTERN=NUMBER for modules",
        )
    numbers += [1.0] * (len(adapters) - len(numbers))
    entries = [_entry(item, adapters) for item in map(str, listed) if _number(item) is None]
    for number in chain(numbers, (entry.number for entry in entries)):
        if not math.isfinite(number):
            raise OptionError(OPTION, f"{number} is no finite number")
    if not entries:
        return [Strength(number) for number in numbers]
    meant: set[int] = set()
    found = [
        _strength(adapter, index, number, entries, meant)
        for index, (adapter, number) in enumerate(zip(adapters, numbers, strict=True))
    ]
    for place, entry in enumerate(entries):
        if place not in meant:
            raise _meaningless(entry, adapters)
    return found


def _listed(weights: Weights) -> list[float | str]:
    if isinstance(weights, str):
        return [weights]
    if isinstance(weights, Mapping):
        return [f"{pattern}={number!r}" for pattern, number in weights.items()]
    return list(weights)


def _number(item: float | str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def _entry(item: str, adapters: Sequence[Adapter]) -> _Entry:
    """Return ``[K:]PATTERN=NUMBER``, split at the last ``=``."""
    text, is_split, digits = item.rpartition("=")
    number = _number(digits) if is_split else None
    if number is None or ("=" in text and _meant(item) is not None):
        raise OptionError(
            OPTION,
            f"{item!r} is neither a number nor PATTERN=NUMBER",
            hint=_meant(item) or "such as -w 0.8, -w te1=0.5, -w layers.0-11=0 or -w 2:unet=0.7",
        )
    adapter, text = _bound(text, adapters)
    return _Entry(selector(text, OPTION), number, adapter)


def _meant(item: str) -> str | None:
    """Return what a weight that is none was probably meant to be."""
    parts = [part for part in re.split(r"[,;\s]+", item.strip()) if part]
    if len(parts) > 1 and all(_number(part.rpartition("=")[2]) is not None for part in parts):
        return f"give -w for each: {' '.join(f'-w {part}' for part in parts)}"
    name, is_split, digits = item.rpartition(":")
    if is_split and name and _number(digits) is not None:
        return f"did you mean -w {name}={digits}?"
    return None


def _bound(text: str, adapters: Sequence[Adapter]) -> tuple[int | None, str]:
    """Return which adapter a pattern is bound to, if it is, and the pattern."""
    if text.startswith((EXPRESSION, GLOB)):
        return None, text
    before, is_bound, after = text.partition(":")
    if is_bound and PLACE.fullmatch(before):
        if int(before) > len(adapters):
            raise OptionError(
                OPTION, f"{text!r} is for adapter {before}, and there are {len(adapters)}"
            )
        return int(before) - 1, after
    stems = [adapter.title for adapter in adapters]
    named = [stem for stem in stems if stem and text.startswith(f"{stem}:")]
    if not named:
        return None, text
    stem = max(named, key=len)
    if stems.count(stem) > 1:
        raise OptionError(
            OPTION,
            f"{text!r} is for {stem!r}, and {stems.count(stem)} adapters are called so",
            hint=f"give the place of the adapter instead, such as {stems.index(stem) + 1}:",
        )
    return stems.index(stem), text.removeprefix(f"{stem}:")


def _strength(
    adapter: Adapter,
    index: int,
    number: float,
    entries: Sequence[_Entry],
    meant: set[int],
) -> Strength:
    """Return the strength of one adapter; add the places of entries that mean something."""
    mine = [(place, entry) for place, entry in enumerate(entries) if entry.holds_for(index)]

    def weigh(module: Spellings) -> float | None:
        found = None
        for place, entry in mine:
            if _means(entry, module, adapter):
                meant.add(place)
                found = entry.number
        return found

    sites = {site.label: weigh(spellings_of(site, adapter)) for site in adapter.sites}
    extras = {
        extra.key: weigh(spellings_of_extra(extra, adapter))
        for extra in adapter.extras
        if extra.kind not in (ExtraKind.STATE, ExtraKind.SHARED)
    }
    return Strength(
        number,
        {label: factor * number for label, factor in sites.items() if factor is not None},
        {key: factor * number for key, factor in extras.items() if factor is not None},
    )


def _means(entry: _Entry, module: Spellings, adapter: Adapter) -> bool:
    try:
        return entry.selector.means(module)
    except PartlyMeantError as error:
        raise error.refusal(entry.selector, adapter.path, "weigh") from None


def _meaningless(entry: _Entry, adapters: Sequence[Adapter]) -> OptionError:
    asked = [a for index, a in enumerate(adapters) if entry.holds_for(index)]
    paths = " or ".join(str(adapter.path) for adapter in asked)
    found = list(dict.fromkeys(chain.from_iterable(map(_suggested, asked))))
    more = "" if len(found) <= MOST_SHOWN else f" and {len(found) - MOST_SHOWN} more"
    return OptionError(
        OPTION,
        f"{entry.selector.text!r} means no module of {paths}",
        hint=f"what would: {', '.join(found[:MOST_SHOWN])}{more}" if found else None,
    )


def _suggested(adapter: Adapter) -> Iterator[str]:
    """Yield patterns that mean something in an adapter: components, ranges of blocks, leaves."""
    components: dict[str, None] = {}
    ranges: dict[str, list[int]] = defaultdict(list)
    leaves: dict[str, None] = {}
    for site in adapter.sites:
        component, local = component_of(site.module, adapter.components)
        if component is not None:
            components[_usual(component, adapter.family)] = None
        words = local.split(".")
        at = next((i for i, word in enumerate(words) if i and is_number(word)), None)
        if at is not None:
            ranges[words[at - 1]].append(int(words[at]))
        leaves[next((word for word in reversed(words) if not is_number(word)), local)] = None
    yield from components
    for name, numbers in ranges.items():
        if len(set(numbers)) > 1:
            yield f"{name}.{min(numbers)}-{max(numbers)}"
    yield from leaves


def _usual(component: str, family: str | None) -> str:
    """Return the shortest name of a component that means no other."""
    names = component_names(component, family)
    return names[1] if len(names) > 1 and component.startswith("text_encoder") else names[0]
