"""Everything that a module of an adapter is called: what patterns are matched with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from loratool.adapter.model import Adapter, Extra, ExtraKind, Site
from loratool.adapter.selectors import Spellings
from loratool.names.canonical import canonical_path
from loratool.names.experts import registration_index
from loratool.names.families import claiming, family_named
from loratool.names.paths import fusions, other_names
from loratool.names.paths.component import with_component
from loratool.names.pipelines import (
    BACKBONES,
    COMFY_ENCODERS,
    KOHYA_ENCODERS,
    component_of,
    encoder_component,
    split_flat,
)

__all__ = ["component_names", "spellings_of", "spellings_of_extra", "spellings_of_path"]

ALL_ENCODERS: Final = "te"
"""What means every text encoder, whatever its number."""
NUMBERED: Final = ("te1", "te2", "te3")


def component_names(component: str, family: str | None) -> tuple[str, ...]:
    """Return what a component is called: its folder, and kohya's and ComfyUI's names.

    Args:
        component: As diffusers calls it, such as ``text_encoder_2``.
        family: The pipeline, where known.
    """
    if not component.startswith("text_encoder"):
        is_backbone = component in BACKBONES
        return (component, *(("unet", "diffusion_model") if is_backbone else ()))
    numbers = [
        part for part in NUMBERED if encoder_component(part, family, KOHYA_ENCODERS) == component
    ]
    comfy = COMFY_ENCODERS.of(family).get(component)
    return (component, *numbers, ALL_ENCODERS, *((comfy,) if comfy else ()))


def spellings_of(site: Site, adapter: Adapter) -> Spellings:
    """Return what the module of a site is called."""
    found = _spellings(site.module, adapter)
    parameters = _own_parameters(site)
    own = (site.label, *((site.spelled,) if site.spelled else ()))
    if len(parameters) > 1:  # one of these, and nothing tells which
        parts = (*found.parts, *((parameter,) for parameter in parameters))
        return Spellings(tuple(dict.fromkeys((*own, *found.names))), parts)
    return Spellings(tuple(dict.fromkeys((*own, *parameters, *found.names))), found.parts)


def _own_parameters(site: Site) -> tuple[str, ...]:
    """Return the parameter that a site is on, or all that it may be on.

    Those of one module nest in each other, the first one that transformers registers innermost.
    """
    places = {one: registration_index(one.rpartition(".")[2]) for one in site.parameters}
    known = {one: place for one, place in places.items() if place is not None}
    if len(known) < len(places) or site.nesting >= len(known):
        return site.parameters
    ordered = sorted(known, key=known.__getitem__)
    return (ordered[len(ordered) - 1 - site.nesting],)


def spellings_of_extra(extra: Extra, adapter: Adapter) -> Spellings:
    """Return what a tensor beside the deltas is called: itself, and its module."""
    module = extra.name if extra.kind is ExtraKind.ROWS else extra.name.rpartition(".")[0]
    found = _spellings(module, adapter) if module else Spellings(())
    return Spellings(tuple(dict.fromkeys((extra.key, extra.name, *found.names))), found.parts)


def spellings_of_path(
    module: str, family: str | None = None, components: frozenset[str] = frozenset()
) -> Spellings:
    """Return what the module at a dotted path is called.

    Args:
        module: The path, behind its component where it has one.
        family: The pipeline that it belongs to, where known.
        components: What is a component for certain.
    """
    whole = with_component(module, _backbone(module, family, components), components)
    component, local = component_of(whole, components)
    if component is None:
        return Spellings(tuple(dict.fromkeys((module, canonical_path(module)))))
    names = component_names(component, family)
    locals_ = [local, canonical_path(local), *other_names(whole, family)]
    parts: list[tuple[str, ...]] = []
    for _, native, fusion in fusions(whole, family):
        inside = [part.removeprefix(f"{component}.") for part in fusion.modules]
        if whole in fusion.modules:
            locals_.append(native.removeprefix(f"{component}."))
        elif len(inside) == 1:
            locals_ += inside
        else:
            parts += [tuple(_behind(names, (part,))) for part in inside]
    return Spellings(tuple(dict.fromkeys((module, *_behind(names, locals_)))), tuple(parts))


def _backbone(module: str, family: str | None, known: frozenset[str]) -> str | None:
    """Return the component that a path without one is in, if a family has such a module."""
    if component_of(module, known)[0] is not None:
        return None
    asked = [family_named(family)] if family else claiming([module])
    found = {each.backbone for each in asked if each.has(module)}
    return found.pop() if len(found) == 1 else None


def _spellings(module: str, adapter: Adapter) -> Spellings:
    if module in adapter.unresolved:
        return _of_flat(module, adapter)
    return spellings_of_path(module, adapter.family, adapter.components)


def _of_flat(module: str, adapter: Adapter) -> Spellings:
    """Return the names of a module whose path the file does not tell, by all that it may be."""
    part, flat = split_flat(module)
    component = encoder_component(part, adapter.family, KOHYA_ENCODERS)
    names = component_names(component, adapter.family) if component else (part,) if part else ()
    paths = adapter.unresolved[module]
    parts = (spellings_of_path(path, adapter.family, adapter.components) for path in paths)
    return Spellings((module, *_behind(names, (flat,))), tuple(part.names for part in parts))


def _behind(components: Iterable[str], paths: Iterable[str]) -> Iterator[str]:
    """Yield paths behind each name of their component."""
    paths = tuple(dict.fromkeys(paths))
    return (f"{component}.{path}" for component in components for path in paths)
