"""Factors with kernels of convolutions, or without, as the base's weight has them."""

from __future__ import annotations

import math
from dataclasses import replace

from loratool.adapter.model import Kind, Site
from loratool.adapter.part import Part
from loratool.base.orientation import folded_kernel
from loratool.values.expr import block_diagonal

__all__ = ["shaped_like"]


def shaped_like(part: Part, shape: tuple[int, ...]) -> Part:
    """Return a part whose factors have kernels of ones, or none, as the base's weight has."""
    down, up = part.down, part.up
    if part.kind is Kind.EMBEDDING or not part.is_plain:
        return part
    if len(shape) > 2 and _is_kernel(down.shape[1:], shape[1:]):
        ones = (1,) * (len(shape) - 2)
        made = part.factored(
            down.reshaped((down.shape[0], *shape[1:])),
            up.reshaped((*up.shape[:2], *ones)),
            alpha=part.alpha,
            note="shaped like the base's convolution",
        )
        return replace(made, kind=Kind.CONV)
    if part.site is not None and len(down.shape) == 2 and folded_kernel(part.site, shape) > 1:
        return _from_loralib(part, part.site, shape)
    if len(shape) == 2 and len(down.shape) > 2 and set(down.shape[2:]) == {1}:
        made = part.factored(
            down.reshaped(down.shape[:2]),
            up.reshaped(up.shape[:2]),
            alpha=part.alpha,
            note="shaped like the base's linear layer",
        )
        return replace(made, kind=Kind.LINEAR)
    return part


def _is_kernel(inputs: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether inputs are those of a kernel, flattened or with further axes of ones.

    PEFT's cores of a convolution of one dimension have two.
    """
    if len(inputs) == 1:
        return inputs[0] == math.prod(wanted)
    more = len(inputs) - len(wanted)
    return more > 0 and inputs == (*wanted, *(1,) * more)


def _from_loralib(part: Part, site: Site, shape: tuple[int, ...]) -> Part:
    """Return loralib's factors of a convolution as A of kernels and B, at rank ``r k²``.

    There the weight's change is ``(B @ A)`` of shape ``(out · k, in · k)``, read as
    ``(out, in, k, k)``: k products beside each other, each with rows of B of its own.
    """
    out, into, kernel, _ = shape
    rows = part.down.shape[0]
    down = block_diagonal([part.down] * kernel, [rows] * kernel)
    up = part.up.reshaped((out, kernel * rows, 1, 1))
    made = part.factored(
        down.reshaped((kernel * rows, into, kernel, kernel)),
        up,
        note="loralib's factors of a convolution laid out as kernels",
        # Alpha is divided by r, and A has r · k rows.
        scale=part.scale if site.scaling.alpha is None else part.scale * kernel,
    )
    return replace(made, kind=Kind.CONV)
