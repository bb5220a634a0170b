"""From the naming of one convention to that of another, where one module may be several."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from loratool.adapter.part import Part
from loratool.adapter.scheme import Paths
from loratool.errors import OptionError, UnsupportedError
from loratool.names.families import claiming, family_named
from loratool.names.family import Family, Fusion
from loratool.names.paths import families_of_modules
from loratool.names.pipelines import BACKBONES, component_of
from loratool.names.vocabulary import flatten
from loratool.write.fused_projections import split_fused, swapped
from loratool.write.fusion import fused

__all__ = ["Naming", "families_of", "to_hub", "to_native", "without_foreign"]

Found = TypeVar("Found")
PLACES: Final = (None, *BACKBONES)


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

    def is_foreign(self, local: str) -> bool:
        """Whether a native path is of a naming that is read, and never written."""
        found = [f for f in self.families if f.from_native(local) and not f.to_native(local)]
        return bool(found) and not any(f.is_written(local) for f in found)

    def native(self, local: str) -> tuple[str, Fusion] | None:
        """Return the native module that holds a path of diffusers, or ``None``.

        Raises:
            UnsupportedError: The families disagree.
        """
        found = [f.to_native(local) for f in self.families]
        return self._one(local, [item for item in found if item is not None])

    def of(self, paths: Paths) -> Naming:
        """Return the same families by the native names that a scheme's paths have for them."""
        own = tuple(paths.own(family) for family in self.families)
        is_same = all(one is other for one, other in zip(own, self.families, strict=True))
        return self if is_same else Naming(own)

    def unknown(self, modules: Iterable[str], known: frozenset[str]) -> list[str]:
        """Return the paths of a backbone that no family has, without their component.

        Args:
            modules: Paths, with their component or without.
            known: What is a component for certain.
        """
        places = (component_of(module, known) for module in modules)
        return [
            local
            for component, local in places
            if component in PLACES and not any(family.has(local) for family in self.families)
        ]

    def originals(self, modules: Iterable[str], known: frozenset[str]) -> list[str]:
        """Return those of ``modules`` that only original checkpoints have, by the vocabularies."""
        unknown = {local: flatten(local) for local in self.unknown(modules, known)}
        return [
            local
            for local, flat in unknown.items()
            if any(local in family.native_names.parse(flat) for family in self.families)
            and not any(local in family.hub_names.parse(flat) for family in self.families)
        ]

    def __str__(self) -> str:
        return " or ".join(family.name for family in self.families)

    def _one(self, local: str, found: Sequence[Found]) -> Found | None:
        if len(set(found)) > 1:
            names = ", ".join(family.name for family in self.families)
            raise UnsupportedError(
                local,
                f"has different counterparts in {names}, and nothing tells which model this is",
                hint="say it with --family, one of these",
            )
        return next(iter(found), None)


def families_of(modules: Collection[str], name: str | None, told: str | None = None) -> Naming:
    """Return the families that the backbone's ``modules`` may belong to.

    Args:
        modules: Paths, with their component or without.
        name: The one that somebody named.
        told: The one that the base is of, which is meant where it is one of several.

    Raises:
        OptionError: ``name`` is a family that has none of them.
    """
    locals_ = [local for component, local in map(component_of, modules) if component in PLACES]
    if name is None:
        found = families_of_modules(modules)
        mine = [family for family in found if family.name == told]
        return Naming(tuple(mine or found))
    family = family_named(name)
    is_empty = any(f.has(local) for f in claiming(locals_) for local in locals_)
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
    if len(names) > 1:
        yield from split_fused(part, names, fusion)
    elif fusion.swapped:
        yield replace(swapped(part), module=names[0])
    else:
        yield replace(part, module=names[0])


def to_native(
    parts: Sequence[Part], naming: Naming, shapes: Mapping[str, tuple[int, ...]]
) -> list[Part]:
    """Return ``parts`` under the names of original checkpoints: projections are fused.

    Args:
        parts: Under either naming.
        naming: The families that they may belong to.
        shapes: Shapes of the base's weights by module path, where it is at hand.

    Raises:
        UnsupportedError: Two are of one module.
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
        other = groups[name][1].setdefault(local, part)
        if other is not part:
            raise UnsupportedError(
                part.label,
                f"has outputs in common with {other.label!r}, both of {local!r}",
                hint="leave out one of them with --skip, or merge both into their base",
            )
    made = []
    for item in order:
        if isinstance(item, Part):
            made.append(item)
        else:
            fusion, members = groups[item]
            made.append(fused(item, fusion, members, shapes))
    return made


def without_foreign(parts: Sequence[Part], naming: Naming) -> Iterator[Part]:
    """Yield ``parts``, diffusers' where they are under a native name that is never written."""
    for part in parts:
        component, local = component_of(part.module)
        if component in PLACES and naming.is_foreign(local):
            yield from _split(part, naming)
        else:
            yield part
