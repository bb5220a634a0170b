"""Flattened module names: restored from the base, or from vocabularies, or not at all."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.names.families import claiming, family_named, unrefined
from loratool.names.family import Family
from loratool.names.flattening import BACKBONE
from loratool.names.paths import (
    candidates,
    family_name,
    having_most,
    hub_paths,
    is_native,
    other_names,
    with_several_encoders,
)
from loratool.names.paths.component import EachAlone, text_path
from loratool.names.pipelines import (
    BACKBONES,
    COMPONENT,
    ENCODERS,
    KOHYA_ENCODERS,
    SECOND,
    component_of,
    encoder_component,
    encoder_kinds,
    flat_prefix,
    split_flat,
)
from loratool.names.vocabulary import flatten

__all__ = ["BareFlatPaths", "FlatPaths"]

MODULES_KEY: Final = "loratool_modules"
"""Metadata: flattened names and the paths that they stand for, where no vocabulary has them."""
BACKBONE_PARTS: Final = ("unet", "transformer", "prior_unet", "")


def from_flat(modules: Sequence[str], metadata: Mapping[str, str], base: Collection[str]) -> Names:
    """Return what kohya's names stand for: by metadata, by the base, or by vocabularies."""
    split = {module: split_flat(module) for module in modules}
    known = _recorded(metadata)
    found = {
        module: candidates(flat, (BACKBONE,))
        for module, (part, flat) in split.items()
        if module not in known and part in BACKBONE_PARTS
    }
    parts = {part for part, _ in split.values()}
    families = _families_of(found, has_more_encoders=bool(parts & {"te1", "te2", "te3"}))
    name = families[0].name if len(families) == 1 else KOHYA_ENCODERS.family(parts, families)
    of_base = _by_flat(base)
    paths: dict[str, tuple[str, ...]] = {}
    components = set()
    for module, (part, flat) in split.items():
        if module in known:
            paths[module] = (known[module],)
            is_inside = not module.endswith(flatten(known[module]))
            components |= {known[module].partition(".")[0]} if is_inside else set()
            continue
        backbone = found.get(module, ())
        whole = module.partition("_")[2]
        if whole in of_base:
            paths[module] = of_base[whole]
        elif flat in of_base:
            mine = [path for path in of_base[flat] if _is_of_part(path, part, name)]
            paths[module] = tuple(_with_component(path, part, name) for path in mine)
        elif encoder_kinds(part):
            paths[module] = _encoder_paths(part, flat, name)
        elif having := _having(families, flat):
            paths[module] = tuple(
                dict.fromkeys(full for path in having for full in hub_paths(path, having[path]))
            )
        elif part and len(backbone) == 1:  # of a model whose family has no table
            component = families[0].backbone if families else "transformer"
            paths[module] = (f"{component}.{backbone[0]}",)
        elif part in ("", "transformer"):  # many language models have a module of that name
            paths[module] = candidates(whole, ("language-model",))
            continue
        else:
            paths[module] = ()
        if part and whole not in of_base:
            components |= {path.partition(".")[0] for path in paths[module]}
    locals_ = [paths_[0] for paths_ in found.values() if paths_]
    return Names(paths, name, frozenset(components), any(map(is_native, locals_)))


def _is_of_part(path: str, part: str, family: str | None) -> bool:
    """Whether a path of the base is in the component that kohya's prefix means."""
    component = component_of(path)[0]
    if component is None or not part:
        return True
    if encoder_kinds(part):
        return component == encoder_component(part, family, KOHYA_ENCODERS)
    return component in BACKBONES and component != SECOND


def _families_of(found: Mapping[str, tuple[str, ...]], *, has_more_encoders: bool) -> list[Family]:
    """Return the families that most of the names that any family has could belong to."""
    named = [paths for paths in found.values() if paths]
    asked = claiming(path for paths in named for path in paths)
    families = having_most(asked, named, lambda family, paths: any(map(family.has, paths)))
    if has_more_encoders:
        families = with_several_encoders(families)
    return unrefined(families, [path for paths in named for path in paths])


def _having(families: Iterable[Family], flat: str) -> dict[str, list[Family]]:
    """Return the paths that families have for a flattened one, and which have each."""
    found: dict[str, list[Family]] = defaultdict(list)
    for family in families:
        for path in filter(family.has, family.parse(flat)):
            found[path].append(family)
    return found


def _encoder_paths(part: str, flat: str, family: str | None) -> tuple[str, ...]:
    found = candidates(flat, encoder_kinds(part))
    component = encoder_component(part, family, KOHYA_ENCODERS)
    return tuple(f"{component}.{path}" for path in found) if component else ()


def _with_component(path: str, part: str, family: str | None) -> str:
    """Return a path of the base with its component, where the base is only that component."""
    if component_of(path)[0] is not None or not part:
        return path
    if encoder_kinds(part):
        component = encoder_component(part, family, KOHYA_ENCODERS)
    else:
        component = family_named(family).backbone if family else "unet"
    return f"{component}.{path}" if component else path


