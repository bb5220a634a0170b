"""A conversion that will be carried out: a plain value, decided from headers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.slots import Slot
from loratool.files.inputs import Stamp
from loratool.files.safetensors import canonical_order, format_header
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.extras import Carried
from loratool.ops.conversion.nearest import Approximation
from loratool.ops.conversion.parts import Part
from loratool.ops.conversion.values import Stored
from loratool.ops.plan import TORCH_BYTES, Sidecar

__all__ = ["NO_DIGEST", "ConversionPlan", "OutputPart"]

PYTHON_BYTES: Final = 60 << 20
NO_DIGEST: Final = "0" * 64
HASH_KEY: Final = "sshs_model_hash"
LEGACY_HASH_KEY: Final = "sshs_legacy_hash"


@dataclass(frozen=True, slots=True)
class OutputPart:
    """One module of the output.

    Attributes:
        part: What its tensors are made of.
        specs: What they are called and stored as.
        approximation: How well its factors stand for it, where they are not exact.
        is_transposed: Whether A is stored as ``(in, r)`` and B as ``(r, out)``.
    """

    part: Part
    specs: Mapping[Slot, TensorSpec]
    approximation: Approximation | None = None
    is_transposed: bool = False

    @property
    def is_moved(self) -> bool:
        """Whether every tensor is stored bytes, maybe in another order."""
        return self.approximation is None and all(
            isinstance(value, Stored) and value.dtype == self.specs[slot].dtype
            for slot, value in self.part.values.items()
            if slot in self.specs
        )


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Attributes:
        parts: The modules.
        carried: Tensors that are no deltas.
        metadata: Of the weights file; empty for a torch file.
        sidecars: Other files of the output.
        config: ``adapter_config.json``, or ``None``.
        weights_name: Name of the weights file in the output folder; empty where the output is
            that file itself.
        is_torch: Whether the weights are written by ``torch.save``.
        is_hashed: Whether kohya's hashes belong into the metadata.
        stamps: What the inputs were when their headers were read.
        scheme: Name of the scheme that is written.
        family: What pipeline it is for, where known.
        notes: What a user should know.
        dropped: What is not written, with the reason.
    """

    parts: tuple[OutputPart, ...]
    carried: tuple[Carried, ...]
    metadata: Mapping[str, str]
    sidecars: tuple[Sidecar, ...]
    config: Mapping[str, Any] | None
    weights_name: str
    is_torch: bool
    is_hashed: bool
    stamps: Mapping[Path, Stamp]
    scheme: str
    family: str | None = None
    notes: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = field(default=())

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors in the order of their data."""
        modules = (spec for part in self.parts for spec in part.specs.values())
        return tuple(canonical_order([*modules, *(item.spec for item in self.carried)]))

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data, with room for the hashes."""
        room = {HASH_KEY: "0" * 64, LEGACY_HASH_KEY: "0" * 8} if self.is_hashed else {}
        return format_header(self.specs, {**self.metadata, **room})

    def header_with(self, hashes: Mapping[str, str]) -> bytes:
        """Return the bytes before the data with the hashes in them; no longer than before."""
        return format_header(self.specs, {**self.metadata, **hashes})

    def with_digest(self, digest: str) -> ConversionPlan:
        """Return the plan with the SHA-256 of its input in the place that was left for it."""
        metadata = {k: v.replace(NO_DIGEST, digest) for k, v in self.metadata.items()}
        return replace(self, metadata=metadata)

    @property
    def legacy_header(self) -> bytes:
        """The header of the file that kohya's older hash is taken of: training metadata only."""
        kept = {key: text for key, text in self.metadata.items() if key.startswith("ss_")}
        return format_header(self.specs, kept)

    @property
    def nbytes(self) -> int:
        """Size of the weights file (of a torch file, roughly)."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder, else it is the weights file."""
        return bool(self.weights_name)

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

    @property
    def needs_torch(self) -> bool:
        """Whether torch is needed for anything."""
        return self.is_torch or any(
            value.needs_torch
            for part in self.parts
            if not part.is_moved
            for value in part.part.values.values()
        )

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that carrying it out takes at most, roughly."""
        largest = max((spec.nbytes for spec in self.specs), default=0)
        if self.is_torch:
            return TORCH_BYTES + self.nbytes
        return (TORCH_BYTES if self.needs_torch else PYTHON_BYTES) + 6 * largest

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

    def changes(self) -> list[tuple[str, int]]:
        """Return how modules differ from what was stored, and how many each is true of."""
        return Counter(note for item in self.parts for note in item.part.notes).most_common()
