"""In which roles, shapes and orientation the tensors of a module are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from loratool.adapter.keys import transposed
from loratool.adapter.model import Kind, Site
from loratool.adapter.part import Part
from loratool.adapter.scheme import NoPlaceError
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.names.embeddings import is_embedding
from loratool.names.shapes import one_site_an_expert, without_idle_kernels
from loratool.schemes.parts.stacks import experts_apart
from loratool.values.expr import Expr, Stored

__all__ = [
    "EmbeddingSlots",
    "Embeddings",
    "FactorsOfTable",
    "FactorsOfWeight",
    "LycorisRoles",
    "NoEmbeddings",
    "Roles",
]

Slots = Mapping[Slot, StoredTensor]


class Embeddings(Protocol):
    """How the factors of an embedding's delta are stored."""

    def stored(self, down: Expr, up: Expr) -> dict[Slot, Expr]:
        """Return A, ``(r, vocabulary)``, and B, ``(dim, r)``, as they are stored.

        Raises:
            NoPlaceError: They are not.
        """
        ...

    def read(self, down: StoredTensor, up: StoredTensor) -> Slots | None:
        """Return what factors of an embedding are that are stored under a linear layer's names.

        ``None`` where those of embeddings have names of their own.
        """
        ...


@dataclass(frozen=True, slots=True)
class NoEmbeddings:
    """They are not stored."""

    def stored(self, down: Expr, up: Expr) -> dict[Slot, Expr]:
        """Refuse them."""
        raise NoPlaceError("the factors of an embedding")

    def read(self, down: StoredTensor, up: StoredTensor) -> Slots | None:
        """Take factors for those of a linear layer."""
        return None


@dataclass(frozen=True, slots=True)
class EmbeddingSlots:
    """Under names of their own, A as ``(r, vocabulary)`` and B as ``(dim, r)``."""

    def stored(self, down: Expr, up: Expr) -> dict[Slot, Expr]:
        """Return both in the slots of embeddings."""
        return {Slot.EMBEDDING_DOWN: down, Slot.EMBEDDING_UP: up}

    def read(self, down: StoredTensor, up: StoredTensor) -> Slots | None:
        """Take other factors for those of a linear layer."""
        return None


@dataclass(frozen=True, slots=True)
class FactorsOfTable:
    """As A, ``(r, vocabulary)``, and B, ``(dim, r)``, under the names of a linear layer's."""

    def stored(self, down: Expr, up: Expr) -> dict[Slot, Expr]:
        """Return both in the slots of linear layers."""
        return {Slot.DOWN: down, Slot.UP: up}

    def read(self, down: StoredTensor, up: StoredTensor) -> Slots | None:
        """Return both in the slots of embeddings."""
        return {Slot.EMBEDDING_DOWN: down, Slot.EMBEDDING_UP: up}


@dataclass(frozen=True, slots=True)
class FactorsOfWeight:
    """As factors of the weight as it is stored, ``(vocabulary, dim)``."""

    def stored(self, down: Expr, up: Expr) -> dict[Slot, Expr]:
        """Return both exchanged and turned."""
        return {Slot.DOWN: up.turned(), Slot.UP: down.turned()}

    def read(self, down: StoredTensor, up: StoredTensor) -> Slots | None:
        """Return both exchanged and turned back."""
        return {Slot.EMBEDDING_DOWN: transposed(up), Slot.EMBEDDING_UP: transposed(down)}


