"""What travels beside the deltas: saved heads, trained tokens, tensors that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from loratool.adapter.model import Adapter, Extra, ExtraKind
from loratool.adapter.saving import OutputSite
from loratool.adapter.scheme import KeyScheme, Spelling
from loratool.errors import UnsupportedError
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.extras import Carried, Extras, gather_extras
from loratool.ops.conversion.refusing import Dropping

__all__ = ["carried_extras", "token_names"]

CONFIGURED: Final = ("peft", "module-path")
"""Schemes beside which PEFT's configuration says what is saved as a whole."""
MOST_NAMED: Final = 8
BUNDLE: Final = re.compile(r"bundle_emb\.(?P<token>.+?)\.(string_to_param\.\*|clip_l)", re.DOTALL)
TOKEN: Final = re.compile(r"<(?P<token>[^<>]+)>", re.DOTALL)


def carried_extras(
    adapter: Adapter,
    sites: Sequence[OutputSite],
    scheme: KeyScheme,
    dropping: Dropping,
    dtype: str | None,
) -> Extras:
    """Return what travels beside the deltas.

    Raises:
        UnsupportedError: The scheme has no place for something.
    """
    kept = [extra for extra in adapter.extras if not dropping.takes(extra.key)]
    for extra in kept:
        if extra.kind is ExtraKind.ROWS and not scheme.has_config:
            raise UnsupportedError(
                extra.key,
                "holds trained token rows, and only a configuration says of which tokens",
                hint=f"leave it out with --drop '^{re.escape(extra.key)}$'",
            )
    if scheme.is_open:
        config = adapter.config if adapter.scheme in CONFIGURED else None
        alone = replace(adapter, extras=tuple(kept), config=config)
        return gather_extras([alone], sites, scheme, policy="error", dtype=dtype)
    result = Extras()
    homeless: list[str] = []
    for extra in kept:
        if extra.kind is ExtraKind.STATE:
            result.dropped.append((extra.key, "only training needs it"))
        elif ".vera_" in extra.key:
            continue
        elif (key := _token_key(extra, scheme)) is not None:
            shape = extra.tensor.spec.shape
            shape = (1, *shape) if len(shape) == 1 and scheme.spelling is Spelling.FLAT else shape
            if scheme.spelling is Spelling.POSITION and shape[:1] == (1,) and len(shape) == 2:
                shape = shape[1:]
            spec = TensorSpec(key, extra.tensor.spec.dtype, shape)
            stored = replace(extra.tensor, spec=replace(extra.tensor.spec, shape=shape))
            result.carried.append(Carried(spec, (stored,)))
        else:
            homeless.append(extra.key)
    if homeless:
        more = f" (and {len(homeless) - 1} more tensors)" if len(homeless) > 1 else ""
        raise UnsupportedError(
            homeless[0],
            f"is no part of a delta, and the scheme {scheme.name!r} has no place for it{more}",
            hint=f"leave it out with --drop '{_pattern(homeless)}'",
        )
    return result


def _pattern(keys: Sequence[str]) -> str:
    """Return a regular expression for these keys and no others, if they are few."""
    shown = "|".join(re.escape(key) for key in keys[:MOST_NAMED])
    return f"^({shown})$" if len(keys) > 1 else f"^{shown}$"


def _token_key(extra: Extra, scheme: KeyScheme) -> str | None:
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


def token_names(extras: Extras) -> Iterator[str]:
    """Yield the names of trained tokens in cloneofsimo's spelling."""
    for item in extras.carried:
        if TOKEN.fullmatch(item.spec.name):
            yield item.spec.name
