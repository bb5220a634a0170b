"""How a scheme spells the modules that it is given; the inverse of ``ops.naming``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from loratool.adapter.part import Part
from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.errors import UnsupportedError
from loratool.names.pipelines import (
    BACKBONES,
    component_of,
    flat_prefix,
    is_text_model,
    native_prefix,
)
from loratool.names.positions import UNET_MODULES, text_paths, unet_paths
from loratool.names.vocabulary import flatten

__all__ = ["Spelled", "spelled", "with_components"]


@dataclass(frozen=True, slots=True)
class Spelled:
    """A module and what a scheme calls it."""

    name: str
    part: Part


def with_components(
    parts: Sequence[Part], backbone: str | None, known: frozenset[str]
) -> list[Part]:
    """Return ``parts`` with the component of a pipeline that their paths leave open.

    Args:
        parts: Some of them perhaps inside a model that is not named.
        backbone: The component that the family of their names makes of it, if there is one.
        known: What is a component for certain.
    """
    made = []
    for part in parts:
        component, local = component_of(part.module, known)
        if component is None and is_text_model(local):
            component = "text_encoder"
        elif component is None:
            component = backbone
        made.append(replace(part, module=f"{component}.{local}") if component else part)
    return made


def spelled(
    parts: Sequence[Part],
    scheme: KeyScheme,
    family: str | None,
    *,
    known: frozenset[str] = frozenset(),
    alone: str | None = None,
) -> list[Spelled]:
    """Return ``parts`` with what ``scheme`` calls their modules, in the order of their paths.

    Args:
        parts: The modules, native or not as the scheme wants them.
        scheme: The scheme.
        family: The pipeline that they belong to, where known.
        known: What is a component for certain.
        alone: The component whose modules go by their own names.

    Raises:
        UnsupportedError: The scheme cannot name one of them, or two by one name.
    """
    if scheme.spelling is Spelling.POSITION:
        return _ordered(_positions(parts))
    found: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        found[_spell(part.module, scheme, family, known, alone)].append(part)
    for name, same in found.items():
        if len({part.nesting for part in same}) < len(same):
            raise UnsupportedError(
                f"scheme {scheme.name}",
                f"{same[0].module!r} and {same[1].module!r} would both be {name!r}",
            )
    return _ordered(Spelled(name, part) for name, same in found.items() for part in same)


def _ordered(found: Iterable[Spelled]) -> list[Spelled]:
    return sorted(found, key=lambda item: (item.part.module, item.name, item.part.nesting))


def _spell(
    module: str, scheme: KeyScheme, family: str | None, known: frozenset[str], alone: str | None
) -> str:
    component, local = component_of(module, known)
    try:
        match scheme.spelling:
            case Spelling.PATH:
                return local if component is not None and component == alone else module
            case Spelling.BARE_FLAT:
                return flatten(local if component is not None and component == alone else module)
            case Spelling.PIPELINE:
                return module if component else _in_transformer(module, scheme)
            case Spelling.FLAT if component is None and scheme.accepts(module):
                return module  # a name that was flat before, and is not known otherwise
            case Spelling.FLAT:
                return flat_prefix(component, family) + flatten(_text_path(component, local))
            case _:
                return native_prefix(component, family) + _text_path(component, local)
    except KeyError:
        raise UnsupportedError(
            module, f"belongs to {component!r}, for which the scheme {scheme.name!r} has no name"
        ) from None


def _in_transformer(module: str, scheme: KeyScheme) -> str:
    """Return the path of a model that is nobody's component: it may only be the backbone.

    Raises:
        UnsupportedError: Behind ``transformer.`` it would be another model's path.
    """
    path = f"transformer.{module}"
    if not scheme.accepts(path):
        raise UnsupportedError(
            module,
            f"is a language model's; the scheme {scheme.name!r} would call it {path!r}, which "
            "is another path there",
        )
    return path


def _text_path(component: str | None, local: str) -> str:
    """Return the path inside a text encoder as all releases before transformers 5 had it."""
    is_text = component is not None and component not in BACKBONES
    if is_text and local.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        return f"text_model.{local}"
    return local


def _positions(parts: Sequence[Part]) -> list[Spelled]:
    """Return the modules by their numbers: all of them, or none can be counted.

    Raises:
        UnsupportedError: One is missing, or has no number.
    """
    by_component: dict[str, dict[str, Part]] = defaultdict(dict)
    for part in parts:
        component, local = component_of(part.module)
        by_component[component or ""][_text_path(component, local)] = part
    found: list[Spelled] = []
    for component, members in by_component.items():
        paths = _numbered(component, len(members))
        missing = [path for path in paths if path not in members]
        foreign = sorted(set(members) - set(paths))
        if foreign or missing or not paths:
            what = f"{foreign[0]!r} has none" if foreign else f"{missing[:1]!r} is missing"
            raise UnsupportedError(
                "scheme cloneofsimo",
                f"numbers the {UNET_MODULES} attention and feed-forward layers of Stable "
                "Diffusion's U-Net and the attention of its text encoder, all of them and no "
                f"others; {what}",
                hint="write a scheme that has names, such as --to kohya",
            )
        found += [
            Spelled(f"{component}:{number}", members[path]) for number, path in enumerate(paths)
        ]
    return found


def _numbered(component: str, count: int) -> list[str]:
    if component == "unet":
        return unet_paths() or []
    if component == "text_encoder":
        return text_paths(count) or []
    return []
