"""Modules that a configuration says are saved whole, and those of them that no file holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from loratool.adapter.model import Adapter, ExtraKind

__all__ = ["absent_heads", "absent_modules", "is_listed"]

ALWAYS_LISTED: Final = ("classifier", "score")
"""What PEFT lists for every classifier, whatever its head is called."""
CLASSIFIERS: Final = ("SEQ_CLS", "TOKEN_CLS")


def is_listed(adapter: Adapter, module: str) -> bool:
    """Whether ``modules_to_save`` lists a module, or one that it is inside of."""
    names = adapter.config.modules_to_save if adapter.config else ()
    return any(_is_of(name, module) for name in names)


def absent_modules(adapter: Adapter, beside: Iterable[str] = ()) -> list[str]:
    """Return the modules of ``modules_to_save`` that no tensor is of.

    Args:
        adapter: The adapter.
        beside: Names of tensors in files beside it.
    """
    if adapter.config is None:
        return []
    held = [*_whole(adapter), *adapter.skipped, *beside]
    return [
        name
        for name in adapter.config.modules_to_save
        if not _is_implicit(adapter, name) and not any(_is_of(name, each) for each in held)
    ]


def absent_heads(adapter: Adapter, beside: Iterable[str] = ()) -> list[str]:
    """Return what a classifier's head may be called, where nothing was saved whole at all."""
    if adapter.config is None or any(not each.endswith(".bias") for each in _whole(adapter)):
        return []
    listed = [name for name in adapter.config.modules_to_save if _is_implicit(adapter, name)]
    held = (*adapter.skipped, *beside)
    return [] if any(_is_of(name, each) for name in listed for each in held) else listed


def _whole(adapter: Adapter) -> list[str]:
    return [extra.name for extra in adapter.extras if extra.kind is ExtraKind.FULL]


def _is_implicit(adapter: Adapter, name: str) -> bool:
    return name in ALWAYS_LISTED and adapter.field("task_type") in CLASSIFIERS


def _is_of(module: str, tensor: str) -> bool:
    """Whether a tensor is of a module, by the last components of the module's path or inside it."""
    return re.match(rf"(^|.*\.){re.escape(module)}(\..*|$)", tensor) is not None
