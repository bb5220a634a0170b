"""What the ways to spell a module share: candidates, families, paths with components."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from loratool.names.diffusion import FAMILIES, Family, family_named, family_of, unflatten
from loratool.names.pipelines import component_of

__all__ = [
    "Names",
    "candidates",
    "family_name",
    "fitting_families",
    "hub_path",
    "hub_paths",
    "is_fused",
    "other_names",
    "sole_name",
]


@dataclass(frozen=True)
class Names:
    """Module to its paths: one where it is known, several where it is ambiguous, else none."""

    paths: Mapping[str, tuple[str, ...]]
    family: str | None = None


@cache
def is_fused(family: str | None) -> bool:
    """Whether the original checkpoints of a family fuse what diffusers has apart.

    The paths of such a file stay native: one module there is several in diffusers.
    """
    if family is None:
        return False
    rows = family_named(family).rows
    return any(len(row.hub.modules) > 1 or row.hub.swapped for row in rows)


def family_name(modules: Iterable[str], hint: str | None = None) -> str | None:
    """Return the family that the paths of a backbone tell, or ``hint``."""
    backbone = [
        local
        for component, local in map(component_of, modules)
        if component is None or not component.startswith("text_encoder")
    ]
    found = family_of(backbone) if backbone else None
    return found.name if found is not None else hint


def fitting_families(modules: Collection[str]) -> list[Family]:
    """Return every family that has all of ``modules``."""
    return [f for f in FAMILIES if modules and all(f.has(module) for module in modules)]


def sole_name(modules: Collection[str]) -> str | None:
    """Return the name of the only family that has all of ``modules``."""
    found = family_of(modules) if modules else None
    return found.name if found else None


def hub_paths(local: str, families: Sequence[Family]) -> tuple[str, ...]:
    """Return what a path of a backbone may be, with its component."""
    if not families:
        return (local,)
    return tuple(dict.fromkeys(hub_path(local, family) for family in families))


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
    """Return what a module of a pipeline's backbone is called in the other naming, if it is one."""
    component, local = component_of(module)
    families = [family_named(family)] if family else [f for f in FAMILIES if f.has(local)]
    found: dict[str, None] = {}
    for item in families if component is not None else ():
        native = item.to_native(local)
        if native is not None and len(native[1].modules) == 1 and not native[1].swapped:
            found[native[0]] = None
        hub = item.from_native(local)
        if hub is not None and len(hub.modules) == 1 and not hub.swapped:
            found[hub.modules[0]] = None
    return list(found)
