"""What cannot be written, whichever verb asks for it."""

from __future__ import annotations

from loratool.adapter.model import Adapter
from loratool.adapter.scheme import Scheme
from loratool.errors import AdapterError
from loratool.schemes import scheme_named

__all__ = ["check_names"]


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
        )
    reason = own.paths.refusal(count)
    if reason is not None:
        raise AdapterError(adapter.path, reason)
    raise AdapterError(
        adapter.path,
        f"{count} module names are not known: {listed}{more}",
        hint="give --base, whose names settle it (only its headers are read), or leave them out "
        "with --skip",
    )
