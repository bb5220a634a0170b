"""What the ways to spell a module share: candidates, families, paths with components."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Final, TypeVar

from loratool.names.families import claiming, family_named, unrefined
from loratool.names.family import Family, Fusion
from loratool.names.flattening import unflatten
from loratool.names.pipelines import ENCODERS, component_of, family_of_encoders

__all__ = [
    "candidates",
    "families_of_modules",
    "family_name",
    "fitting_families",
    "fusions",
    "having_most",
    "hub_path",
    "hub_paths",
    "is_fused",
    "is_native",
    "other_names",
    "plausible_families",
    "with_several_encoders",
]


T = TypeVar("T")
FEW: Final = 32
"""Modules by which the likely families are told."""


@cache
def is_fused(family: str | None) -> bool:
    """Whether the original checkpoints of a family fuse what diffusers has apart.

    The paths of such a file stay native: one module there is several in diffusers.
    """
    return family is not None and family_named(family).is_fused


def plausible_families(backbone: Collection[str], encoders: Collection[str] = ()) -> list[Family]:
    """Return the families that have most of the paths of a backbone, and at least half of them.

    Those that refine another one of them are not meant.

    Args:
        backbone: Paths without component, in either naming.
        encoders: Components of text encoders beside it.
    """
    return unrefined(fitting_families(backbone, encoders), backbone)


def fitting_families(backbone: Collection[str], encoders: Collection[str] = ()) -> list[Family]:
    """Return the same with those that refine another one of them."""
    found = having_most(claiming(backbone), backbone, Family.has)
    if any(encoder != "text_encoder" for encoder in encoders):
        found = with_several_encoders(found)
    return found


def having_most(
    asked: Sequence[Family], items: Collection[T], has: Callable[[Family, T], bool]
) -> list[Family]:
    """Return the families that have most of some modules, and at least half of them.

    The likely ones are asked first, so that the others need not be asked about every module.

    Args:
        asked: The families.
        items: The modules.
        has: Whether a family has one of them.
    """
    few = list(islice(items, FEW))
    likely = sorted(asked, key=lambda family: -sum(has(family, item) for item in few))
    allowed = len(items) // 2
    found: dict[str, int] = {}
    for family in likely:
        missing = 0
        for item in items:
            missing += not has(family, item)
            if missing > allowed:
                break
        else:
            allowed = min(allowed, missing)
            found[family.name] = missing
    return [family for family in asked if items and found.get(family.name) == allowed]


def with_several_encoders(found: Sequence[Family]) -> list[Family]:
    """Return those that have more than one text encoder; all, if that leaves none."""
    return [family for family in found if len(family.encoders) != 1] or list(found)


def families_of_modules(modules: Iterable[str]) -> list[Family]:
    """Return the same for paths with their components."""
    split = [component_of(module) for module in modules]
    encoders = {c for c, _ in split if c in ENCODERS}
    return plausible_families([local for c, local in split if c not in ENCODERS], encoders)


def family_name(modules: Collection[str]) -> str | None:
    """Return the one family that the paths of a pipeline tell, by backbone or by encoders."""
    found = families_of_modules(modules)
    if len(found) == 1:
        return found[0].name
    return None if found else family_of_encoders(modules)


def is_native(local: str) -> bool:
    """Whether a path is one of original checkpoints only."""
    asked = claiming([local])
    return any(f.from_native(local) is not None for f in asked) and not any(
        f.to_native(local) is not None for f in asked
    )


def hub_paths(local: str, families: Sequence[Family]) -> tuple[str, ...]:
    """Return what a path of a backbone may be, with its component.

    Backbones of families that no table has are transformers, as all have been of late. A path
    stays as it is where the families have different names for it.
    """
    if not families:
        return (f"transformer.{local}",)
    found = dict.fromkeys(hub_path(local, family) for family in families)
    if len(found) > 1:
        found = dict.fromkeys(f"{family.backbone}.{local}" for family in families)
    return tuple(found)


def hub_path(local: str, family: Family) -> str:
    """Return the path with its component; diffusers' own where that is the same module."""
    if not is_fused(family.name):
        fusion = family.from_native(local)
        if fusion is not None:
            return f"{family.backbone}.{fusion.modules[0]}"
    return f"{family.backbone}.{local}"


def candidates(flat: str, kinds: Iterable[str]) -> tuple[str, ...]:
    """Return every path of these vocabularies that flattens to ``flat``."""
    return tuple(dict.fromkeys(path for kind in kinds for path in unflatten(flat, kind)))


def other_names(module: str, family: str | None) -> list[str]:
    """Return what a module of a pipeline's backbone is called otherwise, if it is one."""
    component, local = component_of(module)
    if component is None:
        return []
    families = [family_named(family)] if family else claiming([local])
    found = dict.fromkeys(name for item in families for name in item.names(local))
    return [name for name in found if name != local]


def fusions(module: str, family: str | None) -> list[tuple[str, str, Fusion]]:
    """Return the projections that a module of a backbone is, or is part of, in some naming.

    Returns:
        For each, what the module goes by in it, the native path, and what it is made of, all
        with the component; none where all namings have the module alike.
    """
    component, local = component_of(module)
    if component is None:
        return []
    found: dict[tuple[str, str, Fusion], None] = {}
    for item in [family_named(family)] if family else claiming([local]):
        made = item.from_native(local)
        if made is not None and not made.is_plain:
            found[local, local, made] = None
        for name in item.names(local)[-1:]:
            found |= dict.fromkeys((name, *whole) for whole in item.wholes(name))
    return [
        (f"{component}.{name}", f"{component}.{whole}", _inside(component, made))
        for name, whole, made in found
        if not made.is_plain
    ]


def _inside(component: str, fusion: Fusion) -> Fusion:
    """Return a fusion of modules with their component."""
    return replace(fusion, modules=tuple(f"{component}.{part}" for part in fusion.modules))
