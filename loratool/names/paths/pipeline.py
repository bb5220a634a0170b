"""Dotted paths behind the name of a pipeline's component, as diffusers has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.build import strip_wrappers
from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.paths import family_name, is_native, plausible_families
from loratool.names.paths.component import EachAlone
from loratool.names.pipelines import COMPONENT, ENCODERS, component_of, is_text_model

__all__ = ["PipelinePaths", "ProcessorPaths"]

MOTION: Final = ".temporal_transformer."
"""Inside the paths of AnimateDiff's own modules."""


@dataclass(frozen=True)
class PipelinePaths(EachAlone):
    """Dotted paths behind the name of a component."""

    has_components: bool = True
    follows_base: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the path; that of a model which is nobody's component is a transformer's.

        Raises:
            UnsupportedError: Behind ``transformer.`` it would be another model's path.
        """
        if component:
            return module
        path = f"transformer.{module}"
        if not context.accepts(path):
            raise UnsupportedError(
                module,
                f"is a language model's; the scheme {context.scheme!r} would call it {path!r}, "
                "which is another path there",
                hint="write another scheme, such as with --to peft",
            )
        return path

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what dotted paths stand for."""
        return from_pipeline(tuple(dict.fromkeys(site.module for site in sites)))


@dataclass(frozen=True)
class ProcessorPaths(PipelinePaths):
    """The same, but for AnimateDiff's motion modules in their original names, which have none."""

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the path, of an original motion module as AnimateDiff has it."""
        path = super().name(module, component, local, context)
        return local if MOTION in local else path

    def writes_native(
        self, wish: str | None, families: Sequence[str], *, is_native: bool
    ) -> bool | None:
        """Return that only motion modules may go by their original names."""
        if tuple(families) != ("animatediff",):
            return super().writes_native(wish, families, is_native=is_native)
        return is_native if wish is None else wish == "native"


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
