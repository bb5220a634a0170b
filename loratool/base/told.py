"""What a model says of itself, of which no weights may be at hand."""

from __future__ import annotations

from pathlib import Path

from loratool.adapter.scheme import Told
from loratool.base.config import is_model_folder, read_config
from loratool.base.model import Model, open_model
from loratool.errors import BaseModelError

__all__ = ["open_told"]


def open_told(path: Path, *, needs_weights: bool) -> tuple[Model | None, Told]:
    """Return the model at ``path`` and what it says of itself, which its ``config.json`` does too.

    Args:
        path: The model, or a folder with its configuration alone.
        needs_weights: Whether that is not enough.

    Raises:
        BaseModelError: There is no model.
    """
    try:
        found = open_model(path)
    except BaseModelError:
        if needs_weights or not is_model_folder(path):
            raise
        config = read_config(path)
        return None, Told(config=config.language, is_tied=config.is_tied)
    return found, found.told
