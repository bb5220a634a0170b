"""What travels beside the deltas, and where a scheme has it: heads, tokens, unknown tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.adapter.model import ExtraKind
from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import UnsupportedError
from loratool.plan.adapter import Output
from loratool.values.expr import Expr, spec_of

__all__ = ["Extras", "NewExtra", "placed_extras", "token_names"]

MOST_NAMED: Final = 8
BUNDLE: Final = re.compile(r"bundle_emb\.(?P<token>.+?)\.(string_to_param\.\*|clip_l)", re.DOTALL)
TOKEN: Final = re.compile(r"<(?P<token>[^<>]+)>", re.DOTALL)


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
    scheme: KeyScheme,
    adapted: Collection[str],
    *,
    has_config: bool,
    dtype: str | None,
) -> list[Output]:
    """Return what travels beside the deltas under the names that ``scheme`` has for it.

    Args:
        extras: The tensors.
        scheme: The scheme.
        adapted: Modules that have factors; a bias of one is named after its base layer.
        has_config: Whether PEFT's configuration lies beside the weights.
        dtype: The dtype to write floats in, or ``None`` for theirs.

    Raises:
        UnsupportedError: The scheme has no place for something.
    """
    for extra in extras:
        if extra.kind is ExtraKind.ROWS and not has_config:
            raise UnsupportedError(
                extra.key,
                "holds trained token rows, and only a configuration says of which tokens",
                hint=f"leave it out with --drop '^{re.escape(extra.key)}$'",
            )
    if scheme.is_open:
        return [
            Output(spec_of(_key(extra, adapted, scheme), extra.value, dtype), extra.value)
            for extra in extras
        ]
    found: list[Output] = []
    homeless: list[str] = []
    for extra in extras:
        key = _token_key(extra, scheme)
        if key is None:
            homeless.append(extra.key)
            continue
        value = extra.value
        if len(value.shape) == 1 and scheme.spelling is Spelling.FLAT:
            value = value.reshaped((1, *value.shape))
        if scheme.spelling is Spelling.POSITION and len(value.shape) == 2 and value.shape[0] == 1:
            value = value.reshaped(value.shape[1:])
        found.append(Output(spec_of(key, value), value))
    if homeless:
        more = f" (and {len(homeless) - 1} more tensors)" if len(homeless) > 1 else ""
        raise UnsupportedError(
            homeless[0],
            f"is no part of a delta, and the scheme {scheme.name!r} has no place for it{more}",
            hint=f"leave it out with --drop '{_pattern(homeless)}'",
        )
    return found


def _key(extra: NewExtra, adapted: Collection[str], scheme: KeyScheme) -> str:
    """Return the name of a whole tensor: under ``base_layer`` where its module is adapted."""
    if extra.kind is ExtraKind.ROWS:
        try:
            return scheme.format(AdapterKey(extra.name, Slot.ROWS))
        except KeyError:
            raise UnsupportedError(
                extra.name,
                f"the scheme {scheme.name!r} has no name for trained token rows",
                hint="write another scheme with --to, such as --to peft",
            ) from None
    module, _, leaf = extra.name.rpartition(".")
    if extra.kind is ExtraKind.BASE_COPY:
        wrapper = ".token_adapter" if ".token_adapter." in extra.key else ""
        return f"{scheme.prefix}{module}{wrapper}.base_layer.{leaf}"
    if leaf == "bias" and module in adapted:
        return f"{scheme.prefix}{module}.base_layer.{leaf}"
    return f"{scheme.prefix}{extra.name}"


def _pattern(keys: Sequence[str]) -> str:
    """Return a regular expression for these keys and no others, if they are few."""
    shown = "|".join(re.escape(key) for key in keys[:MOST_NAMED])
    return f"^({shown})$" if len(keys) > 1 else f"^{shown}$"


def _token_key(extra: NewExtra, scheme: KeyScheme) -> str | None:
    """Return the name of a trained token's embedding, where ``extra`` is one and has a place."""
    if extra.name.startswith("bundle_emb.") and scheme.spelling in (
        Spelling.FLAT,
        Spelling.NATIVE,
    ):
        return extra.name
    match = TOKEN.fullmatch(extra.name) or BUNDLE.fullmatch(extra.name)
    if match is None:
        return None
    if scheme.spelling is Spelling.POSITION:
        return f"<{match['token']}>"
    if scheme.spelling in (Spelling.FLAT, Spelling.NATIVE):
        return f"bundle_emb.{match['token']}.string_to_param.*"
    return None


def token_names(outputs: Sequence[Output]) -> Iterator[str]:
    """Yield the names of trained tokens in cloneofsimo's spelling."""
    for output in outputs:
        if TOKEN.fullmatch(output.spec.name):
            yield output.spec.name
