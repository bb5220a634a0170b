"""What cannot be written, whichever verb asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Adapter
from loratool.adapter.part import Part
from loratool.adapter.scheme import Scheme
from loratool.errors import AdapterError, UnsupportedError
from loratool.names.pipelines import BACKBONES, component_of
from loratool.schemes import DEFAULT_SCHEME, scheme_named
from loratool.write.conventions import Naming

__all__ = ["check_counterparts", "check_names"]


def check_names(adapter: Adapter, scheme: Scheme | None = None) -> None:
    """Refuse to go on with modules whose names are not known, where they have to be.

    Args:
        adapter: The adapter.
        scheme: The scheme to write; in their own scheme flattened names stay what they are.

    Raises:
        AdapterError: There are some; the message lists them.
    """
    if adapter.mixed:
        count = len(adapter.mixed)
        raise AdapterError(
            adapter.path,
            f"mixes schemes: it was read as {adapter.scheme!r}, and {count} of its keys are "
            f"factors in another, such as {adapter.mixed[0]!r}",
            hint="convert one part at a time, leaving out the other with --skip",
            code="LT032",
        )
    own = scheme_named(adapter.scheme)
    is_kept = scheme is not None and scheme.name == own.name and own.paths.keeps_unknown
    if not adapter.unresolved or is_kept:
        return
    name, paths = next(iter(adapter.unresolved.items()))
    count = len(adapter.unresolved)
    listed = ", ".join(repr(n) for n in list(adapter.unresolved)[:3])
    more = f" and {count - 3} more" if count > 3 else ""
    if len(paths) == 1:
        raise AdapterError(
            adapter.path,
            f"{count} module names mean the same as another: {listed}{more} ({paths[0]!r})",
            hint="leave out all but one with --skip",
        )
    if paths:
        raise AdapterError(
            adapter.path,
            f"{count} module names could stand for several paths: {name!r} for "
            f"{' or '.join(map(repr, paths[:4]))}",
            hint="give --base, whose names settle it (only its headers are read)",
            code="LT033",
        )
    if adapter.unknown is not None:
        raise AdapterError(adapter.path, adapter.unknown, code="LT033")
    raise AdapterError(
        adapter.path,
        f"{count} module names are not known: {listed}{more}",
        hint="give --base, whose names settle it (only its headers are read), or leave them out "
        "with --skip",
        code="LT033",
    )


def check_counterparts(
    parts: Sequence[Part],
    naming: Naming,
    scheme: Scheme,
    known: frozenset[str],
    *,
    is_native: bool,
    crosses: bool,
) -> None:
    """Refuse to go from one naming of a backbone to the other where not all names are known.

    Where an adapter stays in diffusers', names that only original checkpoints have are refused.

    Names of no component and no family may be any model's, and are left to those who gave them.

    Args:
        parts: The modules, as they were read.
        naming: The families that they may belong to.
        scheme: The scheme that is written.
        known: What is a component for certain.
        is_native: Whether they will be named as in original checkpoints.
        crosses: Whether they were named in the other naming.

    Raises:
        UnsupportedError: A module has no name that is known in the other naming.
    """
    modules = [part.module for part in parts]
    places = {module: component_of(module, known) for module in modules}
    if naming.families:
        is_alike = all(family.is_alike for family in naming.families)
        originals = naming.originals(modules, known)
        unknown = naming.unknown(modules, known) if crosses and not is_alike else originals
        if is_native:
            unknown = [local for local in unknown if local not in originals]
    elif scheme.paths.has_components and crosses:
        unknown = [local for component, local in places.values() if component in BACKBONES]
    else:
        unknown = []
    if not unknown:
        return
    labels = [part.label for part in parts if places[part.module][1] in unknown]
    if is_native:
        hint = "--naming diffusers keeps the names as they are"
    elif not naming.families:
        hint = f"--to {DEFAULT_SCHEME} keeps the names as they are"
    elif len(labels) == len(parts):
        hint = "write another scheme, such as with --to comfy"
    else:
        pattern = pattern_for(labels, [part.label for part in parts])
        hint = f"leave out what has no name there, with {option('--drop', pattern)}"
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    whose = "original checkpoints call" if is_native else "diffusers calls"
    raise UnsupportedError(
        unknown[0],
        f"is no module of {naming if naming.families else 'a family that is known'}; what {whose} "
        f"it, which {scheme.name!r} needs, is not known{more}",
        hint=hint,
    )
