"""What the ways to spell a module share: its component, and one module at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratool.adapter.scheme import Context
from loratool.errors import UnsupportedError
from loratool.names.family import Family
from loratool.names.pipelines import BACKBONES, component_of, is_text_model

__all__ = ["EachAlone", "Paths", "text_path", "with_component"]


@dataclass(frozen=True)
class Paths:
    """What holds of most spellings; see :class:`loratool.adapter.scheme.Paths`."""

    has_components: bool = False
    is_dotted: bool = False
    is_whole: bool = False
    is_narrow: bool = False
    keeps_unknown: bool = False
    follows_base: bool = False

    def record(self, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Record nothing: names tell the paths."""
        return {}

    def writes_native(
        self, wish: str | None, families: Sequence[str], *, is_native: bool
    ) -> bool | None:
        """Return that there is no choice."""
        return None

    def own(self, family: Family) -> Family:
        """Return the family: its native names are those of its checkpoints."""
        return family

    def refusal(self, count: int) -> str | None:
        """Know no reason."""
        return None

    def parameter(self, name: str) -> str:
        """Return the name."""
        return name


@dataclass(frozen=True)
class EachAlone(Paths):
    """A spelling in which the name of a module does not depend on the others."""

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return what a module is called.

        Args:
            module: Its path.
            component: The component that it is in, if any.
            local: The path inside it.
            context: What else it depends on.

        Raises:
            KeyError: The component has no name.
            UnsupportedError: The module has none.
        """
        raise NotImplementedError

    def spell(self, modules: Sequence[str], context: Context) -> list[str]:
        """Return what modules are called.

        Raises:
            UnsupportedError: One has no name.
        """
        found = []
        for module in modules:
            component, local = component_of(module, context.known)
            try:
                found.append(self.name(module, component, local, context))
            except KeyError:
                raise UnsupportedError(
                    module,
                    f"belongs to {component!r}, for which the scheme {context.scheme!r} has no "
                    "name",
                ) from None
        return found


def text_path(component: str | None, local: str) -> str:
    """Return the path inside a text encoder as all releases before transformers 5 had it."""
    is_text = component is not None and component not in BACKBONES
    if is_text and local.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        return f"text_model.{local}"
    return local


def with_component(module: str, backbone: str | None, known: frozenset[str]) -> str:
    """Return a path with the component of a pipeline, where it leaves that open.

    Args:
        module: The path, perhaps inside a model that is not named.
        backbone: The component that the family of the names makes of it, if there is one.
        known: What is a component for certain.
    """
    component, local = component_of(module, known)
    if component is None and is_text_model(local):
        component = "text_encoder"
    elif component is None:
        component = backbone
    return f"{component}.{local}" if component else module
