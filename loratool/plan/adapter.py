"""An adapter that will be written: a plain value, decided from headers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.part import Part
from loratool.adapter.scheme import Seal
from loratool.adapter.slots import Slot
from loratool.files.container import Container, Layout
from loratool.files.containers import USUAL, container_of
from loratool.files.inputs import Stamp
from loratool.files.safetensors import canonical_order
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.plan.card import Card
from loratool.plan.history import History
from loratool.plan.outcome import Outcome
from loratool.plan.run import FileWork
from loratool.plan.sidecar import Sidecar, files_read
from loratool.plan.telling import card_file, record_file
from loratool.values.expr import Expr, Stored, Together, sources, togethers

__all__ = ["AdapterPlan", "ModuleOutput", "Output"]

PYTHON_BYTES: Final = 60 << 20
"""What an interpreter with numpy takes."""
COPIES: Final = 6
"""How many float64 copies of its tensors a module takes while it is computed."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output: what it is called and stored as, and what it is made of."""

    spec: TensorSpec
    value: Expr

    @property
    def moved(self) -> StoredTensor | None:
        """The stored tensor whose bytes it is, maybe in another order; else ``None``."""
        tensor = self.value.tensor if isinstance(self.value, Stored) else None
        return tensor if tensor is not None and tensor.spec.dtype == self.spec.dtype else None


