"""What travels beside the deltas, and where a scheme has it: heads, tokens, unknown tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.adapter.model import ExtraKind
from loratool.adapter.scheme import Scheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import UnsupportedError
from loratool.plan.adapter import Output
from loratool.values.expr import Expr, spec_of

__all__ = ["Extras", "NewExtra", "placed_extras"]

MOST_NAMED: Final = 8


@dataclass(frozen=True, slots=True)
class NewExtra:
    """A tensor that will travel with an adapter without being part of a delta.

    Attributes:
        name: The parameter that it stands for (``lm_head.weight``); of rows, the module.
        kind: What becomes of it.
        value: What it is made of.
        key: Its name in the file that it comes from.
    """

    name: str
    kind: ExtraKind
    value: Expr
    key: str


@dataclass
class Extras:
    """All of them, and what PEFT's configuration has to say about them.

    Attributes:
        items: The tensors.
        config: Fields of the configuration.
        notes: What a user should know.
        dropped: Keys that are not written, with the reason.
    """

    items: list[NewExtra] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)


def placed_extras(
    extras: Sequence[NewExtra],
    scheme: Scheme,
    adapted: Collection[str],
    *,
    dtype: str | None,
) -> list[Output]:
    """Return what travels beside the deltas under the names that ``scheme`` has for it.

    Args:
        extras: The tensors.
        scheme: The scheme.
        adapted: Modules that have factors; a bias of one is named after its base layer.
        dtype: The dtype to write floats in, or ``None`` for theirs.

    Raises:
        UnsupportedError: The scheme has no place for something.
    """
    for extra in extras:
        if extra.kind is ExtraKind.ROWS and not scheme.settings.file:
            raise UnsupportedError(
                extra.key,
                "holds trained token rows, and only a configuration says of which tokens",
                hint=f"leave it out with --drop '^{re.escape(extra.key)}$'",
            )
    if scheme.home.is_open:
        return [
            Output(spec_of(_key(extra, adapted, scheme), extra.value, dtype), extra.value)
            for extra in extras
        ]
    found: list[Output] = []
    homeless: list[str] = []
    tokens = scheme.home.tokens
    for extra in extras:
        key = tokens.key(extra.name) if tokens is not None else None
        if tokens is None or key is None:
            homeless.append(extra.key)
            continue
        value = tokens.stored(extra.value)
        found.append(Output(spec_of(key, value), value))
    if homeless:
        more = f" (and {len(homeless) - 1} more tensors)" if len(homeless) > 1 else ""
        raise UnsupportedError(
            homeless[0],
            f"is no part of a delta, and the scheme {scheme.name!r} has no place for it{more}",
            hint=f"leave it out with --drop '{_pattern(homeless)}'",
        )
    return found


def _key(extra: NewExtra, adapted: Collection[str], scheme: Scheme) -> str:
    """Return the name of a whole tensor: under ``base_layer`` where its module is adapted."""
    if extra.kind is ExtraKind.ROWS:
        try:
            return scheme.keys.format(AdapterKey(extra.name, Slot.ROWS))
        except KeyError:
            raise UnsupportedError(
                extra.name,
                f"the scheme {scheme.name!r} has no name for trained token rows",
                hint="write another scheme with --to, such as --to peft",
            ) from None
    module, _, leaf = extra.name.rpartition(".")
    if extra.kind is ExtraKind.BASE_COPY:
        wrapper = ".token_adapter" if ".token_adapter." in extra.key else ""
        return f"{scheme.keys.prefix}{module}{wrapper}.base_layer.{leaf}"
    if leaf == "bias" and module in adapted:
        return f"{scheme.keys.prefix}{module}.base_layer.{leaf}"
    return f"{scheme.keys.prefix}{extra.name}"


def _pattern(keys: Sequence[str]) -> str:
    """Return a regular expression for these keys and no others, if they are few."""
    shown = "|".join(re.escape(key) for key in keys[:MOST_NAMED])
    return f"^({shown})$" if len(keys) > 1 else f"^{shown}$"
