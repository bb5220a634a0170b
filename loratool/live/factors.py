"""The trainable part of one adapter at one layer, and how it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from loratool.adapter.model import Kind
from loratool.errors import OptionError
from loratool.live.kinds import LayerKind, float_dtype
from loratool.math.lowrank import LowRank

__all__ = ["INITIALISATIONS", "Factors", "NewAdapter", "new_factors"]

INITIALISATIONS: Final = ("default", "gaussian", "pissa")


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """What a fresh adapter is like.

    Attributes:
        rank: Rank of its deltas.
        alpha: The scale is ``alpha / rank``, or ``alpha / √rank`` if rank-stabilised.
        dropout: Probability with which an input is dropped in training.
        rank_stabilised: See arXiv 2312.03732.
        initialisation: ``default`` (Kaiming-uniform A, zero B), ``gaussian`` (normal A, zero B),
            or ``pissa`` (arXiv 2404.02948).
        std: Of ``gaussian``.
        enable: For merged projections: which of the equal parts of the outputs are adapted.
        dora: Decompose the weight into magnitude and direction (arXiv 2402.09353).
        bias: Train a bias beside B.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    initialisation: str = "default"
    std: float = 0.02
    enable: tuple[bool, ...] = ()
    dora: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError("rank", f"{self.rank} is less than 1")
        if not math.isfinite(self.alpha):
            raise OptionError("alpha", f"{self.alpha} is no finite number")
        if not 0 <= self.dropout < 1:
            raise OptionError("dropout", f"{self.dropout:g} is not in [0, 1)")
        if self.initialisation not in INITIALISATIONS:
            words = f"{self.initialisation!r} is none of {', '.join(INITIALISATIONS)}"
            raise OptionError("initialisation", words)
        if self.enable and not any(self.enable):
            raise OptionError("enable", "enables no part")
        if self.dora and self.bias:
            raise OptionError("dora", "has no bias beside B; PEFT does not know the two together")
        if self.initialisation == "pissa" and self.alpha == 0:
            raise OptionError("alpha", "with alpha 0 there is no scale to divide by")

    @property
    def scale(self) -> float:
        """What multiplies ``B @ A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class Factors(nn.Module):
    """One adapter's delta at one layer.

    Args:
        down: A.
        up: B; for merged projections the parts that are enabled, one below the other.
        scale: What multiplies their product.
        enable: Which parts of the outputs ``up`` covers; empty for all as one.
        dropout: Probability with which an input is dropped in training.
        initial: A and B at the start, whose product is taken off again (PiSSA); the base
            itself never changes.
        magnitude: DoRA's norms, ``(out,)``.
        bias: An additive bias ``(out,)``, scaled like the delta.
    """

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        scale: float,
        *,
        enable: Sequence[bool] = (),
        dropout: float = 0.0,
        initial: tuple[Tensor, Tensor] | None = None,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale
        self.enable = tuple(enable)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        first_down, first_up = initial if initial is not None else (None, None)
        self.register_buffer("initial_down", first_down)
        self.register_buffer("initial_up", first_up)
        self.magnitude = nn.Parameter(magnitude) if magnitude is not None else None
        self.bias = nn.Parameter(bias) if bias is not None else None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """A, and B with a row for every output."""
        return self.down, _spread(self.up, self.enable)

    @property
    def initial(self) -> tuple[Tensor, Tensor] | None:
        """A and B at the start, where they are taken off again."""
        down, up = self.initial_down, self.initial_up
        if not (isinstance(down, Tensor) and isinstance(up, Tensor)):
            return None
        return down, _spread(up, self.enable)

    def delta(self) -> LowRank:
        """Return the delta ``(out, in)`` as files hold it, kernels flattened."""
        down, up = (tensor.detach().flatten(1) for tensor in self.pair)
        if self.initial is not None:
            first_down, first_up = (tensor.flatten(1) for tensor in self.initial)
            down, up = torch.cat([down, first_down]), torch.cat([up, -first_up], dim=1)
        return LowRank(up, down, self.scale)

    def dropped(self, kind: LayerKind, x: Tensor) -> Tensor:
        """Return an input with dropout, in training; the input itself otherwise."""
        is_active = self.training and not isinstance(self.dropout, nn.Identity)
        return self.dropout(x) if is_active and kind.kind is not Kind.EMBEDDING else x

    def output(self, kind: LayerKind, base: nn.Module, x: Tensor) -> Tensor:
        """Return what the delta adds to an output of the layer, its scale included."""
        found = kind.delta_output(base, x, *self.pair)
        if self.initial is not None:
            found = found - kind.delta_output(base, x, *self.initial)
        return found * self.scale


def _spread(up: Tensor, enable: Sequence[bool]) -> Tensor:
    """Return B with rows for all parts: zero for those that are not enabled.

    A stacks the ranks of the enabled parts; each part of B acts on its own.
    """
    if not enable:
        return up
    count = sum(enable)
    rows, rank = up.shape[0] // count, up.shape[1]
    full = up.new_zeros(rows * len(enable), rank * count)
    parts = iter(range(count))
    pieces = []
    for is_on in enable:
        piece = full.new_zeros(rows, rank * count)
        if is_on:
            part = next(parts)
            block = up[part * rows : (part + 1) * rows]
            piece = torch.nn.functional.pad(block, (part * rank, (count - part - 1) * rank))
        pieces.append(piece)
    return torch.cat(pieces)


def new_factors(new: NewAdapter, kind: LayerKind, base: nn.Module, path: str) -> Factors:
    """Return fresh factors for a layer, in the dtype and on the device of its weight.

    Raises:
        OptionError: The layer cannot be adapted that way.
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    out, into = kind.sizes(weight)
    count = sum(new.enable) or 1
    if new.enable and (kind.kind is not Kind.LINEAR or out % len(new.enable)):
        raise OptionError(path, f"{out} outputs do not fall into {len(new.enable)} equal parts")
    if new.bias and kind.kind is Kind.EMBEDDING:
        raise OptionError(path, "an embedding has no bias")
    if (new.dora or new.bias) and new.enable:
        raise OptionError(path, "merged projections have neither magnitudes nor biases")
    rows = out * count // len(new.enable) if new.enable else out
    options: dict[str, Any] = {"dtype": float_dtype(weight), "device": weight.device}
    down = torch.empty(new.rank * count, *into, **options)
    up = torch.zeros(rows, new.rank, *[1] * (len(into) - 1), **options)
    initial = None
    if new.initialisation == "pissa":
        if new.enable or kind.kind is not Kind.LINEAR:
            raise OptionError(path, "pissa is defined for ordinary linear layers")
        down, up = (factor.to(**options) for factor in _principal(weight, kind, new))
        initial = (down.clone(), up.clone())
    elif kind.kind is Kind.EMBEDDING:
        down.zero_()
        nn.init.normal_(up, std=new.std if new.initialisation == "gaussian" else 1.0)
    elif new.initialisation == "gaussian":
        nn.init.normal_(down, std=new.std)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    magnitude = None
    if new.dora:
        wide = torch.promote_types(weight.dtype, torch.float32)
        matrix = kind.matrix(weight.detach().to(wide))
        magnitude = matrix.norm(dim=0 if kind.is_transposed else 1).to(**options)
    bias = torch.zeros(out, **options) if new.bias else None
    return Factors(
        down,
        up,
        new.scale,
        enable=new.enable,
        dropout=new.dropout,
        initial=initial,
        magnitude=magnitude,
        bias=bias,
    )


def _principal(weight: Tensor, kind: LayerKind, new: NewAdapter) -> tuple[Tensor, Tensor]:
    """Return A and B of the leading singular part of a weight, divided by the scale."""
    matrix = weight.detach().float()
    if kind.is_transposed:
        matrix = matrix.mT
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[: new.rank] / abs(new.scale)).sqrt()
    sign = math.copysign(1.0, new.scale)
    return root[:, None] * Vh[: new.rank], U[:, : new.rank] * root * sign
