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
    from loratool.jobs.batch import BatchReport, JobRecord, batch
    from loratool.jobs.recorded import RecordedRecipe, recipe
    from loratool.jobs.run import RunReport, run
    from loratool.reports.page import write_page
    from loratool.reports.pictures import plot
    from loratool.schemes.opening import open_adapter
    from loratool.shards.course import ShareReport
    from loratool.shards.status import StatusReport, status
    from loratool.verbs.algebra.result import AdapterReport
    from loratool.verbs.compare import Comparison, compare
    from loratool.verbs.comparison.layers import LayerComparison, compare_layers
    from loratool.verbs.compose import compose
    from loratool.verbs.convert import ConvertReport, convert
    from loratool.verbs.extract import extract
    from loratool.verbs.extraction.result import ExtractReport
    from loratool.verbs.inspect import AdapterInfo, ModelInfo, inspect, inspect_many
    from loratool.verbs.merge import MergeReport, merge, plan_merge
    from loratool.verbs.metadata import MetadataReport, metadata
    from loratool.verbs.rescale import RescaleReport, rescale
    from loratool.verbs.schemes import schemes
    from loratool.verbs.truncate import truncate
    from loratool.verbs.validate import validate, validate_many
    from loratool.verbs.verify import verify

__all__ = [
    "AdapterInfo",
    "AdapterReport",
    "BatchReport",
    "Comparison",
    "ConvertReport",
    "ExtractReport",
    "Finding",
    "JobRecord",
    "LayerComparison",
    "LoratoolError",
    "MergeReport",
    "MetadataReport",
    "ModelInfo",
    "RecordedRecipe",
    "RescaleReport",
    "RunReport",
    "ShareReport",
    "StatusReport",
    "batch",
    "compare",
    "compare_layers",
    "compose",
    "convert",
    "extract",
    "inspect",
    "inspect_many",
    "merge",
    "metadata",
    "open_adapter",
    "plan_merge",
    "plot",
    "recipe",
    "rescale",
    "run",
    "schemes",
    "status",
    "truncate",
    "validate",
    "validate_many",
    "verify",
    "write_page",
]

__version__ = "0.1.0"

_PLACES: Final = {
    "AdapterInfo": "loratool.verbs.inspect",
    "AdapterReport": "loratool.verbs.algebra.result",
    "BatchReport": "loratool.jobs.batch",
    "Comparison": "loratool.verbs.compare",
    "ConvertReport": "loratool.verbs.convert",
    "ExtractReport": "loratool.verbs.extraction.result",
    "Finding": "loratool.adapter.findings",
    "LayerComparison": "loratool.verbs.comparison.layers",
    "JobRecord": "loratool.jobs.batch",
    "LoratoolError": "loratool.errors",
    "MergeReport": "loratool.verbs.merge",
    "ModelInfo": "loratool.verbs.inspect",
    "MetadataReport": "loratool.verbs.metadata",
    "RecordedRecipe": "loratool.jobs.recorded",
    "RescaleReport": "loratool.verbs.rescale",
    "RunReport": "loratool.jobs.run",
    "ShareReport": "loratool.shards.course",
    "StatusReport": "loratool.shards.status",
    "batch": "loratool.jobs.batch",
    "compare": "loratool.verbs.compare",
    "compare_layers": "loratool.verbs.comparison.layers",
    "compose": "loratool.verbs.compose",
    "convert": "loratool.verbs.convert",
    "extract": "loratool.verbs.extract",
    "inspect": "loratool.verbs.inspect",
    "inspect_many": "loratool.verbs.inspect",
    "merge": "loratool.verbs.merge",
    "metadata": "loratool.verbs.metadata",
    "open_adapter": "loratool.schemes.opening",
    "plan_merge": "loratool.verbs.merge",
    "plot": "loratool.reports.pictures",
    "recipe": "loratool.jobs.recorded",
    "rescale": "loratool.verbs.rescale",
    "run": "loratool.jobs.run",
    "schemes": "loratool.verbs.schemes",
    "status": "loratool.shards.status",
    "truncate": "loratool.verbs.truncate",
    "validate": "loratool.verbs.validate",
    "validate_many": "loratool.verbs.validate",
    "verify": "loratool.verbs.verify",
    "write_page": "loratool.reports.page",
}


class _Package(ModuleType):
    """The package, whose function ``schemes`` goes before the folder of the same name.

    Importing a sub-package binds its name here; the function would be gone from then on.
    """

    @property
    def schemes(self) -> Any:
        """The function :func:`loratool.verbs.schemes.schemes`."""
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
