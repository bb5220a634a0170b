"""From the spelling of a file to dotted module paths.

Paths inside a pipeline begin with the component (``unet.down_blocks.0…``). Where a file does
not tell a path, the module keeps the spelling of the file and is listed as unresolved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from loratool.adapter.model import Adapter
from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.names.paths import Names, family_name, is_native
from loratool.names.pipelines import ENCODERS, component_of
from loratool.ops.naming.dotted import from_native, from_pipeline, from_positions
from loratool.ops.naming.flat import from_bare_flat, from_flat
from loratool.ops.naming.shapes import family_by_shape, one_site_an_expert, shaped

__all__ = ["from_paths", "paths_of", "spell_out"]


def spell_out(adapter: Adapter, scheme: KeyScheme, base: Collection[str] = ()) -> Adapter:
    """Return ``adapter`` with dotted module paths, as far as they can be told.

    Args:
        adapter: As it was opened.
        scheme: Its scheme.
        base: Module paths of the base, if it is at hand; they come before all vocabularies.
    """
    if scheme.is_transposed:
        experts = tuple(each for site in adapter.sites for each in one_site_an_expert(site))
        adapter = replace(adapter, sites=experts)
    modules = tuple(dict.fromkeys(site.module for site in adapter.sites))
    match scheme.spelling:
        case Spelling.FLAT:
            names = from_flat(modules, adapter.metadata, base)
        case Spelling.BARE_FLAT:
            names = from_bare_flat(modules, adapter.metadata, base)
        case Spelling.NATIVE:
            names = from_native(modules)
        case Spelling.PIPELINE:
            names = from_pipeline(modules)
        case Spelling.POSITION:
            names = from_positions(adapter.sites)
        case _:
            names = from_paths(modules)
    if names.family is None:
        names = replace(names, family=family_by_shape(adapter.sites, names.paths))
    clashes = _clashes(names.paths)
    sites = []
    unresolved = {}
    for site in adapter.sites:
        paths = names.paths[site.module]
        if len(paths) != 1 or paths[0] in clashes:
            unresolved[site.module] = paths
            sites.append(site)
            continue
        sites.append(shaped(replace(site, module=paths[0]), scheme))
    return replace(
        adapter,
        sites=tuple(sites),
        unresolved=unresolved,
        family=names.family,
        components=names.components,
        is_native=names.is_native,
    )


def from_paths(modules: Sequence[str]) -> Names:
    """Return what dotted paths tell by themselves."""
    split = [component_of(module) for module in modules]
    known = frozenset(component for component, _ in split if component)
    native = any(is_native(local) for c, local in split if c not in ENCODERS)
    return Names({m: (m,) for m in modules}, family_name(modules), known, native)


def paths_of(names: Sequence[str], scheme: KeyScheme) -> Mapping[str, tuple[str, ...]]:
    """Return what flattened names may stand for, as far as vocabularies tell."""
    is_bare = scheme.spelling is Spelling.BARE_FLAT
    return (from_bare_flat if is_bare else from_flat)(names, {}, ()).paths


def _clashes(paths: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return paths that two names of the file would stand for."""
    seen: dict[str, int] = defaultdict(int)
    for found in paths.values():
        if len(found) == 1:
            seen[found[0]] += 1
    return {path for path, count in seen.items() if count > 1}
