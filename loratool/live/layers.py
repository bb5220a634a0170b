"""The wrapper around an adapted layer: base output plus the active deltas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loratool.errors import UnsupportedError
from loratool.live.factors import Factors
from loratool.live.kinds import LayerKind
from loratool.math.deltas import Additive, Delta, WeightDecomposed, column_norms
from loratool.math.lowrank import stack

__all__ = ["LiveLayer", "Shared"]


@dataclass
class Shared:
    """What all layers of one model have in common.

    Attributes:
        active: Names of the active adapters with their weights. Replaced as a whole, never
            changed in place, so that each layer sees either the old or the new one.
        samples: For each sample of a batch the adapter to apply, or ``None`` outside of such.
        fold_on_eval: Whether ``eval()`` folds and ``train()`` unfolds.
        flags: Which parameters, by owner and name, required a gradient before.
        version: Grows whenever adapters come or go, so that handles know what they remember.
    """

    active: tuple[tuple[str, float], ...] = ()
    samples: tuple[str | None, ...] | None = None
    fold_on_eval: bool = False
    flags: list[tuple[nn.Module, str, bool]] = field(default_factory=list)
    version: int = 0


class LiveLayer(nn.Module):
    """A layer with any number of adapters; the layer itself is neither copied nor changed.

    Attributes it does not have are looked up on the layer, so that code that reads ``weight``
    or ``in_features`` goes on working.
    """

    def __init__(self, base: nn.Module, kind: LayerKind, shared: Shared) -> None:
        super().__init__()
        self.base = base
        self.kind = kind
        self.shared = shared
        self.adapters = nn.ModuleDict()
        self.folded: tuple[tuple[str, float], ...] | None = None
        self.kept: dict[str, nn.Parameter] = {}
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if name != "base" and "base" in modules:
                return getattr(modules["base"], name)
            raise

    def factors(self, name: str) -> Factors | None:
        """Return the part of one adapter, or ``None`` where it leaves this layer alone."""
        if name not in self.adapters:
            return None
        found = self.adapters[name]
        assert isinstance(found, Factors)
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, plus what the active adapters add."""
        result = self.base(x, *args, **kwargs)
        assert isinstance(result, Tensor)
        samples = self.shared.samples
        if self.folded is not None:
            if samples is not None:
                raise UnsupportedError("per-sample adapters", "the adapters are folded in")
            return result
        if samples is not None:
            return self._by_sample(x, result, samples)
        plain = result
        for name, weight in self.shared.active:
            factors = self.factors(name)
            if factors is not None:
                result = result + self._change(factors, x, plain, weight)
        return result

    def _change(self, factors: Factors, x: Tensor, plain: Tensor, weight: float) -> Tensor:
        dropped = factors.dropped(self.kind, x)
        change = factors.output(self.kind, self.base, dropped)
        if factors.magnitude is not None:
            factor = self.kind.along_outputs(self._ratio(factors), self.base)
            whole = plain if dropped is x else self.base(dropped)
            change = factor * change + (factor - 1) * self.kind.base_output(self.base, whole)
        if factors.bias is not None:
            change = change + self.kind.along_outputs(factors.bias * factors.scale, self.base)
        return (change * weight).to(plain.dtype)

    def _ratio(self, factors: Factors) -> Tensor:
        """Return DoRA's ``magnitude / ‖W + Δ‖``, ``(out,)``; the norm takes no gradient."""
        with torch.no_grad():
            weight = self.base.weight
            assert isinstance(weight, Tensor)
            matrix = self.kind.matrix(weight.detach())
            kind = torch.promote_types(matrix.dtype, torch.float32)
            moved = matrix.to(kind, copy=True)
            delta = self.kind.stored(factors.delta())
            moved += delta.scale * (delta.up.to(kind) @ delta.down.to(kind))
            norms = moved.norm(dim=0 if self.kind.is_transposed else 1)
        assert factors.magnitude is not None
        ratio: Tensor = factors.magnitude / norms.to(factors.magnitude.dtype)
        return ratio

    def _by_sample(self, x: Tensor, result: Tensor, samples: tuple[str | None, ...]) -> Tensor:
        """Return a batch in which each sample has an adapter of its own."""
        repeats, rest = divmod(result.shape[0], len(samples) or 1)
        if rest or not repeats:
            raise UnsupportedError(
                "per-sample adapters",
                f"{len(samples)} names for a batch of {result.shape[0]}",
            )
        # Some models fold the sequence into the batch, sample by sample.
        samples = tuple(name for name in samples for _ in range(repeats))
        changed = result
        for name in dict.fromkeys(samples):
            factors = self.factors(name) if name is not None else None
            if factors is None:
                continue
            rows = torch.tensor(
                [i for i, other in enumerate(samples) if other == name], device=result.device
            )
            change = self._change(factors, x[rows], result[rows], 1.0)
            changed = changed.index_add(0, rows, change)
        return changed

    def train(self, mode: bool = True) -> LiveLayer:
        """Switch between training and evaluation; may fold and unfold, where that was asked."""
        super().train(mode)
        if self.shared.fold_on_eval:
            if mode:
                self.unfold()
            else:
                self.fold()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LiveLayer:
        """Move or convert the layer; what is folded is folded again from the moved weight."""
        folded = self.folded is not None
        self.unfold()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if folded:
            self.fold()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with the original weight, folded or not."""
        folded = self.folded is not None
        self.unfold()
        state = super().state_dict(*args, **kwargs)
        if folded:
            self.fold()
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Unfold before the original weight is loaded."""
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the active deltas into a weight of the layer's own; the original one is kept.

        So a weight that another layer shares (a tied head) changes here alone. The sum is
        float32 (float64 for a float64 weight) and rounded once, as in a merge.
        """
        if self.folded is not None:
            return
        chosen = [
            (factors, weight)
            for name, weight in self.shared.active
            if (factors := self.factors(name)) is not None
        ]
        self.folded = self.shared.active
        if not chosen:
            return
        self._exchange("weight", self.folded_weight(chosen))
        biases = [f.bias * f.scale * w for f, w in chosen if f.bias is not None]
        if biases:
            bias = getattr(self.base, "bias", None)
            if not isinstance(bias, Tensor):
                self.unfold()
                raise UnsupportedError("fold", "the layer has no bias that a trained one adds to")
            self._exchange("bias", torch.stack([bias, *biases]).sum(dim=0).to(bias.dtype))

    def _exchange(self, name: str, value: Tensor) -> None:
        """Give the layer another parameter and keep its own, which others may share."""
        own = self.base._parameters[name]
        assert own is not None
        self.kept[name] = own
        self.base._parameters[name] = nn.Parameter(value, requires_grad=False)

    def folded_weight(self, chosen: list[tuple[Factors, float]]) -> Tensor:
        """Return the weight with some deltas added, in its own shape and dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        kind = torch.promote_types(weight.dtype, torch.float32)
        original = self.kind.matrix(weight.detach()).to(kind)
        block = original.clone()
        for delta in self._deltas(chosen, original):
            delta.apply(block, original, 0)
        return block.to(weight.dtype).reshape(weight.shape)

    def _deltas(self, chosen: list[tuple[Factors, float]], original: Tensor) -> list[Delta]:
        """Return the changes of the stored matrix, as a merge would make them."""
        found: list[Delta] = []
        plain = []
        for factors, weight in chosen:
            raw = factors.delta()
            kind = original.dtype
            delta = self.kind.stored(type(raw)(raw.up.to(kind), raw.down.to(kind), raw.scale))
            if factors.magnitude is None:
                plain.append(type(delta)(delta.up, delta.down, delta.scale * weight))
                continue
            norms = None
            if self.kind.is_transposed:
                blocks = iter([(0, original.clone())])
                norms = column_norms(blocks, Additive(delta), original.shape[1])
            magnitude = factors.magnitude.detach().to(kind)
            found.append(WeightDecomposed(Additive(delta), magnitude, norms, weight))
        if plain:
            found.insert(0, Additive(stack(plain)))
        return found

    @torch.no_grad()
    def unfold(self) -> None:
        """Bring the original weight back, the same object, and free the folded one."""
        for name, parameter in self.kept.items():
            self.base._parameters[name] = parameter
        self.kept.clear()
        self.folded = None
