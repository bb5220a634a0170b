"""The files that tell what was done: the card, and the record of the command."""

from __future__ import annotations

from loratool.plan.card import CARD_NAME, Card
from loratool.plan.history import RECORD_NAME, History
from loratool.plan.outcome import Outcome
from loratool.plan.sidecar import Sidecar

__all__ = ["card_file", "record_file"]


def card_file(card: Card, history: History, outcome: Outcome) -> Sidecar:
    """Return the card of an output."""
    why = "begun" if card.existing is None else "renewed"
    return Sidecar(CARD_NAME, None, card.content(history, outcome), f"the card, {why}")


def record_file(history: History, outcome: Outcome) -> Sidecar:
    """Return the record of how an output came to be."""
    return Sidecar(RECORD_NAME, None, history.beside(outcome.digests), "says how it was made")
