"""Dotted paths inside one model, as it has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.names.families import claiming
from loratool.names.paths import family_name, is_native, plausible_families
from loratool.names.paths.component import EachAlone
from loratool.names.pipelines import ENCODERS, component_of

__all__ = ["PathPaths", "from_paths"]

NET: Final = "net."
"""What NVIDIA's trainers have before the names of their diffusion models."""


@dataclass(frozen=True)
class PathPaths(EachAlone):
    """Dotted paths, with their component where several are written."""

    is_dotted: bool = True
    follows_base: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the path."""
        return local if component is not None and component == context.alone else module

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what the paths tell by themselves."""
        return from_paths(tuple(dict.fromkeys(site.module for site in sites)))


def from_paths(modules: Sequence[str]) -> Names:
    """Return what dotted paths tell by themselves."""
    inside = [module.removeprefix(NET) for module in modules if module.startswith(NET)]
    if len(inside) == len(modules) and plausible_families(inside):
        names = from_paths(inside)
        return replace(names, paths={f"{NET}{name}": found for name, found in names.paths.items()})
    split = [component_of(module) for module in modules]
    known = frozenset(component for component, _ in split if component)
    locals_ = [local for c, local in split if c not in ENCODERS]
    native = bool(claiming(locals_)) and any(is_native(local) for local in locals_)
    return Names({m: (m,) for m in modules}, family_name(modules), known, native)
