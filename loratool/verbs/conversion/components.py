"""Which components of a pipeline are written, and under which paths of the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from loratool.adapter.model import Adapter
from loratool.adapter.part import Part
from loratool.adapter.scheme import Scheme
from loratool.base.fused import parts_apart
from loratool.base.model import Model
from loratool.errors import AdapterError, OptionError, nearest_name
from loratool.names.pipelines import COMPONENTS, FIRST, SECOND, component_of
from loratool.write.fused_projections import split_rows

__all__ = ["as_in_base", "of_component"]

TEXT_MODEL: Final = "text_model."


def of_component(
    parts: Sequence[Part], component: str | None, known: frozenset[str]
) -> tuple[list[Part], list[tuple[str, str]]]:
    """Return the parts of one component, and the names of the others with the reason.

    Modules that are in no component are said to be in this one; so are those of a model that is
    alone in its file, where the second of two experts is asked for.

    Raises:
        OptionError: There is no such component.
    """
    if component is None:
        return list(parts), []
    kept, others = [], []
    split = [component_of(part.module, known | {component}) for part in parts]
    found = {own for own, _ in split}
    for part, (own, local) in zip(parts, split, strict=True):
        is_second = component == SECOND not in found and own == FIRST
        if own is None or is_second:
            kept.append(replace(part, module=f"{component}.{local}"))
        elif own == component:
            kept.append(part)
        else:
            others.append((part.module, f"not in --component {component}"))
    if component not in COMPONENTS or not kept:
        there = sorted(name for name in found if name)
        if component not in COMPONENTS and not set(there) & set(COMPONENTS):
            raise OptionError.none_of("--component", component, COMPONENTS)
        raise OptionError(
            "--component",
            f"{component!r} has no modules; there are: {', '.join(there) or 'none'}",
            hint=f"did you mean --component {nearest_name(component, there) or there[0]}?"
            if there
            else None,
        )
    return kept, others


def as_in_base(parts: Sequence[Part], base: Model, adapter: Adapter, scheme: Scheme) -> list[Part]:
    """Return ``parts`` as the base has them: its projections apart, its paths of text encoders.

    Since transformers 5 these have no ``text_model.`` any more.

    Raises:
        AdapterError: The base has none of the modules.
    """
    found = [base.find(part.module) for part in parts]
    if not any(place is not None for place in found):
        raise AdapterError(
            base.path,
            f"has none of the adapter's modules, such as {parts[0].module!r}",
            hint="is this the base that it was trained on?",
            code="LT022",
        )
    parts = [each for part in parts for each in _apart(part, base)]
    if not scheme.paths.follows_base:
        return parts
    made = []
    found = [base.find(part.module) for part in parts]
    for part, place in zip(parts, found, strict=True):
        component, local = component_of(part.module, adapter.components)
        short = local.removeprefix(TEXT_MODEL)
        for path in (f"{component}.{short}" if component else short, short):
            if local != short and place is not None and place.module == path:
                part = replace(part, module=f"{component}.{short}" if component else short)
        made.append(part)
    return made


def _apart(part: Part, base: Model) -> Iterator[Part]:
    """Yield a part, or the modules that its projection is in the base."""
    heights = parts_apart(part.module, base) if part.is_plain and part.experts == 1 else ()
    if heights:
        yield from split_rows(part, heights)
    else:
        yield part
