"""The one handle on all adapters of a live model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.live.factors import Factors
from loratool.live.kinds import LayerKind
from loratool.live.layers import LiveLayer, Shared

__all__ = ["Live"]


class Live:
    """Adapters on a model: add, activate, fold, remove, save.

    Everything is kept in the model's own modules, so that copies, pickles and replicas of the
    model carry it along; :meth:`of` gives the handle on any of them.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: list[tuple[str, LiveLayer]] = []
        self._shared = Shared(version=-1)
        self._version = -2
        self._look()

    def _look(self) -> None:
        """Find the layers of the model again, where they may have changed."""
        if self._version == self._shared.version and self._known:
            return
        self._known = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, LiveLayer)
        ]
        if self._known:
            self._shared = self._known[0][1].shared
        if any(layer.shared is not self._shared for _, layer in self._known):
            raise OptionError(
                "attach", "adapters came to parts of this model one by one, not to the whole"
            )
        self._version = self._shared.version
        self._factors: dict[str, list[nn.Module]] = {}
        for _, layer in self._known:
            for name, factors in layer.adapters.items():
                self._factors.setdefault(name, []).append(factors)

    @property
    def shared(self) -> Shared:
        """What all layers have in common."""
        self._look()
        return self._shared

    @staticmethod
    def of(model: nn.Module) -> Live | None:
        """Return the handle on a model with adapters, or ``None`` if it has none."""
        has_layers = any(isinstance(module, LiveLayer) for module in model.modules())
        return Live(model) if has_layers else None

    # ------------------------------------------------------------------ looking

    def layers(self) -> list[tuple[str, LiveLayer]]:
        """Return every wrapped layer with the path of the layer inside it."""
        self._look()
        return self._known

    def layers_and_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every module of the model as if nothing were wrapped."""
        for path, module in self.model.named_modules():
            parts = path.split(".")
            if isinstance(module, LiveLayer):
                yield path, module.base
            elif not _is_inside(self.model, parts):
                yield path, module

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, in the order in which they came."""
        self._look()
        return tuple(self._factors)

    @property
    def active(self) -> tuple[tuple[str, float], ...]:
        """The active adapters with their weights."""
        return self.shared.active

    @property
    def is_folded(self) -> bool:
        """Whether the active adapters are in the weights."""
        return any(layer.folded is not None for _, layer in self.layers())

    def count(self) -> tuple[int, int]:
        """Return the number of trainable parameters, and of all."""
        parameters = list(self.model.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        return sum(p.numel() for p in parameters if p.requires_grad), total

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter, by default of those that are active."""
        names = [name] if name is not None else [active for active, _ in self.active]
        for one in names:
            self._check_name(one)
            for factors in self._factors[one]:
                yield from factors.parameters()

    # ----------------------------------------------------------------- changing

    def freeze(self, keep: Callable[[str, nn.Module], bool]) -> None:
        """Freeze what is not frozen yet, but for modules that ``keep`` says yes to.

        What required a gradient is remembered, to be as it was in the end.
        """
        if not self.layers():
            self._shared = Shared()
        shared = self._shared
        known = {(id(module), name) for module, name, _ in shared.flags}
        inside = {id(part) for _, layer in self.layers() for part in layer.adapters.modules()}
        fresh = [
            (path, module, name, parameter)
            for path, module in self.model.named_modules()
            if id(module) not in inside
            for name, parameter in module.named_parameters(recurse=False)
            if (id(module), name) not in known
        ]
        kept = {id(parameter) for path, module, _, parameter in fresh if keep(path, module)}
        shared.flags += [(m, name, p.requires_grad) for _, m, name, p in fresh]
        for _, _, _, parameter in fresh:
            parameter.requires_grad_(id(parameter) in kept)

    def install(self, name: str, found: Mapping[str, tuple[LayerKind, Factors]]) -> None:
        """Put factors at the layers they are for; wraps what is not wrapped yet."""
        folded = self._take_out()
        known = dict(self.layers())
        is_whole = bool(known) and len(folded) == len(known)
        for path, (kind, factors) in found.items():
            layer = known.get(path)
            if layer is None:
                layer = self._wrap(path, kind)
            factors.train(layer.training)
            layer.adapters[name] = factors
        self.shared.version += 1
        self._put_in([layer for _, layer in self.layers()] if is_whole else folded)

    def _wrap(self, path: str, kind: LayerKind) -> LiveLayer:
        base = self.model.get_submodule(path)
        layer = LiveLayer(base, kind, self._shared)
        _replace(self.model, base, layer)
        return layer

    def activate(self, choice: str | Sequence[str] | Mapping[str, float]) -> None:
        """Make one adapter active, or several with weights; only theirs are trained.

        Nothing is copied: the choice is one value that all layers read.

        Raises:
            OptionError: There is no such adapter.
            UnsupportedError: Several are chosen and one is a DoRA, whose order would matter.
        """
        chosen: tuple[tuple[str, float], ...]
        if isinstance(choice, str):
            chosen = ((choice, 1.0),)
        elif isinstance(choice, Mapping):
            chosen = tuple((name, float(weight)) for name, weight in choice.items())
        else:
            chosen = tuple((name, 1.0) for name in choice)
        for name, weight in chosen:
            self._check_name(name)
            if not math.isfinite(weight):
                raise OptionError("activate", f"{weight} is no finite number")
        if len({name for name, _ in chosen}) < len(chosen):
            raise OptionError("activate", "an adapter is named twice")
        if len(chosen) > 1:
            self._check_sum([name for name, _ in chosen])
        folded = self._take_out()
        self.shared.active = chosen
        wanted = {name for name, _ in chosen}
        for name, parts in self._factors.items():
            for part in parts:
                for parameter in part._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad = name in wanted
        self._put_in(folded)

    def _check_sum(self, names: Sequence[str]) -> None:
        for path, layer in self.layers():
            parts = [part for name in names if (part := layer.factors(name)) is not None]
            if len(parts) > 1 and any(part.magnitude is not None for part in parts):
                raise UnsupportedError(
                    path, "several adapters of which one is a DoRA: their order would matter"
                )

    def deactivate(self) -> None:
        """Make no adapter active: the model computes what its base does, bit for bit."""
        self.activate(())

    @contextmanager
    def using(self, choice: str | Sequence[str] | Mapping[str, float]) -> Iterator[Live]:
        """Activate adapters for a while."""
        before = dict(self.active)
        self.activate(choice)
        try:
            yield self
        finally:
            names = self.names
            self.activate({name: weight for name, weight in before.items() if name in names})

    @contextmanager
    def per_sample(self, names: Sequence[str | None]) -> Iterator[Live]:
        """Apply an adapter of its own to each sample of a batch, or none where it is ``None``.

        Raises:
            OptionError: There is no such adapter, or the model is folded.
        """
        for name in names:
            if name is not None:
                self._check_name(name)
        if self.is_folded:
            raise OptionError("per_sample", "the adapters are folded in; unfold first")
        before = self.shared.samples
        self.shared.samples = tuple(names)
        try:
            yield self
        finally:
            self.shared.samples = before

    def fold(self) -> None:
        """Put the active deltas into the weights, so that they cost nothing any more.

        Each adapted weight is kept beside its changed self until :meth:`unfold`: that memory is
        the price of getting it back bit for bit.
        """
        self._put_in([layer for _, layer in self.layers()])

    def _take_out(self) -> list[LiveLayer]:
        """Unfold, and return the layers that were folded."""
        folded = [layer for _, layer in self.layers() if layer.folded is not None]
        for layer in folded:
            layer.unfold()
        return folded

    def _put_in(self, layers: Sequence[LiveLayer]) -> None:
        """Fold some layers, all of them or none."""
        fresh = [layer for layer in layers if layer.folded is None]
        try:
            for layer in fresh:
                layer.fold()
        except BaseException:
            for layer in fresh:
                layer.unfold()
            raise

    def unfold(self) -> None:
        """Bring the original weights back, bit for bit."""
        for _, layer in self.layers():
            layer.unfold()

    def remove(self, name: str) -> None:
        """Take an adapter away; with the last one the original modules are back.

        Raises:
            OptionError: There is no such adapter.
        """
        self._check_name(name)
        remaining = {other: weight for other, weight in self.active if other != name}
        shared = self.shared
        folded = self._take_out()
        for _, layer in list(self.layers()):
            if name in layer.adapters:
                del layer.adapters[name]
            if not layer.adapters:
                _replace(self.model, layer, layer.base)
        shared.active = tuple(remaining.items())
        shared.version += 1
        if not self.names:
            for module, name, flag in shared.flags:
                parameter = module._parameters.get(name)
                if parameter is not None:
                    parameter.requires_grad_(flag)
            self._shared = Shared(version=-1)
        else:
            self._put_in([layer for layer in folded if layer.adapters])

    def detach(self) -> nn.Module:
        """Take all adapters away and return the model as it was."""
        for name in self.names:
            self.remove(name)
        return self.model

    # ------------------------------------------------------------------ storing

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one adapter alone, by path and role."""
        self._check_name(name)
        return {
            f"{path}.{key}": value.detach()
            for path, layer in self.layers()
            if (factors := layer.factors(name)) is not None
            for key, value in factors.state_dict().items()
        }

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            AdapterError: Tensors are missing, left over, or of another shape; all are listed.
        """
        own = self.state_dict(name)
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
        if missing or unexpected or shapes:
            words = [
                f"{word} {', '.join(sorted(keys))}"
                for word, keys in (
                    ("missing:", missing),
                    ("unexpected:", unexpected),
                    ("other shapes:", shapes),
                )
                if keys
            ]
            raise AdapterError(name, "; ".join(words))
        folded = self._take_out()
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])
        self._put_in(folded)

    def save(
        self,
        output: str | PathLike[str],
        name: str | None = None,
        *,
        to: str = "peft",
        base_model: str | None = None,
        force: bool = False,
    ) -> None:
        """Write one adapter as a file that any loader of its scheme reads.

        Args:
            output: A folder, or a file for schemes without a configuration.
            name: Which adapter; by default the active one.
            to: The scheme.
            base_model: What the configuration says the base is.
            force: Replace an existing output.

        Raises:
            LoratoolError: Nothing was written; the message says why.
        """
        from loratool.live.saving import save

        if name is None:
            if len(self.active) != 1:
                raise OptionError("save", f"say which adapter: {', '.join(self.names)}")
            name = self.active[0][0]
        self._check_name(name)
        save(self, name, Path(output), to=to, base_model=base_model, force=force)

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names) or "none"
            raise OptionError("adapter", f"{name!r} is not attached; attached: {known}")


def _is_inside(model: nn.Module, parts: Sequence[str]) -> bool:
    """Whether a path leads through a wrapper."""
    module: Any = model
    for part in parts:
        if isinstance(module, LiveLayer):
            return True
        if not part:
            return False
        module = module._modules[part]
    return False


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is in ``model``, however often that is."""
    for module in list(model.modules()):
        if module is new:
            continue
        for key, child in list(module._modules.items()):
            if child is old:
                module._modules[key] = new
