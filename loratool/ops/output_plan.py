"""What all plans of an adapter's files have in common: names, places and sizes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.adapter.config import CONFIG_NAME
from loratool.files.inputs import Stamp
from loratool.files.safetensors import canonical_order, format_header
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.extras import Carried
from loratool.ops.plan import Sidecar

__all__ = ["OutputPlan"]


@dataclass(frozen=True, kw_only=True)
class OutputPlan(ABC):
    """An adapter's files that will be written.

    Attributes:
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

    carried: tuple[Carried, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    sidecars: tuple[Sidecar, ...]
    weights_name: str
    stamps: Mapping[Path, Stamp]
    notes: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()

    @abstractmethod
    def module_specs(self) -> Iterable[TensorSpec]:
        """Return the tensors of the modules, in any order."""

    @property
    @abstractmethod
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes at most, roughly."""

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors in the order of their data."""
        return tuple(canonical_order([*self.module_specs(), *(item.spec for item in self.carried)]))

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data."""
        return format_header(self.specs, self.metadata)

    @property
    def nbytes(self) -> int:
        """Size of the weights file (of a torch file, roughly)."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder, else it is the weights file."""
        return bool(self.weights_name)

    @property
    def config_text(self) -> bytes:
        """``adapter_config.json`` as it is written."""
        return (json.dumps(self.config, indent=2) + "\n").encode()

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
        places, offset = {}, len(self.header)
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
