"""The card of a merged model: that of the base, renewed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from loratool.base.model import Model
from loratool.files.places import origin_of
from loratool.plan.card import CARD_NAME, Card, hub_name, read_card
from loratool.plan.sidecar import Sidecar

__all__ = ["merged_card"]


def merged_card(
    model: Model,
    sidecars: Sequence[Sidecar],
    bases: Collection[str | None],
    *,
    is_wanted: bool = True,
) -> tuple[Card | None, list[Sidecar]]:
    """Return the card, and the other files of the output.

    A card that cannot be edited is carried over as it is.

    Args:
        model: The base.
        sidecars: The files beside the weights, its card among them.
        bases: What the adapters say that they are for.
        is_wanted: Whether there is to be one; else that of the base travels as it is.
    """
    if not is_wanted:
        return None, list(sidecars)
    given = next((each for each in sidecars if each.name == CARD_NAME), None)
    existing = read_card(given.source) if given is not None and given.source is not None else None
    if given is not None and existing is None:
        return None, list(sidecars)
    library = "transformers" if model.config.raw else None
    origin = origin_of(model.path)
    recorded = hub_name(next(iter(bases))) if len(bases) == 1 else None
    card = Card(
        relation="merge",
        base_model=origin.repo if origin is not None else recorded,
        library=library if "" in model.checkpoints else "diffusers",
        tags=("lora", "loratool", "merge"),
        existing=existing,
    )
    return card, [each for each in sidecars if each is not given]
