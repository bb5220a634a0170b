"""Parameters of a live model that share one weight, whichever of them its files hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

from loratool.base.config import ModelConfig
from loratool.base.modules import ModuleIndex
from loratool.codecs.weights import Weight
from loratool.errors import BaseModelError
from loratool.files.inputs import InputFiles
from loratool.files.rows import RowBytes
from loratool.files.spec import StoredTensor
from loratool.names.tied import (
    APART_BIASES,
    EMBEDDING_LEAVES,
    INPUT_STACKS,
    SHARED,
    SHARED_TABLES,
    TABLES,
)

__all__ = ["Sharing", "Tie", "find_ties", "have_same_values", "hidden_names", "possible_ties"]

BLOCK_BYTES: Final = 4 << 20
DECODER: Final = "decoder."


class Named(Protocol):
    """What ties are found by: a model, or one inside of it."""

    @property
    def config(self) -> ModelConfig:
        """What it says of itself."""
        ...

    @property
    def tensors(self) -> Mapping[str, Weight]:
        """Its tensors by name."""
        ...

    @property
    def index(self) -> ModuleIndex:
        """Its modules."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        ...


@dataclass(frozen=True)
class _Decoder:
    """The model inside another one."""

    config: ModelConfig
    tensors: Mapping[str, Weight]

    @cached_property
    def index(self) -> ModuleIndex:
        return ModuleIndex(self.tensors, self.config.model_types)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].spec.shape


@dataclass(frozen=True, slots=True)
class Sharing:
    """Names that are one weight to a loader, unless the files hold different values for them.

    Attributes:
        names: The parameters, the one that loaders copy to the others first.
        input: The one that is the model's input embedding, if one is.
        head: The one that is its output head, if one is.
    """

    names: tuple[str, ...]
    input: str | None = None
    head: str | None = None


@dataclass(frozen=True, slots=True)
class Tie:
    """A weight of a base that several parameters share.

    Attributes:
        names: The parameters, the one that loaders copy to the others first.
        stored: Those that the base stores, all with the same values.
        input: The input embedding, whose trained rows hold for all, if it is one of them.
        head: The one that is the output head, if one is.
    """

    names: tuple[str, ...]
    stored: tuple[str, ...]
    input: str | None = None
    head: str | None = None

    @property
    def source(self) -> str:
        """The tensor of the base that holds the values."""
        return self.stored[0]


def possible_ties(base: Named, tasks: Collection[str] = ()) -> tuple[Sharing, ...]:
    """Return what ``base`` shares by its names and its configuration; no values are read.

    Args:
        base: The base.
        tasks: The task types of the adapters, which may give it another head.
    """
    inside = base.config.decoder
    if inside is not None:
        return _inside(base, inside, tasks)
    if not base.config or base.config.is_untied:
        return ()
    tables = _tables(base)
    head = _head(base, tables, tasks)
    if head is not None and not tables:
        tables = _beside_layers(base)
    names = (*tables, head) if head else tables
    if len(names) < 2 or not any(name in base.tensors for name in names):
        return ()
    weight = Sharing(names, _input(base, names), head)
    bias = _bias(base, head) if head else None
    return (weight, bias) if bias else (weight,)


def _inside(base: Named, config: ModelConfig, tasks: Collection[str]) -> tuple[Sharing, ...]:
    """Return what the decoder inside ``base`` shares, which it does as by itself."""
    tensors = {
        name.removeprefix(DECODER): weight
        for name, weight in base.tensors.items()
        if name.startswith(DECODER)
    }

    def outer(name: str | None) -> str | None:
        return None if name is None else f"{DECODER}{name}"

    return tuple(
        Sharing(
            tuple(f"{DECODER}{name}" for name in each.names), outer(each.input), outer(each.head)
        )
        for each in possible_ties(_Decoder(config, tensors), tasks)
    )


def hidden_names(base: Named, sharings: Sequence[Sharing]) -> Mapping[str, str]:
    """Return the parameters that ``base`` does not store, and the tensor that has their values."""
    return {
        name: _source(base, sharing)
        for sharing in sharings
        for name in sharing.names
        if name not in base.tensors
    }


def find_ties(base: Named, sharings: Sequence[Sharing]) -> tuple[Tie, ...]:
    """Return what is shared indeed: loaders keep apart what is stored with different values."""
    found = []
    for sharing in sharings:
        source = _source(base, sharing)
        apart = {
            name
            for name in sharing.names
            if name in base.tensors
            and name != source
            and not have_same_values(base.tensors[name], base.tensors[source])
        }
        names = tuple(name for name in sharing.names if name not in apart)
        if len(names) > 1:
            stored = tuple(name for name in names if name in base.tensors)
            sides = (None if one in apart else one for one in (sharing.input, sharing.head))
            found.append(Tie(names, stored, *sides))
    return tuple(found)


def _source(base: Named, sharing: Sharing) -> str:
    return next(name for name in sharing.names if name in base.tensors)


