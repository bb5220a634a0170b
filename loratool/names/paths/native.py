"""Dotted paths of original checkpoints behind a prefix for the component, as ComfyUI has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.names.family import Family
from loratool.names.paths import hub_paths, is_native, plausible_families
from loratool.names.paths.component import EachAlone, text_path
from loratool.names.pipelines import (
    COMFY_ENCODERS,
    encoder_component,
    native_prefix,
    split_native,
)

__all__ = ["NativePaths"]


@dataclass(frozen=True)
class NativePaths(EachAlone):
    """Dotted paths of the original checkpoint, behind a prefix for the component."""

    has_components: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the path behind its prefix."""
        return native_prefix(component, context.family) + text_path(component, local)

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what ComfyUI's paths stand for."""
        return from_native(tuple(dict.fromkeys(site.module for site in sites)))

    def writes_native(
        self, wish: str | None, families: Sequence[str], *, is_native: bool
    ) -> bool | None:
        """Return that it is so, unless somebody said otherwise."""
        return wish is None or wish == "native"


def from_native(modules: Sequence[str]) -> Names:
    """Return what ComfyUI's paths stand for."""
    split = {module: split_native(module) for module in modules}
    backbone = [local for part, local in split.values() if part == "diffusion_model"]
    parts = {part for part, _ in split.values()} - {"diffusion_model", ""}
    name = COMFY_ENCODERS.family(parts, plausible_families(backbone))
    guessed = {encoder_component(part, name, COMFY_ENCODERS) or "" for part in parts} - {""}
    families = _natively_named(plausible_families(backbone, guessed), backbone)
    name = families[0].name if len(families) == 1 else name
    paths: dict[str, tuple[str, ...]] = {}
    known = set()
    for module, (part, local) in split.items():
        if part == "diffusion_model":
            paths[module] = hub_paths(local, families)
            known |= {family.backbone for family in families} or {"transformer"}
        else:
            component = encoder_component(part, name, COMFY_ENCODERS)
            paths[module] = (f"{component}.{local}",) if component else ()
            known |= {component} if component else set()
    # Those of a family that no table has are native too: nothing else is said of them here.
    is_unknown = bool(backbone) and not families
    return Names(paths, name, frozenset(known), is_unknown or any(map(is_native, backbone)))


def _natively_named(families: list[Family], backbone: Sequence[str]) -> list[Family]:
    """Return the families of which all these are original names; all, if that leaves none."""
    native = [
        family
        for family in families
        if all(family.from_native(local) or not family.has(local) for local in backbone)
    ]
    return native or families
