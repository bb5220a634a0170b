"""loratool: LoRA adapters as files. Every verb of the command line is a function here.

Importing the package costs nothing: the functions are loaded when they are first used, and
torch only when tensor data is computed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from loratool.adapter.findings import Finding
    from loratool.errors import LoratoolError
    from loratool.ops.algebra.result import AdapterReport
    from loratool.ops.compare import Comparison, compare
    from loratool.ops.compose import compose
    from loratool.ops.convert import ConvertReport, convert
    from loratool.ops.extract import extract
    from loratool.ops.extraction.result import ExtractReport
    from loratool.ops.inspect import inspect
    from loratool.ops.merge import MergeReport, merge, plan_merge
    from loratool.ops.rescale import RescaleReport, rescale
    from loratool.ops.schemes import schemes
    from loratool.ops.truncate import truncate
    from loratool.ops.validate import validate
    from loratool.ops.verify import verify
    from loratool.schemes.opening import open_adapter

__all__ = [
    "AdapterReport",
    "Comparison",
    "ConvertReport",
    "ExtractReport",
    "Finding",
    "LoratoolError",
    "MergeReport",
    "RescaleReport",
    "compare",
    "compose",
    "convert",
    "extract",
    "inspect",
    "merge",
    "open_adapter",
    "plan_merge",
    "rescale",
    "schemes",
    "truncate",
    "validate",
    "verify",
]

__version__ = "0.1.0"

_PLACES: Final = {
    "AdapterReport": "loratool.ops.algebra.result",
    "Comparison": "loratool.ops.compare",
    "ConvertReport": "loratool.ops.convert",
    "ExtractReport": "loratool.ops.extraction.result",
    "Finding": "loratool.adapter.findings",
    "LoratoolError": "loratool.errors",
    "MergeReport": "loratool.ops.merge",
    "RescaleReport": "loratool.ops.rescale",
    "compare": "loratool.ops.compare",
    "compose": "loratool.ops.compose",
    "convert": "loratool.ops.convert",
    "extract": "loratool.ops.extract",
    "inspect": "loratool.ops.inspect",
    "merge": "loratool.ops.merge",
    "open_adapter": "loratool.schemes.opening",
    "plan_merge": "loratool.ops.merge",
    "rescale": "loratool.ops.rescale",
    "schemes": "loratool.ops.schemes",
    "truncate": "loratool.ops.truncate",
    "validate": "loratool.ops.validate",
    "verify": "loratool.ops.verify",
}


class _Package(ModuleType):
    """The package, whose function ``schemes`` goes before the folder of the same name.

    Importing a sub-package binds its name here; the function would be gone from then on.
    """

    @property
    def schemes(self) -> Any:
        """The function :func:`loratool.ops.schemes.schemes`."""
        return import_module(_PLACES["schemes"]).schemes

    @schemes.setter
    def schemes(self, value: Any) -> None:
        """Leave the function in its place."""


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "live":  # a folder, which needs torch
        return import_module("loratool.live")
    if name not in _PLACES:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
