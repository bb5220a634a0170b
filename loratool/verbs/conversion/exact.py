"""Low-rank matrices in another form (LoHa, LoKr, CP, VeRA), written out exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loratool.adapter.model import Kind, Site
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor
from loratool.names.embeddings import is_embedding
from loratool.values.arrays import decode
from loratool.values.expr import Expr, Function, Result, computed_dtype
from loratool.variants import variant_named

if TYPE_CHECKING:
    from loratool.values.expr import Array

__all__ = ["exactly"]

THREE_BY_THREE: Final = ("conv1", "conv2", "conv_in", "conv_out", "conv")
"""Convolutions of a U-Net whose kernel is 3 × 3; all others have 1 × 1."""
OTHERS: Final = (Slot.ALPHA, Slot.BIAS, Slot.UP_BIAS, Slot.MAGNITUDE)


def exactly(part: Part, base: Model | None) -> Part:
    """Return a module whose variant has factors as A and B; its delta is the same.

    Raises:
        UnsupportedError: It lacks what only the base or PEFT can tell.
        AdapterError: One of its tensors is missing.
    """
    site, variant = part.site, part.variant
    assert site is not None
    shape = _shape(part, base)
    variant.check(site, shape)
    kernel = variant.kernel(site)
    if shape is not None and not kernel:
        kernel = shape[2:]
    if kernel is None:
        kernel = _usual_kernel(part)
    width, rank = variant.width(site, shape), variant.factor_rank(site)

    def factors(*_: Array) -> tuple[Array, Array]:
        return variant.factors(site, decode, width)

    dtypes = [t.spec.dtype for t in site.tensors if t not in _others(site)]
    dtype = computed_dtype([each for each in dtypes if DTYPES[each].is_factor])  # no places
    note = f"{variant.name} written out as plain factors"
    both = Function(note, site.tensors, factors)
    down: Expr = Result(both, 0, (rank, width // math.prod(kernel), *kernel), dtype)
    up: Expr = Result(both, 1, (site.out_features, rank, *(1,) * len(kernel)), dtype)
    kind, pair = Kind.CONV if kernel else Kind.LINEAR, {Slot.DOWN: down, Slot.UP: up}
    if not kernel and is_embedding(part.module):  # its weight is (vocabulary, dim)
        kind = Kind.EMBEDDING
        pair = {Slot.EMBEDDING_DOWN: up.turned(), Slot.EMBEDDING_UP: down.turned()}
    biases: dict[Slot, Expr] = {s: v for s, v in part.values.items() if s is Slot.BIAS}
    return replace(
        part,
        variant=variant_named("lora"),
        values={**pair, **biases},
        rank=rank,
        alpha=part.alpha if rank == part.rank else None,
        kind=kind,
        notes=(*part.notes, note),
    )


def _shape(part: Part, base: Model | None) -> tuple[int, ...] | None:
    """Return the shape of the base's weight, where one was given and has it.

    Raises:
        BaseModelError: It has no such module, and its shape is needed.
    """
    if base is None:
        return None
    find = base.place if part.variant.needs_shape else base.find
    place = find(part.module)
    return place.shape if place is not None else None


def _others(site: Site) -> list[StoredTensor]:
    """Return the tensors that say nothing about the dtype of the factors."""
    return [site.slots[slot] for slot in OTHERS if slot in site.slots]


def _usual_kernel(part: Part) -> tuple[int, ...]:
    """Return the kernel of a convolution that is stored flattened."""
    assert part.site is not None
    into = part.site.in_features
    leaf = part.module.rpartition(".")[2]
    is_unet = part.module.startswith("unet.")
    return (3, 3) if is_unet and leaf in THREE_BY_THREE and into % 9 == 0 else ()
