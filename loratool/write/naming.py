"""Which modules are written, and in which of the namings that they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from loratool.adapter.model import Adapter
from loratool.adapter.part import Part
from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.base.model import Model
from loratool.errors import AdapterError, OptionError
from loratool.names.pipelines import COMPONENTS, component_of
from loratool.schemes import scheme_named
from loratool.write.options import WriteOptions
from loratool.write.renaming import Naming

__all__ = ["as_in_base", "is_same_spelling", "is_written_native", "of_component"]

TEXT_MODEL: Final = "text_model."


def of_component(
    parts: Sequence[Part], component: str | None, known: frozenset[str]
) -> tuple[list[Part], list[tuple[str, str]]]:
    """Return the parts of one component, and the names of the others with the reason.

    Modules that are in no component are said to be in this one.

    Raises:
        OptionError: There is no such component.
    """
    if component is None:
        return list(parts), []
    kept, others = [], []
    found = set()
    for part in parts:
        own = component_of(part.module, known | {component})[0]
        found.add(own)
        if own is None:
            kept.append(replace(part, module=f"{component}.{part.module}"))
        elif own == component:
            kept.append(part)
        else:
            others.append((part.module, f"not in --component {component}"))
    if component not in COMPONENTS or not kept:
        listed = ", ".join(sorted(name for name in found if name)) or "none"
        raise OptionError("--component", f"{component!r} has no modules; there are: {listed}")
    return kept, others


def as_in_base(
    parts: Sequence[Part], base: Model, adapter: Adapter, scheme: KeyScheme
) -> list[Part]:
    """Return ``parts`` with the paths that the base has for text encoders.

    Since transformers 5 they have no ``text_model.`` any more.

    Raises:
        AdapterError: The base has none of the modules.
    """
    found = [base.find(part.module) for part in parts]
    if not any(place is not None for place in found):
        raise AdapterError(
            base.path,
            f"has none of the adapter's modules, such as {parts[0].module!r}",
            hint="is this the base that it was trained on?",
        )
    if scheme.spelling not in (Spelling.PATH, Spelling.BARE_FLAT, Spelling.PIPELINE):
        return list(parts)
    made = []
    for part, place in zip(parts, found, strict=True):
        component, local = component_of(part.module, adapter.components)
        short = local.removeprefix(TEXT_MODEL)
        for path in (f"{component}.{short}" if component else short, short):
            if local != short and place is not None and place.module == path:
                part = replace(part, module=f"{component}.{short}" if component else short)
        made.append(part)
    return made


def is_same_spelling(source: str, scheme: KeyScheme, options: WriteOptions) -> bool:
    """Whether paths stay what they are: both schemes have those of one model.

    Args:
        source: The scheme that they come in; empty for none.
        scheme: The scheme that is written.
        options: What was asked for.
    """
    is_path = bool(source) and scheme_named(source).spelling is Spelling.PATH
    is_asked = options.component is not None or options.naming is not None
    return is_path and scheme.spelling is Spelling.PATH and not is_asked


def is_written_native(
    scheme: KeyScheme, naming: Naming, wish: str | None, *, is_native: bool
) -> bool:
    """Whether the scheme is written with the names of original checkpoints."""
    if scheme.spelling not in (Spelling.FLAT, Spelling.NATIVE):
        if wish == "native":
            raise OptionError("--naming", f"the scheme {scheme.name!r} has diffusers' names only")
        return False
    if wish is not None:
        return wish == "native"
    if scheme.spelling is Spelling.NATIVE:
        return True
    usual = {family.is_trained_native for family in naming.families}
    if len(usual) == 1:
        return usual.pop()
    # Stable Diffusion 1 or XL: what was read is what is written.
    return bool(usual) and is_native
