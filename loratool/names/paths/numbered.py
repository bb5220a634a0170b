"""The place of a module in its model: cloneofsimo's way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.paths.component import Paths, text_path
from loratool.names.pipelines import component_of
from loratool.names.positions import UNET_MODULES, text_paths, unet_paths

__all__ = ["NumberedPaths"]


@dataclass(frozen=True)
class NumberedPaths(Paths):
    """Numbers, in the order in which the modules of Stable Diffusion are registered."""

    has_components: bool = True
    is_whole: bool = True
    is_narrow: bool = True

    def spell(self, modules: Sequence[str], context: Context) -> list[str]:
        """Return the modules' numbers: all have one, or none can be counted.

        Raises:
            UnsupportedError: One is missing, or has no number.
        """
        by_component: dict[str, dict[str, str]] = defaultdict(dict)
        for module in modules:
            component, local = component_of(module)
            by_component[component or ""][text_path(component, local)] = module
        found: dict[str, str] = {}
        for component, members in by_component.items():
            paths = _numbered(component, len(members))
            missing = [path for path in paths if path not in members]
            foreign = sorted(set(members) - set(paths))
            if foreign or missing or not paths:
                what = f"{foreign[0]!r} has none" if foreign else f"{missing[:1]!r} is missing"
                raise UnsupportedError(
                    f"scheme {context.scheme}",
                    f"numbers the {UNET_MODULES} attention and feed-forward layers of Stable "
                    "Diffusion's U-Net and the attention of its text encoder, all of them and no "
                    f"others; {what}",
                    hint="write a scheme that has names, such as --to kohya",
                )
            found |= {members[path]: f"{component}:{n}" for n, path in enumerate(paths)}
        return [found[module] for module in modules]

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what the numbers stand for, by the shapes of all modules."""
        return from_positions(sites)

    def refusal(self, count: int) -> str | None:
        """Return what numbers have to be."""
        return (
            f"numbers {count} modules in a way that fits no Stable Diffusion: expected "
            f"{UNET_MODULES} of the U-Net, all of them, in one of two orders"
        )


def _numbered(component: str, count: int) -> list[str]:
    if component == "unet":
        return unet_paths() or []
    if component == "text_encoder":
        return text_paths(count) or []
    return []


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