def _tables(base: Named) -> tuple[str, ...]:
    """Return the tables of tokens that are one weight, those that are not stored included."""
    stored = [
        name
        for name, weight in base.tensors.items()
        if len(weight.spec.shape) == 2
        and name.endswith(".weight")
        and name.split(".")[-2] in EMBEDDING_LEAVES
    ]
    kind = base.config.model_type or ""
    named = stored or _usual_table(base, kind)
    paths = SHARED_TABLES.get(kind, SHARED)
    prefixes = {path: [_before(name, path) for name in named] for path in paths}
    found = dict.fromkeys(p for path in paths for p in prefixes[path] if p is not None)
    if not found:
        return tuple(named) if len(named) == 1 else ()
    prefix = next(iter(found))
    tables = [
        f"{prefix}{path}.weight"
        for path in paths
        if "." not in path or _holds(base, f"{prefix}{path.partition('.')[0]}.")
    ]
    if tables[0] not in base.tensors:
        has_encoder = any("encoder." in table for table in tables)
        if kind not in SHARED_TABLES or not has_encoder or not base.config.shares_tables:
            return (tables[-1],) if tables[-1] in stored or not stored else ()
    return tuple(tables)


def _usual_table(base: Named, kind: str) -> list[str]:
    """Return what the table of a model type is called, for a base that does not store it."""
    path = TABLES.get(kind)
    if path is None:
        return []
    outer, _, rest = path.partition(".")
    return [f"{rest if rest and not _holds(base, f'{outer}.') else path}.weight"]


def _before(name: str, path: str) -> str | None:
    """Return what comes before ``path`` in the name of a weight, if the one ends with the other."""
    before, found, after = f".{name}".rpartition(f".{path}.weight")
    return f"{before}."[1:] if found and not after else None


def _holds(base: Named, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in base.tensors)


def _beside_layers(base: Named) -> tuple[str, ...]:
    """Return the table beside the layers, for a base that stores the head alone."""
    found = dict.fromkeys(n.partition("layers.0.")[0] for n in base.tensors if "layers.0." in n)
    return tuple(f"{prefix}embed_tokens.weight" for prefix in found) if len(found) == 1 else ()


def _head(base: Named, tables: Sequence[str], tasks: Collection[str]) -> str | None:
    """Return the head that may share the weight of ``tables``, stored or not."""
    name = base.config.head(tasks)
    if name is None or not (tables or base.config.is_tied):
        return None
    try:
        owner = base.index.find(name, parameter="weight")
    except BaseModelError:  # several heads are stored, so none hangs on a weight of another name
        return None
    is_said = base.config.is_tied is True or bool(base.config.architectures)
    stored = [base.shape(table) for table in tables if table in base.tensors]
    if owner is not None:
        head = f"{owner}.weight"
        fits = all(base.shape(head) == shape for shape in stored)
        is_known = stored or (is_said if tables else base.config.is_tied is True)
        return head if head not in tables and fits and is_known else None
    return _head_beside(tables[0], name) if tables and is_said else None


def _head_beside(table: str, name: str) -> str:
    """Name the head as a checkpoint would that names its table ``table``."""
    first, _, rest = name.partition(".")
    if rest and f".{first}." in f".{table}":
        before, _, _ = f".{table}".partition(f".{first}.")
        return f"{before}.{name}.weight"[1:]
    outer = table.partition(".model.")[0]
    prefix = f"{outer}." if outer != table and outer == "language_model" else ""
    return f"{prefix}{name}.weight"


def _input(base: Named, names: Sequence[str]) -> str | None:
    kind = base.config.model_type
    if kind not in INPUT_STACKS or not base.config.is_encoder_decoder:
        return names[0]
    inside = f".{INPUT_STACKS[kind]}."
    return next((name for name in names if inside in f".{name}"), None)


def _bias(base: Named, head: str) -> Sharing | None:
    """Return the bias that a head shares with the module that it is in, if it has such."""
    inner = f"{head.removesuffix('weight')}bias"
    outer = f"{head.removesuffix('decoder.weight')}bias"
    if not head.endswith(".decoder.weight") or base.config.model_type in APART_BIASES:
        return None
    return Sharing((outer, inner)) if {outer, inner} & base.tensors.keys() else None


def have_same_values(first: Weight, second: Weight) -> bool:
    """Whether two stored tensors hold the same bytes of the same dtype and shape."""
    if not isinstance(first, StoredTensor) or not isinstance(second, StoredTensor):
        return first == second
    spec = first.spec
    if (spec.shape, spec.dtype) != (second.spec.shape, second.spec.dtype):
        return False
    places = [(each.path, each.offset, each.strides, each.whole) for each in (first, second)]
    if not spec.elements or places[0] == places[1]:
        return True
    rows = spec.shape[0] if spec.shape else 1
    files = InputFiles({})
    try:
        one, other = (RowBytes(each, spec.elements // rows, files) for each in (first, second))
        step = max(1, BLOCK_BYTES // one.row_bytes)
        counts = ((start, min(step, rows - start)) for start in range(0, rows, step))
        return all(one.read(*block) == other.read(*block) for block in counts)
    finally:
        files.close()
