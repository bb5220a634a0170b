"""Which tensors of the files the parameters of the live model are, where the two differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NoReturn

from loratool.base.config import ModelConfig
from loratool.base.layout import Fused
from loratool.base.modules import ModuleIndex
from loratool.codecs.weights import Weight
from loratool.errors import BaseModelError, UnsupportedError
from loratool.names.transformers import LiveParameters, Naming, naming_of

__all__ = ["ExpertPart", "LiveModel", "Stack"]

WEIGHT: Final = ".weight"
ATTENTION: Final = ".in_proj_weight"
RENAMED: Final = ((), ("transpose if needed",))
"""Operations that leave a tensor one parameter, as it is or as its shape tells."""
ROWS: Final = ("cut", "split", "rope")
"""Operations of which those consist that cut rows into parameters, or change their order."""
UNPAIRED: Final = "rows paired for rotary embeddings, and config.json does not tell the heads"
ELSEWHERE: Final = {
    "rope": f"its {UNPAIRED}",
    "interleave": "its two halves interleaved row by row, in another order than the live model",
    "transpose": "it transposed, other than the live model",
}
"""What the operations make of a parameter that nothing can be put into here."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of the live model that is all experts' in one.

    Attributes:
        tensors: The tensors of each part of each expert, in their order, where the files have
            the experts apart.
        whole: The tensor that is all of it, where there is such.
        is_turned: Whether that has the two axes of an expert exchanged.
        is_interleaved: Whether its two halves are row by row in that.
    """

    tensors: tuple[tuple[str, ...], ...] = ()
    whole: str | None = None
    is_turned: bool = False
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Which part of a parameter of the live model one expert's projection is.

    Attributes:
        parameter: The parameter.
        expert: Which expert.
        index: Which of the parts along the output.
        parts: How many there are.
    """

    parameter: str
    expert: int
    index: int
    parts: int


