"""An adapter that will be written: a plain value, decided from headers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.saving import OutputSite
from loratool.adapter.slots import Slot
from loratool.files.inputs import Stamp
from loratool.files.safetensors import canonical_order, format_header
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.extras import Carried
from loratool.ops.algebra.joining import Joint
from loratool.ops.plan import TORCH_BYTES, Sidecar

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


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter that will be written.

    Attributes:
        jobs: Its modules.
        carried: Tensors that are no deltas.
        metadata: Of the weights file.
        config: ``adapter_config.json``, or ``None``.
        sidecars: Other files of the output.
        weights_name: Name of the weights file in the output folder; empty where the output is
            that file itself.
        stamps: What the inputs were when their headers were read.
        notes: What a user should know.
        dropped: What is not written, with the reason.
    """

    jobs: tuple[ModuleJob, ...]
    carried: tuple[Carried, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    sidecars: tuple[Sidecar, ...]
    weights_name: str
    stamps: Mapping[Path, Stamp]
    notes: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors in the order of their data."""
        modules = (spec for job in self.jobs for spec in job.specs.values())
        return tuple(canonical_order([*modules, *(item.spec for item in self.carried)]))

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data."""
        return format_header(self.specs, self.metadata)

    @property
    def nbytes(self) -> int:
        """Size of the weights file."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder, else it is the weights file."""
        return bool(self.weights_name)

    def described_files(self) -> list[dict[str, Any]]:
        """Return name and size of every file of the output."""
        found = [{"name": self.weights_name or "(the output)", "bytes": self.nbytes}]
        if self.config is not None:
            found.append({"name": CONFIG_NAME, "bytes": len(self.config_text)})
        found += [
            {"name": sidecar.name, "bytes": sidecar.source.stat().st_size}
            for sidecar in self.sidecars
            if sidecar.source is not None
        ]
        return found

    def offsets(self) -> dict[str, int]:
        """Return where in the file each tensor begins, by name."""
        places = {}
        offset = len(self.header)
        for spec in self.specs:
            places[spec.name] = offset
            offset += spec.nbytes
        return places

    def inputs(self) -> Iterator[Path]:
        """Yield every file that is read, which no output may replace."""
        for weights in self.stamps:
            yield weights
            if (weights.parent / CONFIG_NAME).is_file():
                yield weights.parent / CONFIG_NAME
        yield from (sidecar.source for sidecar in self.sidecars if sidecar.source is not None)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes at most, roughly: torch, and two modules."""
        largest = sorted((_working_bytes(job) for job in self.jobs), reverse=True)[:2]
        return TORCH_BYTES + sum(largest)

    @property
    def config_text(self) -> bytes:
        """``adapter_config.json`` as it is written."""
        return (json.dumps(self.config, indent=2) + "\n").encode()


def _working_bytes(job: ModuleJob) -> int:
    """Return what one module takes: its factors in float64, and some five copies of them."""
    elements = sum(
        stored.spec.elements for term in job.joint.terms for stored in term.site.slots.values()
    )
    return COPIES * 8 * elements
