"""What transformers calls the parameters of a live model that its files call otherwise.

``save_pretrained`` writes the names of the hub, which are those of older releases or of a
model's authors. The rules that turn them into those of the live model are data, in
``table.json``: regular expressions for each class or model type, and which models are inside
of which. They are applied in transformers' own order, so that a name means what it loads as.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

__all__ = ["LiveParameters", "Naming", "naming_of"]

TABLE: Final = "table.json"
DEPTH: Final = 6
"""How many models may be inside of each other."""
BACKREFERENCE: Final = re.compile(r"\\(\d)")
EXPERT: Final = re.compile(r"(?<=\.experts\.)[0-9]{1,9}(?=\.)")
LISTED: Final = ("list", "share")
"""Operations that make one tensor of a list of experts."""


@dataclass(frozen=True, slots=True)
class LiveParameters:
    """What one tensor of the files is in the live model.

    Attributes:
        names: The parameters: several for a tensor that is cut into them.
        source: Which of the tensors that are joined to one parameter it is.
        sources: How many are joined.
        expert: Which of a list of experts it is; ``None`` if it is of none.
        operations: What is done to it on the way, but for renaming.
    """

    names: tuple[str, ...]
    source: int = 0
    sources: int = 1
    expert: int | None = None
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One rule of the table, for the part of a model that it is for.

    Attributes:
        patterns: What it looks for.
        targets: What takes their place.
        operations: What becomes of the values; nothing for one that only renames.
        prefixes: What names have to start with, one of these; ``None`` for any.
    """

    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[str, ...]
    prefixes: tuple[str, ...] | None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        order = sorted(range(len(self.patterns)), key=lambda i: -len(self.patterns[i]))
        return re.compile("|".join(f"(?P<g{i}>{self.patterns[i]})" for i in order))

    @property
    def is_renaming(self) -> bool:
        """Whether it leaves the values as they are."""
        return not self.operations or self.operations[0].startswith(("each", "offset"))

    def apply(self, name: str) -> tuple[tuple[str, ...], int] | None:
        """Return the names that ``name`` becomes, and which pattern it was; ``None`` for none."""
        prefix = ""
        if self.prefixes is not None:
            found = next((p for p in self.prefixes if name.startswith(p)), None)
            if found is None:
                return None
            prefix = found
        inner = name[len(prefix) :]
        match = self._pattern.search(inner)
        if match is None or match.lastgroup is None:
            return None
        index = int(match.lastgroup[1:])
        targets = self.targets
        if self.operations[:1] == ("each",):
            targets = (self.targets[index],)
        outer = match.re.groupindex[match.lastgroup]
        names = (
            prefix + inner.replace(match[0], self._filled(target, match, outer), 1)
            for target in targets
        )
        return tuple(names), index

    def _filled(self, target: str, match: re.Match[str], outer: int) -> str:
        """Return ``target`` with the groups in it that stand behind the one of the pattern."""
        word, _, shift = (self.operations[0] if self.operations else "").partition(" ")

        def group(reference: re.Match[str]) -> str:
            text = match[outer + int(reference[1])] or ""
            return str(int(text) + int(shift)) if word == "offset" else text

        return BACKREFERENCE.sub(group, target)


class Naming:
    """The rules of one model.

    Args:
        rules: All of them, in their order.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._renamings = [rule for rule in rules if rule.is_renaming]
        self._converters = [rule for rule in rules if not rule.is_renaming]
        self._known: dict[str, LiveParameters] = {}

    def live(self, name: str) -> LiveParameters:
        """Return what the tensor ``name`` of the files is; itself, where no rule is for it."""
        number = EXPERT.search(name)
        if number is None:
            return self._live(name)
        index = int(number[0])
        found = self._live(EXPERT.sub("0", name, count=1))
        if found.operations and found.operations[0] in LISTED:
            names, source = found.names, found.source
            return LiveParameters(names, source, found.sources, index, found.operations)
        names = tuple(EXPERT.sub(number[0], one, count=1) for one in found.names)
        return LiveParameters(names, found.source, found.sources, None, found.operations)

    def _live(self, name: str) -> LiveParameters:
        if name not in self._known:
            self._known[name] = self._apply(name)
        return self._known[name]

    def _apply(self, name: str) -> LiveParameters:
        for rule in self._renamings:
            if (renamed := rule.apply(name)) is not None:
                ((name,), _) = renamed
        for rule in self._converters:
            if (found := rule.apply(name)) is not None:
                names, source = found
                return LiveParameters(names, source, len(rule.patterns), operations=rule.operations)
        return LiveParameters((name,))


def naming_of(config: Mapping[str, Any]) -> Naming | None:
    """Return the rules of the model that ``config`` describes; ``None`` where there are none.

    Args:
        config: The parsed ``config.json``.
    """
    model_type = config.get("model_type")
    listed = config.get("architectures")
    if not isinstance(model_type, str):
        return None
    table = _table()
    name = listed[0] if isinstance(listed, list) and listed else ""
    name = name if isinstance(name, str) else ""
    if name not in table["classes"] and name not in table["rules"]:
        name = table["auto"].get(model_type, name)
    prefix = str(table["classes"].get(name, [""])[0])
    rules: list[Rule] = []
    seen: dict[str, list[str]] = {}
    for path, kind, kind_type in _parts(name, model_type, config, ""):
        if _is_below(path, seen.get(kind, ())):
            continue
        found = _rules(kind)
        if found is None:
            if _is_below(path, seen.get(kind_type, ())):
                continue
            if (found := _rules(kind_type)) is not None:
                seen.setdefault(kind_type, []).append(path)
        if found is not None:
            seen.setdefault(kind, []).append(path)
            prefixes = _prefixes(path, prefix) if path else None
            rules += (Rule(*each, prefixes) for each in found)
    return Naming(rules) if rules else None


def _is_below(path: str, seen: Sequence[str]) -> bool:
    return any(not other or path.startswith(f"{other}.") for other in seen)


def _prefixes(path: str, prefix: str) -> tuple[str, ...]:
    """Return what the names below ``path`` start with, with the model's prefix and without."""
    scope = path.removeprefix(prefix).removeprefix(".")
    scope = f"{scope}." if scope else ""
    outer = f"{prefix}." if prefix else ""
    return (outer + scope, scope)


def _parts(
    name: str, model_type: str, config: Mapping[str, Any], path: str, depth: int = 0
) -> Iterator[tuple[str, str, str]]:
    """Yield path, class and model type of a model and of those inside of it."""
    yield path, name, model_type
    table = _table()
    for inner, kind, kind_type, key in table["classes"].get(name, [""])[1:]:
        part = config
        for word in filter(None, key.split(".")):
            found = part.get(word)
            part = found if isinstance(found, dict) else {}
        told = part.get("model_type") if key else None
        if isinstance(told, str) and told != kind_type:
            kind, kind_type = table["auto"].get(told, ""), told
        if depth < DEPTH:
            yield from _parts(kind, kind_type, part, f"{path}.{inner}".strip("."), depth + 1)


@cache
def _table() -> dict[str, Any]:
    data = pkgutil.get_data(__name__, TABLE)
    assert data is not None
    table: dict[str, Any] = json.loads(data)
    return table


def _rules(
    name: str,
) -> list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] | None:
    """Return patterns, targets and operations of each rule of a class or model type."""
    found = _table()["rules"].get(name)
    if isinstance(found, str):
        found = _table()["rules"][found]
    if found is None:
        return None
    return [
        (_listed(each[0]), _listed(each[1]), tuple(each[2]) if len(each) > 2 else ())
        for each in found
    ]


def _listed(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