def _by_flat(base: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the base's paths by flattened path, with and without their component."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for path in base:
        found[flatten(path)][path] = None
        component, local = component_of(path)
        if component is not None:
            found[flatten(local)][path] = None
    return {flat: tuple(paths) for flat, paths in found.items()}


def from_bare_flat(
    modules: Sequence[str], metadata: Mapping[str, str], base: Collection[str]
) -> Names:
    """Return what flattened names without any prefix stand for."""
    known = _recorded(metadata)
    of_base = _by_flat(base)
    paths: dict[str, tuple[str, ...]] = {}
    for module in modules:
        if module in known:
            paths[module] = (known[module],)
        elif module in of_base:
            paths[module] = of_base[module]
        else:
            paths[module] = _bare_candidates(module)
    paths = _told_by_others(paths)
    sole = [found[0] for found in paths.values() if len(found) == 1]
    components = frozenset(component_of(path)[0] or "" for path in sole) - {""}
    return Names(paths, family_name(sole), components)


def _told_by_others(paths: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return ``paths``, where they are several those of the family that most others are of."""
    if all(len(found) < 2 for found in paths.values()):
        return dict(paths)
    locals_ = {
        module: tuple(component_of(path)[1] for path in found) for module, found in paths.items()
    }
    families = _families_of(locals_, has_more_encoders=False)
    told = {}
    for module, found in paths.items():
        mine = [
            path
            for path, local in zip(found, locals_[module], strict=True)
            if local in _having(families, flatten(local))
        ]
        told[module] = tuple(mine) if len(found) > 1 and mine else found
    return told


def _bare_candidates(flat: str) -> tuple[str, ...]:
    for component in (*BACKBONES, *reversed(ENCODERS)):
        if flat.startswith(f"{component}_"):
            rest = flat.removeprefix(f"{component}_")
            is_text = component.startswith("text")
            kinds = ("clip", "t5") if is_text else (BACKBONE,)
            found = candidates(rest, kinds)
            if found:
                # A backbone may begin with a word that is a component's name too.
                inside = tuple(f"{component}.{path}" for path in found)
                return inside if is_text else (*inside, *candidates(flat, (BACKBONE,)))
    return candidates(flat, ("any",))


def _recorded(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what the metadata records about flattened names, where it can be true."""
    try:
        found = json.loads(metadata.get(MODULES_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: path for name, path in found.items() if isinstance(path, str) and _may_be(name, path)
    }


def _may_be(name: str, path: str) -> bool:
    """Whether a flattened name can be that of a path, with or without its component."""
    match = COMPONENT.fullmatch(path)
    inside = match["local"] if match else path
    return name.endswith((flatten(path), flatten(inside)))


def _unsaid(paths: Mapping[str, str], tell: Callable[[Sequence[str]], Names]) -> Mapping[str, str]:
    """Return the metadata that records the paths which names do not tell by themselves."""
    told = tell(list(paths)).paths
    unknown = {
        name: path
        for name, path in paths.items()
        if told.get(name) not in {(same,) for same in _equal_paths(path)}
    }
    return {MODULES_KEY: json.dumps(unknown, sort_keys=True)} if unknown else {}


def _equal_paths(path: str) -> list[str]:
    """Return a path, and what the same module is called in the other naming."""
    component = path.partition(".")[0]
    return [path, *(f"{component}.{name}" for name in other_names(path, None))]


@dataclass(frozen=True)
class FlatPaths(EachAlone):
    """Underscores for dots, behind a prefix for the component: kohya's way."""

    has_components: bool = True
    keeps_unknown: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the flattened path behind its prefix."""
        if component is None and context.accepts(module):
            return module  # a name that was flat before, and is not known otherwise
        prefix = flat_prefix(component, context.family)
        return prefix + flatten(text_path(component, local))

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what kohya's names stand for."""
        return from_flat(tuple(dict.fromkeys(site.module for site in sites)), metadata, base)

    def record(self, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Return the paths that their names do not tell."""
        return _unsaid(paths, lambda names: from_flat(names, {}, ()))

    def writes_native(
        self, wish: str | None, families: Sequence[str], *, is_native: bool
    ) -> bool | None:
        """Return whether the native names are used: for all but Stable Diffusion 1 and 2."""
        if wish is not None:
            return wish == "native"
        usual = {family_named(family).is_trained_native for family in families}
        # Stable Diffusion 1 or XL, or an unknown one: what was read is what is written.
        return usual.pop() if len(usual) == 1 else is_native


@dataclass(frozen=True)
class BareFlatPaths(EachAlone):
    """Underscores for dots, and no prefix."""

    follows_base: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the flattened path."""
        is_alone = component is not None and component == context.alone
        return flatten(local if is_alone else module)

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what flattened names stand for."""
        return from_bare_flat(tuple(dict.fromkeys(site.module for site in sites)), metadata, base)

    def record(self, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Return the paths that their names do not tell."""
        return _unsaid(paths, lambda names: from_bare_flat(names, {}, ()))
