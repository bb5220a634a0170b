"""The model that an adapter is for, by the base that is given or the copy of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter.told import Told
from loratool.base.config import read_config

__all__ = ["described"]


def described(told: Told) -> Mapping[str, Any]:
    """Return what the base says of its language model, or a copy that lies beside the adapter.

    Raises:
        FileFormatError: That is no JSON.
    """
    if told.config or told.folder is None:
        return told.config
    return read_config(told.folder).language
