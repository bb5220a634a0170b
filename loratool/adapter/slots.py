"""What one tensor is to the module that it adapts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["FACTOR_SLOTS", "VARIANT_SUFFIXES", "AdapterKey", "Slot"]


class Slot(Enum):
    """The role of a tensor. ``DOWN`` is A of shape ``(r, in)``, ``UP`` is B of ``(out, r)``."""

    DOWN = "down"
    UP = "up"
    EMBEDDING_DOWN = "embedding down"
    """A of an embedding, ``(r, num_embeddings)``."""
    EMBEDDING_UP = "embedding up"
    """B of an embedding, ``(dim, r)``."""
    MID = "mid"
    """The core of a convolution in three parts (CP), ``(r, r, *kernel)``."""
    UP_BIAS = "up bias"
    """An additive bias ``(out,)``, scaled like the delta."""
    BIAS = "bias"
    """An additive bias ``(out,)`` that no scale multiplies."""
    MAGNITUDE = "magnitude"
    """DoRA's norms, one for each output (or each embedding dimension)."""
    ALPHA = "alpha"
    """A scalar; the scale is ``alpha / rank``."""
    SINGULAR = "singular"
    """AdaLoRA's ``(r, 1)`` diagonal between the factors."""
    DIAGONAL = "diagonal"
    """KaSA's ``(r,)`` diagonal between the factors."""
    ROWS = "rows"
    """New values of some rows of an embedding, ``(len(indices), dim)``."""
    STATE = "state"
    """Something that only training needs; the delta does not depend on it."""
    HADA_W1_A = "hada_w1_a"
    HADA_W1_B = "hada_w1_b"
    HADA_W2_A = "hada_w2_a"
    HADA_W2_B = "hada_w2_b"
    HADA_T1 = "hada_t1"
    HADA_T2 = "hada_t2"
    LOKR_W1 = "lokr_w1"
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"
    LOKR_T2 = "lokr_t2"
    DIFF = "diff"
    """The whole difference of a weight."""
    NORM = "w_norm"
    """The whole difference of a norm's weight."""
    NORM_BIAS = "b_norm"
    """The whole difference of a norm's bias."""
    OFT_BLOCKS = "oft_blocks"
    """Rotations, ``(n, b, b)``; of BOFT ``(m, n, b, b)``."""
    OFT_RESCALE = "rescale"
    GLORA_A1 = "a1"
    GLORA_A2 = "a2"
    GLORA_B1 = "b1"
    GLORA_B2 = "b2"
    GLORA_BM = "bm"
    IA3 = "ia3"
    """(IA)³'s factors of rows or columns."""
    IA3_ON_INPUT = "on_input"
    VERA_B = "vera_lambda_b"
    VERA_D = "vera_lambda_d"


FACTOR_SLOTS: Final = frozenset(
    (
        Slot.DOWN,
        Slot.UP,
        Slot.EMBEDDING_DOWN,
        Slot.EMBEDDING_UP,
        Slot.HADA_W1_A,
        Slot.HADA_W2_A,
        Slot.LOKR_W1,
        Slot.LOKR_W1_A,
        Slot.LOKR_W2,
        Slot.LOKR_W2_A,
        Slot.OFT_BLOCKS,
        Slot.GLORA_A1,
        Slot.GLORA_B1,
        Slot.DIFF,
        Slot.VERA_B,
        Slot.IA3,
    )
)
"""The slots that make a key recognisable as an adapter's."""

VARIANT_SUFFIXES: Final = {
    ".hada_w1_a": Slot.HADA_W1_A,
    ".hada_w1_b": Slot.HADA_W1_B,
    ".hada_w2_a": Slot.HADA_W2_A,
    ".hada_w2_b": Slot.HADA_W2_B,
    ".hada_t1": Slot.HADA_T1,
    ".hada_t2": Slot.HADA_T2,
    ".lokr_w1": Slot.LOKR_W1,
    ".lokr_w1_a": Slot.LOKR_W1_A,
    ".lokr_w1_b": Slot.LOKR_W1_B,
    ".lokr_w2": Slot.LOKR_W2,
    ".lokr_w2_a": Slot.LOKR_W2_A,
    ".lokr_w2_b": Slot.LOKR_W2_B,
    ".lokr_t2": Slot.LOKR_T2,
    ".diff": Slot.DIFF,
    ".diff_b": Slot.BIAS,
    ".w_norm": Slot.NORM,
    ".b_norm": Slot.NORM_BIAS,
    ".oft_blocks": Slot.OFT_BLOCKS,
    ".rescale": Slot.OFT_RESCALE,
    ".a1.weight": Slot.GLORA_A1,
    ".a2.weight": Slot.GLORA_A2,
    ".b1.weight": Slot.GLORA_B1,
    ".b2.weight": Slot.GLORA_B2,
    ".bm.weight": Slot.GLORA_BM,
    ".on_input": Slot.IA3_ON_INPUT,
}
"""How LyCORIS and ComfyUI name what is not a plain LoRA, whatever comes before it."""


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """What a tensor's name says: which module, which role, and which of several adapters."""

    module: str
    slot: Slot
    adapter: str | None = None
