"""Kinds of deltas that are not ``scale · B @ A``: what tells them apart, and their shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor

__all__ = ["EXACT_VARIANTS", "UNSCALED", "VARIANT_WORDS", "Geometry", "geometry", "variant_of"]

SIGNS: Final = (
    (Slot.HADA_W1_A, "loha"),
    (Slot.HADA_W2_A, "loha"),
    (Slot.LOKR_W1, "lokr"),
    (Slot.LOKR_W1_A, "lokr"),
    (Slot.LOKR_W2, "lokr"),
    (Slot.LOKR_W2_A, "lokr"),
    (Slot.OFT_BLOCKS, "oft"),
    (Slot.GLORA_A1, "glora"),
    (Slot.GLORA_B1, "glora"),
    (Slot.VERA_B, "vera"),
    (Slot.IA3, "ia3"),
    (Slot.MID, "cp"),
    (Slot.DIFF, "full"),
    (Slot.NORM, "norm"),
    (Slot.NORM_BIAS, "norm"),
)
"""A slot, and the variant that it marks: the first that occurs decides."""

VARIANT_WORDS: Final = {
    "loha": "LoHa, a product of two deltas element by element",
    "lokr": "LoKr, a Kronecker product",
    "oft": "OFT, rotations of the base's outputs",
    "boft": "BOFT, butterfly rotations of the base's outputs",
    "glora": "GLoRA, a delta that depends on the base's weight",
    "vera": "VeRA, scaled projections that all modules share",
    "ia3": "(IA)³, factors of the base's rows or columns",
    "cp": "a convolution in three factors (CP, lora_mid)",
    "full": "a whole difference",
    "norm": "the difference of a norm",
    "bias": "the difference of a bias",
}

EXACT_VARIANTS: Final = frozenset(("loha", "lokr", "cp", "vera"))
"""Those that a plain LoRA of some rank equals."""

UNSCALED: Final = frozenset(("full", "norm", "oft", "boft", "ia3", "vera", "bias"))
"""Those whose alpha, where there is one, is no scale."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes that a delta has, kernels flattened into its columns."""

    rank: int
    out: int
    into: int


def variant_of(slots: Mapping[Slot, StoredTensor]) -> str | None:
    """Return which variant a module's tensors make, or ``None`` for LoRA and its like."""
    found = next((name for slot, name in SIGNS if slot in slots), None)
    if found == "oft" and len(slots[Slot.OFT_BLOCKS].spec.shape) == 4:
        return "boft"
    if found is None and slots.keys() == {Slot.BIAS}:
        return "bias"
    return found


def geometry(slots: Mapping[Slot, StoredTensor], variant: str | None) -> Geometry:
    """Return the shapes of a variant's delta; zeros where its tensors do not tell.

    The rank is what alpha is divided by: that of the factors, not of the delta.
    """
    shapes = {slot: stored.spec.shape for slot, stored in slots.items()}
    try:
        match variant:
            case "loha":
                return _hadamard(shapes)
            case "lokr":
                return _kronecker(shapes)
            case "full":
                shape = shapes[Slot.DIFF]
                columns = math.prod(shape[1:])
                return Geometry(min(shape[0], columns), shape[0], columns)
            case "norm":
                size = math.prod(next(iter(shapes.values())))
                return Geometry(1, size, 1)
            case "oft" | "boft":
                *_, blocks, size, _ = shapes[Slot.OFT_BLOCKS]
                return Geometry(size, blocks * size, 0)
            case "glora":
                return _glora(shapes)
            case "vera":
                return Geometry(shapes[Slot.VERA_D][0], shapes[Slot.VERA_B][0], 0)
            case "ia3":
                return Geometry(1, math.prod(shapes[Slot.IA3]), 0)
            case "bias":
                return Geometry(1, math.prod(shapes[Slot.BIAS]), 1)
            case _:
                return Geometry(0, 0, 0)
    except (KeyError, IndexError, ValueError):
        return Geometry(0, 0, 0)


def _glora(shapes: Mapping[Slot, tuple[int, ...]]) -> Geometry:
    """Read either layout: LyCORIS before 2.0 stores ``(r, in)`` and ``(out, r)`` in b1 and b2.

    Where the shapes fit both, the smaller rank is meant.
    """
    a1, a2 = shapes[Slot.GLORA_A1], shapes[Slot.GLORA_A2]
    b1, b2 = shapes[Slot.GLORA_B1], shapes[Slot.GLORA_B2]
    is_new = a1[1] == a2[0] == b1[1] == b2[0]
    is_old = a1[0] == a2[1] == b1[0] == b2[1]
    if is_old and (not is_new or a1[0] < a1[1]):
        return Geometry(a1[0], b2[0], math.prod(b1[1:]))
    return Geometry(b2[0], b1[0], math.prod(b2[1:]))


def _hadamard(shapes: Mapping[Slot, tuple[int, ...]]) -> Geometry:
    first, second = shapes[Slot.HADA_W1_A], shapes[Slot.HADA_W1_B]
    if Slot.HADA_T1 in shapes:  # cores (r, r, *kernel) between factors (r, out) and (r, in)
        kernel = math.prod(shapes[Slot.HADA_T1][2:])
        return Geometry(second[0], first[1], second[1] * kernel)
    return Geometry(second[0], first[0], math.prod(second[1:]))


def _kronecker(shapes: Mapping[Slot, tuple[int, ...]]) -> Geometry:
    if Slot.LOKR_W1 in shapes:
        left, rank = shapes[Slot.LOKR_W1], None
    else:
        left = (shapes[Slot.LOKR_W1_A][0], shapes[Slot.LOKR_W1_B][1])
        rank = shapes[Slot.LOKR_W1_B][0]
    if Slot.LOKR_W2 in shapes:
        full = shapes[Slot.LOKR_W2]
        right = (full[0], math.prod(full[1:]))
    elif Slot.LOKR_T2 in shapes:
        core = shapes[Slot.LOKR_T2]
        rank = core[0]
        kernel = math.prod(core[2:])
        right = (shapes[Slot.LOKR_W2_A][1], shapes[Slot.LOKR_W2_B][1] * kernel)
    else:
        rank = shapes[Slot.LOKR_W2_B][0]
        right = (shapes[Slot.LOKR_W2_A][0], math.prod(shapes[Slot.LOKR_W2_B][1:]))
    whole = min(left) * min(right)
    return Geometry(rank or whole, left[0] * right[0], left[1] * right[1])
