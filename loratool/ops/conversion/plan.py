"""A conversion that will be carried out: a plain value, decided from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from loratool.adapter.slots import Slot
from loratool.files.safetensors import format_header
from loratool.files.spec import TensorSpec
from loratool.ops.algebra.provenance import with_digest
from loratool.ops.conversion.nearest import Approximation
from loratool.ops.conversion.parts import Part
from loratool.ops.conversion.values import Stored
from loratool.ops.output_plan import OutputPlan
from loratool.ops.plan import TORCH_BYTES

__all__ = ["NO_DIGEST", "ConversionPlan", "OutputPart"]

PYTHON_BYTES: Final = 60 << 20
NO_DIGEST: Final = "0" * 64
"""As long as a SHA-256: what a plan has in its place, so that its sizes are those of the file."""
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


@dataclass(frozen=True, kw_only=True)
class ConversionPlan(OutputPlan):
    """What a conversion will write; the metadata of a torch file is empty.

    Attributes:
        parts: The modules.
        is_torch: Whether the weights are written by ``torch.save``.
        is_hashed: Whether kohya's hashes belong into the metadata.
        scheme: Name of the scheme that is written.
        family: What pipeline it is for, where known.
    """

    parts: tuple[OutputPart, ...]
    is_torch: bool
    is_hashed: bool
    scheme: str
    family: str | None = None

    def module_specs(self) -> Iterator[TensorSpec]:
        """Yield the tensors of the modules."""
        return (spec for part in self.parts for spec in part.specs.values())

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
        return replace(self, metadata=with_digest(self.metadata, digest))

    @property
    def legacy_header(self) -> bytes:
        """The header of the file that kohya's older hash is taken of: training metadata only."""
        kept = {key: text for key, text in self.metadata.items() if key.startswith("ss_")}
        return format_header(self.specs, kept)

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

    def changes(self) -> list[tuple[str, int]]:
        """Return how modules differ from what was stored, and how many each is true of."""
        return Counter(note for item in self.parts for note in item.part.notes).most_common()