@dataclass(frozen=True, slots=True)
class ModuleOutput:
    """One module of the output.

    Attributes:
        part: What its tensors are made of.
        specs: What they are called and stored as.
        is_transposed: Whether A is stored as ``(in, r)`` and B as ``(r, out)``.
        alpha: Its alpha, where that is a tensor.
    """

    part: Part
    specs: Mapping[Slot, TensorSpec]
    is_transposed: bool = False
    alpha: Output | None = None

    def all_specs(self) -> Iterator[TensorSpec]:
        """Yield what its tensors are called and stored as, alpha included."""
        yield from self.specs.values()
        if self.alpha is not None:
            yield self.alpha.spec

    def outputs(self) -> Iterator[tuple[Slot, Output]]:
        """Yield its tensors by role."""
        for slot, value in self.part.values.items():
            yield slot, Output(self.specs[slot], value)

    @property
    def is_moved(self) -> bool:
        """Whether every tensor is stored bytes, maybe in another order."""
        return all(output.moved is not None for _, output in self.outputs())

    @property
    def togethers(self) -> tuple[Together, ...]:
        """What has to be computed first, once each."""
        found = {id(t): t for value in self.part.values.values() for t in togethers(value)}
        return tuple(found.values())

    @property
    def working_bytes(self) -> int:
        """Bytes of memory that computing it takes, roughly."""
        if self.is_moved:
            return 0
        read = {id(t): t for value in self.part.values.values() for t in sources(value)}
        elements = sum(stored.spec.elements for stored in read.values())
        elements = max(elements, sum(spec.elements for spec in self.specs.values()))
        return COPIES * 8 * elements


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """An adapter's files that will be written, and everything that will not be.

    Attributes:
        parts: The modules.
        carried: Tensors that are no deltas.
        measured: What is computed for its report alone.
        metadata: Of the weights file, but for its history.
        history: How it came to be; ``None`` where that is not recorded.
        card: What its card says, where it has one.
        config: The configuration beside the weights, or ``None``.
        config_name: What it is called.
        format_config: Makes the files of it, the one of that name and maybe more.
        sidecars: Other files of the output.
        weights_name: Name of the weights file in the output folder; empty where the output is
            that file itself.
        stamps: What the inputs were when their headers were read.
        container: The format of the weights file.
        file_name: The name of the weights file.
        seal: What adds to the metadata when the data is written, if anything does.
        scheme: Name of the scheme.
        family: What pipeline it is for, where known.
        notes: What a user should know.
        dropped: Tensors and modules that are not written, with the reason.
        left_behind: Files beside the weights that are not carried over, with the reason.
    """

    parts: tuple[ModuleOutput, ...]
    carried: tuple[Output, ...] = ()
    measured: tuple[Together, ...] = ()
    metadata: Mapping[str, str]
    history: History | None = None
    card: Card | None = None
    config: Mapping[str, Any] | None
    config_name: str = CONFIG_NAME
    format_config: Callable[[Mapping[str, Any]], Mapping[str, bytes]] | None = None
    sidecars: tuple[Sidecar, ...] = ()
    weights_name: str
    stamps: Mapping[Path, Stamp]
    container: Container = field(default_factory=lambda: container_of(USUAL))
    file_name: str = ""
    seal: Seal | None = None
    scheme: str
    family: str | None = None
    notes: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    left_behind: tuple[tuple[str, str], ...] = ()

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors in the order of their data."""
        modules = (spec for item in self.parts for spec in item.all_specs())
        return tuple(canonical_order([*modules, *(item.spec for item in self.carried)]))

    @cached_property
    def layout(self) -> Layout:
        """Where everything lies in the weights file, with room for what the seal adds."""
        return self.layout_of(self.specs)

    def layout_of(self, specs: Sequence[TensorSpec]) -> Layout:
        """Return the same for other tensors."""
        room = self.seal.room if self.seal is not None else {}
        return self.container.lay_out(specs, self.metadata_with(room), self.file_name)

    def metadata_with(
        self, sealed: Mapping[str, str], digests: Mapping[Path, str] | None = None
    ) -> dict[str, str]:
        """Return the metadata of the weights file, of the same length whatever the arguments.

        Args:
            sealed: What the seal adds.
            digests: SHA-256 of the inputs, for the history; zeros where there are none.
        """
        is_recorded = self.history is not None and self.container.has_metadata
        history = self.history.metadata(digests or {}) if self.history and is_recorded else {}
        return {**self.metadata, **history, **sealed}

    @property
    def nbytes(self) -> int:
        """Size of the weights file in bytes."""
        return self.layout.size

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder, else it is the weights file."""
        return bool(self.weights_name)

    @property
    def config_files(self) -> Mapping[str, bytes]:
        """The configuration as it is written, by the names of its files; none without one."""
        if self.config is None:
            return {}
        if self.format_config is not None:
            return self.format_config(self.config)
        return {self.config_name: (json.dumps(self.config, indent=2) + "\n").encode()}

    def beside(self) -> Iterator[Sidecar]:
        """Yield the files beside the weights, the configuration last."""
        if not self.is_folder:
            return
        yield from self.sidecars
        for name, content in self.config_files.items():
            yield Sidecar(name, None, content)

    def telling(self, outcome: Outcome) -> Iterator[Sidecar]:
        """Yield the card, and how it came to be where the weights have no place for that."""
        if not self.is_folder or self.history is None:
            return
        if self.card is not None:
            yield card_file(self.card, self.history, outcome)
        if not self.container.has_metadata:
            yield record_file(self.history, outcome)

    def works(self, outcome: Outcome) -> list[FileWork]:
        """Return what is to be done for the weights file."""
        from loratool.plan.tasks import adapter_work

        return [adapter_work(self, outcome)]

    def check(self, outcome: Outcome) -> None:
        """Accept what was written."""

    def described_files(self) -> list[dict[str, Any]]:
        """Return name and size of every file of the output."""
        found = [{"name": self.weights_name or "(the output)", "bytes": self.nbytes}]
        found += [{"name": n, "bytes": len(content)} for n, content in self.config_files.items()]
        others = (*self.sidecars, *self.telling(Outcome()))
        return found + [{"name": each.name, "bytes": each.nbytes} for each in others]

    def inputs(self) -> Iterator[Path]:
        """Yield every file that is read, which no output may replace."""
        yield from files_read(self.stamps, self.sidecars)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes at most, roughly: numpy, and two modules."""
        largest = sorted((item.working_bytes for item in self.parts), reverse=True)[:2]
        return PYTHON_BYTES + sum(largest)

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the tensors that are no deltas."""
        return tuple(output.spec.name for output in self.carried)

    def changes(self) -> list[tuple[str, int]]:
        """Return how modules differ from what was stored, and how many each is true of."""
        return Counter(note for item in self.parts for note in item.part.notes).most_common()
