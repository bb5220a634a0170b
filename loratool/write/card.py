"""The card of an adapter that is written: what its input came with, renewed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.adapter.scheme import Scheme
from loratool.plan.card import ADAPTER, CARD_NAME, Card, hub_name, read_card
from loratool.plan.sidecar import Sidecar

__all__ = ["adapter_card"]

DIFFUSION: Final = "diffusers"


def adapter_card(
    sidecars: Sequence[Sidecar],
    scheme: Scheme,
    *,
    base: object,
    family: str | None,
    former: Scheme | None = None,
    is_wanted: bool = True,
) -> tuple[Card | None, tuple[Sidecar, ...]]:
    """Return the card, and the other files that travel along.

    A card that cannot be edited travels as it is.

    Args:
        sidecars: The files that travel along, the card of the input among them.
        scheme: What is written.
        base: What is recorded as the model that it is for.
        family: The pipeline that it is for, where known.
        former: What the input was in, where that is another scheme.
        is_wanted: Whether there is to be one; else that of the input travels as it is.
    """
    if not is_wanted:
        return None, tuple(sidecars)
    given = next((each for each in sidecars if each.name == CARD_NAME), None)
    existing = read_card(given.source) if given is not None and given.source is not None else None
    if given is not None and existing is None:
        return None, tuple(sidecars)
    card = Card(
        relation=ADAPTER,
        base_model=hub_name(base),
        library=DIFFUSION if family is not None else scheme.home.library or None,
        former_library=former.home.library or None if former is not None else None,
        existing=existing,
    )
    return card, tuple(each for each in sidecars if each is not given)
