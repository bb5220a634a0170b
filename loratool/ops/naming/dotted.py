"""Dotted names behind a component, of diffusers or of original checkpoints; and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from loratool.adapter.build import strip_wrappers
from loratool.adapter.model import Site
from loratool.names.paths import (
    Names,
    family_name,
    hub_paths,
    is_native,
    plausible_families,
)
from loratool.names.pipelines import (
    COMFY_ENCODERS,
    COMPONENT,
    ENCODERS,
    component_of,
    encoder_component,
    is_text_model,
    split_native,
)
from loratool.names.positions import text_paths, unet_paths

__all__ = ["from_native", "from_pipeline", "from_positions"]


def from_pipeline(modules: Sequence[str]) -> Names:
    """Return what dotted paths stand for, with or without their component."""
    split = {module: _split(module) for module in modules}
    known = frozenset(component for component, _ in split.values() if component)
    families = plausible_families(
        [local for c, local in split.values() if c not in ENCODERS], known & set(ENCODERS)
    )
    paths = {}
    for module, (component, local) in split.items():
        if component is None and is_text_model(local):
            component = "text_encoder"
        elif component is None and families:
            component = families[0].backbone
        local = strip_wrappers(local)
        paths[module] = (f"{component}.{local}" if component else local,)
    names = [path for (path,) in paths.values()]
    return Names(
        paths,
        family_name(names),
        known | frozenset(component_of(name)[0] or "" for name in names) - {""},
        any(is_native(local) for c, local in split.values() if c not in ENCODERS),
    )


def _split(module: str) -> tuple[str | None, str]:
    match = COMPONENT.fullmatch(module)
    return (match["component"], match["local"]) if match else (None, module)


def from_native(modules: Sequence[str]) -> Names:
    """Return what ComfyUI's paths stand for."""
    split = {module: split_native(module) for module in modules}
    backbone = [local for part, local in split.values() if part == "diffusion_model"]
    parts = {part for part, _ in split.values()} - {"diffusion_model", ""}
    name = COMFY_ENCODERS.family(parts)
    guessed = {encoder_component(part, name, COMFY_ENCODERS) or "" for part in parts} - {""}
    families = plausible_families(backbone, guessed)
    name = families[0].name if len(families) == 1 else name
    paths: dict[str, tuple[str, ...]] = {}
    known = set()
    for module, (part, local) in split.items():
        if part == "diffusion_model":
            paths[module] = hub_paths(local, families)
            known |= {family.backbone for family in families}
        else:
            component = encoder_component(part, name, COMFY_ENCODERS)
            paths[module] = (f"{component}.{local}",) if component else ()
            known |= {component} if component else set()
    return Names(paths, name, frozenset(known), any(map(is_native, backbone)))


def from_positions(sites: Sequence[Site]) -> Names:
    """Return what cloneofsimo's numbers stand for, by the shapes of all modules."""
    groups: dict[str, dict[int, Site]] = defaultdict(dict)
    for site in sites:
        component, _, number = site.module.partition(":")
        groups[component][int(number)] = site
    paths: dict[str, tuple[str, ...]] = {}
    for component, numbered in groups.items():
        ordered = [numbered[number] for number in sorted(numbered)]
        is_whole = sorted(numbered) == list(range(len(numbered)))
        component_name = component
        if not is_whole:
            found = None
        elif component == "unet":
            shapes = [(site.out_features, site.in_features) for site in ordered]
            found = unet_paths(shapes)
            if found is None and len(set(shapes)) == 1 and shapes[0][0] == shapes[0][1]:
                # A list has no names: the layers of a text encoder are all alike.
                component_name, found = "text_encoder", text_paths(len(ordered))
        else:
            found = text_paths(len(ordered))
        for place, site in enumerate(ordered):
            paths[site.module] = (f"{component_name}.{found[place]}",) if found else ()
    known = {path.partition(".")[0] for found in paths.values() for path in found}
    return Names(paths, "sd1" if "unet" in known else None, frozenset(known))