@dataclass(frozen=True)
class Roles:
    """A and B as matrices, magnitudes as PEFT has them, and biases that are scaled with B.

    Attributes:
        embeddings: How embeddings are stored.
        is_transposed: Whether A is stored as ``(in, r)`` and B as ``(r, out)``.
        has_convolutions: Whether factors with kernels, ``(r, in, *kernel)``, have a place.
        drops_kernels: Whether factors of attention may have kernels of 1 × 1, which mean nothing.
        has_variants: Whether modules without A and B have a place.
    """

    embeddings: Embeddings = field(default_factory=NoEmbeddings)
    is_transposed: bool = False
    has_convolutions: bool = True
    drops_kernels: bool = False
    has_variants: bool = False

    def view(self, slot: Slot, tensor: StoredTensor) -> StoredTensor:
        """Return a stored tensor as the model of an adapter sees it: A as ``(r, in)``."""
        is_factor = slot in (Slot.DOWN, Slot.UP) and len(tensor.spec.shape) == 2
        return transposed(tensor) if self.is_transposed and is_factor else tensor

    def apart(self, site: Site) -> list[Site]:
        """Return one site for each expert where matrices are stacked."""
        return one_site_an_expert(site) if self.is_transposed else experts_apart(site)

    def read(self, site: Site) -> Site:
        """Return ``site`` with the factors of an embedding as such, and none with idle kernels."""
        if site.kind is Kind.LINEAR and is_embedding(site.module) and site.is_plain:
            return self._embedded(site)
        if site.kind is Kind.CONV and self.drops_kernels:
            return without_idle_kernels(site)
        return site

    def _embedded(self, site: Site) -> Site:
        others = dict(site.slots)
        down, up = others.pop(Slot.DOWN, None), others.pop(Slot.UP, None)
        found = None if down is None or up is None else self.embeddings.read(down, up)
        if found is None:
            return site
        return replace(site, slots={**others, **found}, kind=Kind.EMBEDDING)

    def magnitude(self, tensor: StoredTensor) -> Expr:
        """Return stored magnitudes as ``(out,)``, and those of the inputs as they are.

        PEFT has them as ``(1, out, 1, …)`` too. Under LyCORIS' name they are as LyCORIS has them.
        """
        value = Stored(tensor)
        if tensor.spec.name.endswith(".dora_scale"):
            return _lycoris_magnitude(value)
        return value.reshaped((max(value.shape, default=1),))

    def cut(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts``: every module is one."""
        return list(parts)

    def together(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts``: every module is stored by itself."""
        return list(parts)

    def stored(self, part: Part) -> Part:
        """Return ``part`` with its tensors as they are stored.

        Raises:
            NoPlaceError: One of them is not.
        """
        values = dict(part.values)
        if part.kind is Kind.EMBEDDING and part.is_plain:
            others = {s: v for s, v in values.items() if s not in part.slots}
            values = {**self.embeddings.stored(part.down, part.up), **others}
        if part.is_plain and part.kind is Kind.CONV and not self.has_convolutions:
            raise NoPlaceError("the factors of a convolution")
        if Slot.MAGNITUDE in values:
            values[Slot.MAGNITUDE] = self._stored_magnitude(part)
        values = self._with_bias(part, values)
        if self.is_transposed:
            for slot in (Slot.DOWN, Slot.UP):
                if slot in values and len(values[slot].shape) == 2:
                    values[slot] = values[slot].turned()
        return replace(part, values=values)

    def _with_bias(self, part: Part, values: dict[Slot, Expr]) -> dict[Slot, Expr]:
        """Return ``values`` with the bias as it is multiplied by the scale."""
        if Slot.BIAS in values and part.is_plain:
            if part.scale == 0:
                raise NoPlaceError("a bias beside a delta of scale 0")
            values[Slot.UP_BIAS] = values.pop(Slot.BIAS).scaled(1 / part.scale)
        return values

    def _stored_magnitude(self, part: Part) -> Expr:
        if not part.is_plain:
            return _as_it_was(part)
        value = part.values[Slot.MAGNITUDE]
        if part.has_input_magnitudes:
            raise NoPlaceError(
                "magnitudes of the inputs (LyCORIS, wd_on_out=False)", Slot.MAGNITUDE
            )
        if part.kind is Kind.CONV:
            return value.reshaped((1, *value.shape, *(1,) * (len(part.down.shape) - 2)))
        return value


@dataclass(frozen=True)
class LycorisRoles(Roles):
    """LyCORIS' way: modules of every variant, magnitudes with kernels, biases as they are added."""

    embeddings: Embeddings = field(default_factory=FactorsOfWeight)
    drops_kernels: bool = True
    has_variants: bool = True

    def magnitude(self, tensor: StoredTensor) -> Expr:
        """Return magnitudes of the outputs as ``(out,)``, and those of the inputs as they are."""
        return _lycoris_magnitude(Stored(tensor))

    def _with_bias(self, part: Part, values: dict[Slot, Expr]) -> dict[Slot, Expr]:
        bias = values.pop(Slot.UP_BIAS, None)
        if bias is not None:
            values[Slot.BIAS] = bias.scaled(part.scale)
        return values

    def _stored_magnitude(self, part: Part) -> Expr:
        if not part.is_plain:
            return _as_it_was(part)
        value = part.values[Slot.MAGNITUDE]
        if part.kind is Kind.EMBEDDING:
            raise NoPlaceError("magnitudes of an embedding", Slot.MAGNITUDE)
        if part.has_input_magnitudes:
            return value
        return value.reshaped((*value.shape, *(1,) * (len(part.down.shape) - 1)))


def _lycoris_magnitude(value: Expr) -> Expr:
    """Return magnitudes of the outputs as ``(out,)``, those of the inputs as they are.

    LyCORIS stores ``(out, 1, …)`` or ``(1, in, …)``.
    """
    size = max(value.shape, default=1)
    is_first = len(value.shape) < 2 or value.shape[0] == size
    return value.reshaped((size,)) if is_first else value


def _as_it_was(part: Part) -> Expr:
    """Return magnitudes in the shape that they were stored in."""
    value = part.values[Slot.MAGNITUDE]
    (size,) = value.shape if len(value.shape) == 1 else (0,)
    stored = part.stored(Slot.MAGNITUDE)
    return value.reshaped(stored.spec.shape) if size and stored is not None else value
