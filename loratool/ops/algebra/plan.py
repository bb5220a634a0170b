"""An adapter that will be written: a plain value, decided from headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from loratool.adapter.saving import OutputSite
from loratool.adapter.slots import Slot
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.joining import Joint
from loratool.ops.output_plan import OutputPlan
from loratool.ops.plan import TORCH_BYTES

__all__ = ["WEIGHTS_NAME", "AdapterPlan", "ModuleJob"]

WEIGHTS_NAME: Final = "adapter_model.safetensors"

COPIES: Final = 6


@dataclass(frozen=True, slots=True)
class ModuleJob:
    """How one module of the output comes about.

    Attributes:
        joint: What it is made of.
        output: What is written, with its rank and alpha.
        specs: Its tensors.
        route: ``copy`` the factors as they are, write the ``exact`` sum, ``truncate`` it, or
            the name of another method; ``twin`` of another module.
    """

    joint: Joint
    output: OutputSite
    specs: Mapping[Slot, TensorSpec]
    route: str


@dataclass(frozen=True, kw_only=True)
class AdapterPlan(OutputPlan):
    """An adapter that will be written.

    Attributes:
        jobs: Its modules.
    """

    jobs: tuple[ModuleJob, ...]

    def module_specs(self) -> Iterator[TensorSpec]:
        """Yield the tensors of the modules."""
        return (spec for job in self.jobs for spec in job.specs.values())

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes at most, roughly: torch, and two modules."""
        largest = sorted((_working_bytes(job) for job in self.jobs), reverse=True)[:2]
        return TORCH_BYTES + sum(largest)


def _working_bytes(job: ModuleJob) -> int:
    """Return what one module takes: its factors in float64, and some five copies of them."""
    elements = sum(
        stored.spec.elements for term in job.joint.terms for stored in term.site.slots.values()
    )
    return COPIES * 8 * elements
