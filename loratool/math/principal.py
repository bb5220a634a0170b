"""What some initialisations take out of the base weight, computed again from it.

PEFT changes the base when it loads an adapter of these kinds, so the adapter is only right on
top of that changed base. The decompositions are deterministic, hence recoverable from the
original weight. PEFT computes them in float32; float64 adds no error of its own.
"""

from __future__ import annotations

from loratool.math.namespace import Array, array_namespace

__all__ = ["kasa_residual", "olora_residual", "pissa_residual"]


def pissa_residual(weight: Array, rank: int) -> Array:
    """Return ``W`` less its ``rank`` leading singular components (PiSSA, arXiv 2404.02948).

    Args:
        weight: ``(m, n)``, float64.
        rank: How many components the adapter took over.
    """
    U, S, Vh = array_namespace(weight).linalg.svd(weight, full_matrices=False)
    return weight - (U[:, :rank] * S[:rank]) @ Vh[:rank]


def kasa_residual(weight: Array, rank: int) -> Array:
    """Return ``W`` less its ``rank`` trailing singular components (KaSA, arXiv 2412.06071)."""
    U, S, Vh = array_namespace(weight).linalg.svd(weight, full_matrices=False)
    kept = S.shape[0] - rank
    return (U[:, :kept] * S[:kept]) @ Vh[:kept]


def olora_residual(weight: Array, rank: int, scale: float) -> Array:
    """Return ``W - scale · Q_r R_r`` from its QR decomposition (OLoRA, arXiv 2406.01775)."""
    Q, R = array_namespace(weight).linalg.qr(weight)
    return weight - scale * (Q[:, :rank] @ R[:rank])
