"""LoHa, LoKr, CP convolutions and VeRA: low-rank matrices in another form, written out exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from loratool.adapter.model import Adapter, Kind
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.base.model import Model
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.values.expr import Expr, Function, Result, Stored, widest

if TYPE_CHECKING:
    from loratool.values.expr import Array

__all__ = ["exactly"]

HADA: Final = (
    Slot.HADA_W1_A,
    Slot.HADA_W1_B,
    Slot.HADA_W2_A,
    Slot.HADA_W2_B,
    Slot.HADA_T1,
    Slot.HADA_T2,
)
THREE_BY_THREE: Final = ("conv1", "conv2", "conv_in", "conv_out", "conv")
"""Convolutions of a U-Net whose kernel is 3 × 3; all others have 1 × 1."""


def exactly(part: Part, adapter: Adapter, base: Model | None) -> Part:
    """Return a LoHa, LoKr, CP convolution or VeRA as A and B; its delta is the same.

    Raises:
        UnsupportedError: It lacks what only the base or PEFT can tell.
        AdapterError: One of its tensors is missing.
    """
    tensors = {slot: v.tensor for slot, v in part.values.items() if isinstance(v, Stored)}
    if part.variant == "cp":
        made = _folded_mid(part, tensors)
    elif part.variant == "loha":
        made = _from_hadamard(part, tensors, base)
    elif part.variant == "lokr":
        made = _from_kronecker(part, tensors, base)
    else:
        made = _from_vera(part, tensors, adapter, base)
    return replace(made, variant="lora")


def _folded_mid(part: Part, tensors: dict[Slot, StoredTensor]) -> Part:
    down, up, mid = (tensors[slot] for slot in (Slot.DOWN, Slot.UP, Slot.MID))
    into = (down.spec.shape[1], *mid.spec.shape[2:])

    def fold(up: Array, down: Array, mid: Array) -> tuple[Array, ...]:
        from loratool.math.exact_variants import fold_mid

        return fold_mid(up, down, mid)

    shape = (mid.spec.shape[0], *into)
    both = Function("A folded with its core", (up, down, mid), fold)
    folded = Result(both, 1, shape, down.spec.dtype)
    made = part.factored(folded, part.up, note="its core was folded into A", alpha=part.alpha)
    return replace(made, kind=Kind.CONV)


def _from_hadamard(part: Part, tensors: dict[Slot, StoredTensor], base: Model | None) -> Part:
    from loratool.math.exact_variants import hadamard_factors, hadamard_rank

    used = [tensors.get(slot) for slot in HADA]
    present = [slot for slot, tensor in zip(HADA, used, strict=True) if tensor is not None]
    if len(present) < 4:
        raise AdapterError(part.module, "lacks one of the four factors of a LoHa")

    def factors(*values: Array) -> tuple[Array, Array]:
        given = dict(zip(present, values, strict=True))
        return hadamard_factors(*(given.get(slot) for slot in HADA))

    shapes = [tensor.spec.shape if tensor else None for tensor in used]
    rank = hadamard_rank(*shapes)  # type: ignore[arg-type]
    core = tensors.get(Slot.HADA_T1)
    kernel = core.spec.shape[2:] if core is not None else _kernel(part, base)
    stored = [tensor for tensor in used if tensor is not None]
    return written_out(part, stored, factors, rank, kernel, "the Hadamard product written out")


def _from_kronecker(part: Part, tensors: dict[Slot, StoredTensor], base: Model | None) -> Part:
    from loratool.math.exact_variants import kronecker_factors, kronecker_rank

    left = [s for s in (Slot.LOKR_W1, Slot.LOKR_W1_A, Slot.LOKR_W1_B) if s in tensors]
    right = [s for s in (Slot.LOKR_W2, Slot.LOKR_W2_A, Slot.LOKR_W2_B) if s in tensors]
    core = [slot for slot in (Slot.LOKR_T2,) if slot in tensors]
    if len(left) != (1 if Slot.LOKR_W1 in left else 2) or len(right) != (
        1 if Slot.LOKR_W2 in right else 2
    ):
        raise AdapterError(part.module, "lacks a factor of its LoKr, or has one too many")
    whole = tensors.get(Slot.LOKR_W2)
    assert part.site is not None
    if whole is not None and len(whole.spec.shape) == 3 and part.site.scaling.alpha is not None:
        raise UnsupportedError(
            part.module, "is a LoKr of a one-dimensional convolution, which PEFT lays out otherwise"
        )

    def half(values: Sequence[Array]) -> Array | tuple[Array, Array]:
        return values[0] if len(values) == 1 else (values[0], values[1])

    def factors(*values: Array) -> tuple[Array, Array]:
        first, second = len(left), len(left) + len(right)
        rest = values[second:]
        return kronecker_factors(
            half(values[:first]), half(values[first:second]), rest[0] if rest else None
        )

    def shapes(slots: Sequence[Slot]) -> tuple:  # type: ignore[type-arg]
        found = tuple(tensors[slot].spec.shape for slot in slots)
        return found[0] if len(found) == 1 else found

    core_shape = tensors[Slot.LOKR_T2].spec.shape if core else None
    rank = kronecker_rank(shapes(left), shapes(right), core_shape)
    if core_shape is not None:
        kernel = core_shape[2:]
    elif whole is not None and len(whole.spec.shape) > 2:
        kernel = whole.spec.shape[2:]
    elif whole is not None and base is None:
        kernel = ()
    else:
        kernel = _kernel(part, base)
    stored = [tensors[slot] for slot in (*left, *right, *core)]
    return written_out(part, stored, factors, rank, kernel, "the Kronecker product written out")


def _from_vera(
    part: Part, tensors: dict[Slot, StoredTensor], adapter: Adapter, base: Model | None
) -> Part:
    from loratool.math.exact_variants import vera_factors

    shared = {key.rpartition(".")[2]: t for key, t in adapter.tensors.items() if ".vera_" in key}
    if not {"vera_A", "vera_B"} <= shared.keys():
        raise UnsupportedError(
            f"{adapter.path}: {part.module}",
            "is a VeRA without its shared projections (save_projection was false); only PEFT's "
            "random generator can make them again",
        )
    if base is None:
        raise UnsupportedError(
            f"{adapter.path}: {part.module}",
            "is a VeRA: only the base tells how many inputs it has",
            hint="give --base; headers are enough",
        )
    out = tensors[Slot.VERA_B].spec.shape[0]
    shape = base.place(part.module).stored_shape
    into = shape[1] if shape[0] == out else shape[0]
    stored = [tensors[Slot.VERA_B], tensors[Slot.VERA_D], shared["vera_A"], shared["vera_B"]]
    rank = tensors[Slot.VERA_D].spec.shape[0]

    def factors(*values: Array) -> tuple[Array, Array]:
        one, other, shared_a, shared_b = values
        return vera_factors(one, other, shared_a, shared_b, out, into)

    made = written_out(
        part, stored, factors, rank, (), "the shared projections written out", (out, into)
    )
    return replace(made, scale=1.0, alpha=None)


def _kernel(part: Part, base: Model | None) -> tuple[int, ...]:
    """Return the kernel of a convolution that is stored flattened."""
    place = base.find(part.module) if base is not None else None
    if place is not None:
        return place.shape[2:]
    assert part.site is not None
    into = part.site.in_features
    leaf = part.module.rpartition(".")[2]
    is_unet = part.module.startswith("unet.")
    return (3, 3) if is_unet and leaf in THREE_BY_THREE and into % 9 == 0 else ()


def written_out(
    part: Part,
    stored: Sequence[StoredTensor],
    factors: Callable[..., tuple[Array, Array]],
    rank: int,
    kernel: tuple[int, ...],
    note: str,
    shape: tuple[int, int] | None = None,
) -> Part:
    assert part.site is not None
    out, width = shape or (part.site.out_features, part.site.in_features)
    into = (width // math.prod(kernel), *kernel)
    dtype = widest([tensor.spec.dtype for tensor in stored])
    both = Function(note, tuple(stored), factors)
    down = Result(both, 1, (rank, *into), dtype)
    up = Result(both, 0, (out, rank, *(1,) * len(kernel)), dtype)
    others: dict[Slot, Expr] = {s: v for s, v in part.values.items() if s is Slot.BIAS}
    return replace(
        part,
        values={Slot.DOWN: down, Slot.UP: up, **others},
        rank=rank,
        alpha=None,
        kind=Kind.CONV if kernel else Kind.LINEAR,
        notes=(*part.notes, note),
    )
