"""loratool: LoRA adapters as files. Every verb of the command line is a function here.

Importing the package costs nothing: the functions are loaded when they are first used, and
torch only when tensor data is computed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from loratool.errors import LoratoolError
    from loratool.ops.merge import MergeReport, merge, plan_merge
    from loratool.ops.opening import open_adapter

__all__ = ["LoratoolError", "MergeReport", "merge", "open_adapter", "plan_merge"]

__version__ = "0.1.0"

_PLACES: Final = {
    "LoratoolError": "loratool.errors",
    "MergeReport": "loratool.ops.merge",
    "merge": "loratool.ops.merge",
    "open_adapter": "loratool.ops.opening",
    "plan_merge": "loratool.ops.merge",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
