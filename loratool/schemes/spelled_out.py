"""From the spelling of a file to dotted module paths.

Paths inside a pipeline begin with the component (``unet.down_blocks.0…``). Where a file does
not tell a path, the module keeps the spelling of the file and is listed as unresolved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from loratool.adapter.model import Adapter, Extra
from loratool.adapter.scheme import Scheme
from loratool.names.shapes import family_by_shape

__all__ = ["spell_out"]


def spell_out(adapter: Adapter, scheme: Scheme, base: Collection[str] = ()) -> Adapter:
    """Return ``adapter`` with dotted module paths, as far as they can be told.

    Args:
        adapter: As it was opened.
        scheme: Its scheme.
        base: Module paths of the base, if it is at hand; they come before all vocabularies.
    """
    apart = tuple(each for site in adapter.sites for each in scheme.roles.apart(site))
    adapter = replace(adapter, sites=apart)
    names = scheme.paths.unspell(adapter.sites, adapter.metadata, base)
    family = family_by_shape(adapter.sites, names.paths, names.family)
    names = replace(names, family=family)
    clashes = _clashes(names.paths)
    sites = []
    unresolved = {}
    for site in adapter.sites:
        paths = names.paths[site.module]
        if len(paths) != 1 or paths[0] in clashes:
            unresolved[site.module] = paths
            sites.append(site)
            continue
        named = site
        if site.module != paths[0]:
            named = replace(site, module=paths[0], spelled=site.module)
        sites.append(scheme.roles.read(named))
    return replace(
        adapter,
        sites=tuple(sites),
        extras=tuple(_named(extra, scheme) for extra in adapter.extras),
        unresolved=unresolved,
        unknown=scheme.paths.refusal(len(unresolved)) if unresolved else None,
        family=names.family,
        components=names.components,
        is_native=names.is_native,
    )


def _named(extra: Extra, scheme: Scheme) -> Extra:
    name = scheme.paths.parameter(extra.name)
    return extra if name == extra.name else replace(extra, name=name)


def _clashes(paths: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return paths that two names of the file would stand for."""
    seen: dict[str, int] = defaultdict(int)
    for found in paths.values():
        if len(found) == 1:
            seen[found[0]] += 1
    return {path for path, count in seen.items() if count > 1}