@dataclass
class _Found:
    """What the tensors of the files are, by the names of the live model.

    Attributes:
        renamed: The tensor of a parameter that is one.
        stacks: Parameters of all experts that are one tensor, in another order.
        fused: Projections of which live model and files have several in one, by all their names.
        elsewhere: A tensor of a parameter into which nothing can be put, and why.
        joined: The tensors that are joined to a parameter, by their place in it.
        shared: The tensors of each expert of several parameters, whose experts are in one list.
        experts: The tensors of each expert, by the expert and their place in it.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)
    elsewhere: dict[str, tuple[str, str]] = field(default_factory=dict)
    joined: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    shared: dict[tuple[str, ...], dict[int, dict[int, str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    experts: dict[str, dict[int, dict[int, str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )

    def rename(self, live: str, name: str) -> None:
        """Note that the tensor ``name`` is the parameter ``live``; its own name is the best."""
        other = self.renamed.setdefault(live, name)
        if other != name and live not in (other, name):
            self.elsewhere[live] = (name, f"it twice, as {other!r} too")
        elif name == live:
            self.renamed[live] = name

    def check(self, name: str) -> None:
        """Refuse a parameter that the files have, but not as anything can be put there.

        Raises:
            UnsupportedError: It is one.
        """
        if name in self.elsewhere:
            stored, why = self.elsewhere[name]
            raise UnsupportedError(name, f"the files have {why}, in {stored!r}")

    def unpaired(self, name: str) -> NoReturn:
        """Refuse a projection of which nothing tells the heads."""
        raise UnsupportedError(
            name, f"has {UNPAIRED}", hint="give the folder with the base's config.json"
        )


class LiveModel:
    """The names of the live model, for the tensors of its files.

    Args:
        config: What the model says of itself.
        tensors: The tensors of the files.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight]) -> None:
        self.config = config
        self.tensors = tensors
        self._naming = naming_of(config.raw)

    @cached_property
    def _tensors(self) -> _Found | None:
        return self._read(self._naming) if self._naming is not None else None

    @cached_property
    def _index(self) -> ModuleIndex:
        found = self._tensors
        return ModuleIndex(found.renamed if found else (), self.config.model_types)

    def _read(self, naming: Naming) -> _Found:
        found = _Found()
        for name in self.tensors:
            live = naming.live(name)
            operations = live.operations
            is_weight = name.endswith((WEIGHT, ATTENTION))
            if operations in RENAMED:
                found.rename(live.names[0], name)
            elif _are_rows(live) and not is_weight:
                continue  # the bias beside it
            elif _are_rows(live) and (fused := self._fused(name, live)) is not None:
                found.fused |= dict.fromkeys((fused.whole, *fused.parts), fused)
            elif operations[0] == "list":
                sources = found.experts[live.names[0]][live.expert or 0]
                if (other := sources.setdefault(live.source, name)) != name:
                    found.elsewhere[live.names[0]] = (name, f"an expert of it twice, as {other!r}")
            elif operations[0] == "share":
                found.shared[live.names][live.expert or 0][live.source] = name
            elif operations[0].startswith("join") and len(operations) == 1:
                sources = found.joined[live.names[0]]
                if sources.setdefault(live.source, name) != name:
                    found.elsewhere[live.names[0]] = (name, "it in shards")
            elif operations == ("transpose",) and len(self.tensors[name].spec.shape) == 3:
                found.stacks[live.names[0]] = Stack(whole=name, is_turned=True)
            elif operations == ("interleave 1",) and len(self.tensors[name].spec.shape) == 3:
                found.stacks[live.names[0]] = Stack(whole=name, is_interleaved=True)
            else:
                words = (operation.partition(" ")[0] for operation in operations)
                why = next(filter(None, map(ELSEWHERE.get, words)), "it in another form")
                found.elsewhere |= dict.fromkeys(live.names, (name, why))
        for names, experts in found.shared.items():
            size = -(-len(experts) // len(names))
            for expert, sources in experts.items():
                found.experts[names[expert // size]][expert % size] = sources
        for name, sources in found.joined.items():
            stored = sources[min(sources)]
            if not name.endswith(WEIGHT) or len(self.tensors[stored].spec.shape) != 2:
                continue
            if not all(each.endswith(WEIGHT) for each in sources.values()):
                found.elsewhere[name] = (
                    stored,
                    f"it in {len(sources)} tensors that are no modules'",
                )
            elif name not in found.elsewhere:
                parts = tuple(_module(sources[index]) for index in sorted(sources))
                fused = Fused(_module(name), parts)
                found.fused |= dict.fromkeys((fused.whole, *parts), fused)
        return found

    def _fused(self, name: str, live: LiveParameters) -> Fused | None:
        """Return what ``name`` is in the live model; ``None`` where nothing tells its heads."""
        rows: tuple[int, ...] = ()
        paired: tuple[int, ...] = ()
        for operation in live.operations:
            word, *words = operation.split()
            if word == "split":
                rows = self.config.projection_rows or (0,)  # which are never right
            elif word == "rope":
                if (heads := self._heads(words[0])) is None:
                    return None
                paired = tuple(
                    heads if not words[1:] or any(part in one for part in words[1:]) else 0
                    for one in live.names
                )
        return Fused(_module(name), tuple(map(_module, live.names)), rows, paired=paired)

    def _heads(self, key: str) -> int | None:
        """Return the attention heads that the part ``key`` of the configuration tells."""
        part = self.config.raw.get(key)
        heads = (part if isinstance(part, dict) else self.config.raw).get("num_attention_heads")
        return heads if isinstance(heads, int) and heads > 0 else None

    def name(self, stored: str) -> str:
        """Return what the live model calls a tensor that the files have, or might have."""
        return stored if self._naming is None else self._naming.live(stored).names[0]

    def path(self, module: str, leaf: str = "weight") -> str:
        """Return what the live model calls a module of the files, if it has it as it is."""
        if self._naming is None:
            return module
        live = self._naming.live(f"{module}.{leaf}")
        is_same = live.operations in RENAMED and len(live.names) == 1
        return live.names[0].rpartition(".")[0] if is_same else module

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of the live model that have a weight, if its files may have other names."""
        found = self._tensors
        if found is None:
            return ()
        parts = (part for fused in found.fused.values() for part in fused.parts)
        renamed = (_module(name) for name in found.renamed if name.endswith(WEIGHT))
        return tuple(dict.fromkeys((*renamed, *parts)))

    def tensor(self, name: str) -> str | None:
        """Return the tensor of the files that the parameter ``name`` of the live model is.

        ``name`` may also be that of files of another release, or of the hub.

        Raises:
            UnsupportedError: The files have its values in another order.
        """
        found = self._tensors
        if found is None or self._naming is None:
            return None
        if name in found.renamed and name not in found.elsewhere:
            return found.renamed[name]
        live = self._naming.live(name)
        for one in (name, *(live.names if live.operations in RENAMED else ())):
            found.check(one)
            for tensor in (one, found.renamed.get(one)):
                if tensor in self.tensors:
                    return tensor
        return None

    def find(self, module: str, leaf: str) -> str | None:
        """Return the module of the files that has ``leaf`` and is called much like ``module``.

        Raises:
            BaseModelError: Several modules could be meant.
        """
        found = self._tensors
        if found is None:
            return None
        owner = self._index.find(module, parameter=leaf)
        return found.renamed[f"{owner}.{leaf}"] if owner is not None else None

    @cached_property
    def _cut(self) -> ModuleIndex:
        """The modules that the files have cut otherwise: projections, and stacks of experts."""
        found = self._tensors
        fused = (f"{module}{WEIGHT}" for module in found.fused) if found else ()
        stacks = (*found.experts, *found.stacks, *found.joined) if found else ()
        return ModuleIndex((*fused, *(f"{name}{WEIGHT}" for name in stacks)))

    def like(self, name: str) -> str | None:
        """Return the one module, or parameter of experts, here that is called much like ``name``.

        Raises:
            BaseModelError: Several could be meant.
        """
        return self._cut.find(name, parameter="weight") if self._tensors is not None else None

    def fused(self, module: str) -> Fused | None:
        """Return the fused projection that ``module`` is or is a part of, here or in the files."""
        found = self._tensors
        if found is None or self._naming is None:
            return None
        if module in found.fused:
            return found.fused[module]
        for leaf in (WEIGHT, ATTENTION):
            live = self._naming.live(f"{module}{leaf}")
            if _are_rows(live):
                return self._fused(module, live) or found.unpaired(f"{module}{leaf}")
        live = self._naming.live(f"{module}{WEIGHT}")
        if live.operations[:1] and live.operations[0] == "join 0" and len(live.operations) == 1:
            whole = _module(live.names[0])
            parts = tuple(
                module if index == live.source else f"{whole}[{index}]"
                for index in range(live.sources)
            )
            return Fused(whole, parts)
        if live.names != (f"{module}{WEIGHT}",) and not live.operations:
            return found.fused.get(_module(live.names[0]))
        return None

    def stack(self, parameter: str) -> Stack | None:
        """Return what the files have of the experts' parameter ``parameter``.

        Raises:
            BaseModelError: They have some of its experts or parts only.
            UnsupportedError: They have its values in another order.
        """
        found = self._tensors
        if found is None:
            return None
        found.check(parameter)
        if parameter in found.stacks:
            return found.stacks[parameter]
        if parameter in found.experts:
            return self._listed(parameter, found.experts[parameter])
        if parameter in found.joined:
            sources = found.joined[parameter]
            return Stack((tuple(sources[index] for index in sorted(sources)),))
        whole = self.tensor(parameter)
        if whole is None and (other := self.like(parameter)) not in (None, parameter):
            return self.stack(str(other))
        return Stack(whole=whole) if whole is not None else None

    def _listed(self, parameter: str, experts: Mapping[int, Mapping[int, str]]) -> Stack:
        parts = {len(sources) for sources in experts.values()}
        if sorted(experts) != list(range(len(experts))) or len(parts) != 1:
            raise BaseModelError(parameter, "the files do not have all of its experts")
        ordered = (experts[expert] for expert in range(len(experts)))
        return Stack(tuple(tuple(one[index] for index in sorted(one)) for one in ordered))

    def expert(self, module: str) -> ExpertPart | None:
        """Return which part of which parameter ``module`` is, if it is one expert's projection."""
        if self._naming is None:
            return None
        live = self._naming.live(f"{module}{WEIGHT}")
        if live.expert is None:
            return None
        size = self._experts(live.names[0]) if live.operations[0] == "share" else live.expert + 1
        which, expert = divmod(live.expert, size) if size else (0, live.expert)
        if which >= len(live.names):
            return None
        return ExpertPart(live.names[which], expert, live.source, live.sources)

    def _experts(self, parameter: str) -> int:
        """Return how many experts a parameter stacks here; 0 where they are apart."""
        shape = self.tensors[parameter].spec.shape if parameter in self.tensors else ()
        return shape[0] if len(shape) == 3 else 0


def _are_rows(live: LiveParameters) -> bool:
    words = [operation.partition(" ")[0] for operation in live.operations]
    by_rows = all(o in ("cut 0", "split 0") or o.startswith("rope") for o in live.operations)
    return bool(words) and by_rows and all(word in ROWS for word in words)


def _module(name: str) -> str:
    """Return the module of a weight, or of what a rule makes of a module's whole path."""
    return name.removesuffix(WEIGHT).removesuffix(ATTENTION)
