"""What a layer does with factors: in its forward pass, and in its stored weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from loratool.adapter.model import Kind
from loratool.errors import UnsupportedError
from loratool.math.lowrank import LowRank

__all__ = ["LayerKind", "kind_of"]

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        kind: Linear, conv or embedding.
        is_transposed: Whether the weight is stored as ``(in, out)``, as Conv1D and embeddings do.
    """

    kind: Kind
    is_transposed: bool = False

    def delta_output(self, base: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return ``B A x`` for an input of the layer; no scale.

        Args:
            base: The layer.
            x: Its input.
            down: A: ``(r, in)``, ``(r, in, *kernel)`` or ``(r, num_embeddings)``.
            up: B: ``(out, r)``, ``(out, r, 1, …)`` or ``(dim, r)``.
        """
        if self.kind is Kind.EMBEDDING:
            assert isinstance(base, nn.Embedding)
            rows = functional.embedding(x, down.mT, padding_idx=base.padding_idx)
            scale = getattr(base, "embed_scale", None)
            found: Tensor = rows @ up.mT
            if isinstance(scale, Tensor | float | int):
                found = found * scale
            return found
        if self.kind is Kind.CONV:
            assert isinstance(base, CONVOLUTIONS)
            inner: Tensor = base._conv_forward(x.to(down.dtype), down, None)
            channels = inner.dim() - 1 - len(base.kernel_size)
            return (inner.movedim(channels, -1) @ up.flatten(1).mT).movedim(-1, channels)
        return functional.linear(functional.linear(x.to(down.dtype), down), up)

    def base_output(self, base: nn.Module, result: Tensor) -> Tensor:
        """Return the layer's output without its bias."""
        bias = getattr(base, "bias", None)
        if not isinstance(bias, Tensor) or self.kind is Kind.EMBEDDING:
            return result
        return result - self.along_outputs(bias, base)

    def along_outputs(self, vector: Tensor, base: nn.Module) -> Tensor:
        """Return ``(out,)`` in a shape that multiplies or adds to an output."""
        if isinstance(base, CONVOLUTIONS):
            return vector.reshape(-1, *[1] * len(base.kernel_size))
        return vector

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as the matrix that it is stored as, ``(rows, columns)``."""
        return weight.reshape(weight.shape[0], -1)

    def stored(self, delta: LowRank) -> LowRank:
        """Return a delta ``(out, in)`` as it lies in the stored matrix."""
        return delta.mT if self.is_transposed else delta

    def sizes(self, weight: Tensor) -> tuple[int, tuple[int, ...]]:
        """Return outputs, and the shape of A without its rank."""
        if self.is_transposed:
            return weight.shape[1], (weight.shape[0],)
        return weight.shape[0], tuple(weight.shape[1:])


def kind_of(module: nn.Module, path: str, *, fan_in_fan_out: bool = False) -> LayerKind | None:
    """Return what kind of layer ``module`` is, or ``None`` where no adapter fits it.

    Conv1D-style layers are told by the name of their class, or by ``fan_in_fan_out`` where
    a class of another name has a two-dimensional weight.

    Raises:
        UnsupportedError: It is a layer whose delta no factors express.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    if is_parametrized(module):
        raise UnsupportedError(path, "its weight is computed by a parametrisation")
    if isinstance(module, nn.Linear):
        return LayerKind(Kind.LINEAR)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise UnsupportedError(path, "an embedding with max_norm or scale_grad_by_freq")
        is_own = type(module).forward is not nn.Embedding.forward
        if is_own and not hasattr(module, "embed_scale"):
            name = type(module).__name__
            raise UnsupportedError(path, f"{name} does more than look rows up")
        return LayerKind(Kind.EMBEDDING, is_transposed=True)
    if isinstance(module, CONVOLUTIONS):
        if module.groups != 1:
            raise UnsupportedError(
                path, "a grouped convolution, whose delta no factors of PEFT express"
            )
        return LayerKind(Kind.CONV)
    if type(module).__name__ == "Conv1D" or (fan_in_fan_out and weight.dim() == 2):
        return LayerKind(Kind.LINEAR, is_transposed=True)
    return None


def float_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype for factors beside ``weight``: its own, if that is one to compute in."""
    return weight.dtype if weight.dtype.is_floating_point else torch.float32
