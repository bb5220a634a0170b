"""A model as everything else sees it: its tensors, and the place of each module's weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from loratool.adapter.scheme import Told
from loratool.adapter.wrapped import factor_names, own_names
from loratool.base.config import ModelConfig, read_config
from loratool.base.experts import expert_place, parameter_place
from loratool.base.fused import fused_place
from loratool.base.key_values import config_of
from loratool.base.layout import Headers, Layout
from loratool.base.layouts import layout_of
from loratool.base.live import LiveModel
from loratool.base.modules import ModuleIndex
from loratool.base.orientation import is_conv1d_by_shape, natural_region, natural_shape
from loratool.base.place import Piece, Place
from loratool.base.region import Region
from loratool.base.replication import replicate
from loratool.base.tensors import ACTIVATION_SCALES, logical_tensors, raw_tensors
from loratool.base.ties import Sharing, Tie, find_ties, hidden_names, possible_ties
from loratool.codecs.codec import CodedTensor
from loratool.codecs.weights import Weight, is_alias
from loratool.errors import BaseModelError, MissingModuleError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.container import WeightsFile
from loratool.files.inputs import Stamp
from loratool.files.spec import StoredTensor
from loratool.names.conv1d import CONV1D_LEAVES, CONV1D_MODEL_TYPES
from loratool.names.paths import family_name, fusions, other_names
from loratool.names.pipelines import BACKBONES, COMPONENTS

__all__ = ["Model", "Quantization", "open_model", "open_stored"]

WEIGHT_LEAVES: Final = ("weight", "in_proj_weight", "scale")
"""What the parameter of a module is called that libraries call its weight."""
NORM: Final = "norm"
"""How modules are called whose scale that is."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of a model are coded.

    Attributes:
        method: What its configuration calls it, unless its tensors can be of no such method.
        format: The codec of most of them, or what it calls their format.
        modules: How many are coded.
    """

    method: str
    format: str
    modules: int


class Model:
    """A model whose headers have been read.

    Args:
        path: What the user named.
        checkpoints: Its files by component; the only one, of a single model, by ``""``.
        tensors: Its tensors, where they are not those of the files (a replicated stack).
        tasks: The task types of its adapters, which may give it another head.
    """

    def __init__(
        self,
        path: Path,
        checkpoints: Mapping[str, Checkpoint],
        *,
        tensors: Mapping[str, Weight] | None = None,
        tasks: Collection[str] = (),
    ) -> None:
        self.path = path
        self.checkpoints = checkpoints
        single = checkpoints.get("")
        self.config = read_config(path) if single is None else config_of(single)
        self.tensors = logical_tensors(checkpoints) if tensors is None else tensors
        self._tasks = tuple(tasks)

    def as_trained(self, *, tasks: Collection[str] = (), layers: list[int] | None = None) -> Model:
        """Return the model as adapters saw it in training.

        Args:
            tasks: Their task types, which may give it another head.
            layers: Which of its layers each layer of the stack was, where they replicated it.

        Raises:
            UnsupportedError: It has no single stack of layers, or fewer of them.
        """
        tensors = replicate(self.tensors, layers, self.path) if layers else self.tensors
        return Model(self.path, self.checkpoints, tensors=tensors, tasks=tasks)

    def as_unwrapped(self) -> Model:
        """Return the model without the factors of an adapter that its files hold too."""
        own = own_names(self.tensors)
        tensors = {
            new: replace(self.tensors[name], spec=replace(self.tensors[name].spec, name=new))
            for name, new in own.items()
        }
        return Model(self.path, self.checkpoints, tensors=tensors, tasks=self._tasks)

    @cached_property
    def factors(self) -> tuple[str, ...]:
        """The factors of an adapter that its files hold beside its weights."""
        return tuple(factor_names(self.tensors))

    # --- what the files are

    @property
    def checkpoint(self) -> Checkpoint:
        """The files of a single model.

        Raises:
            BaseModelError: It is a pipeline of several.
        """
        if "" not in self.checkpoints:
            raise BaseModelError(
                self.path,
                f"is a pipeline of {', '.join(self.checkpoints)}",
                hint="name the folder of one of them",
            )
        return self.checkpoints[""]

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, of one model or of several, else a file."""
        return all(one.path.is_dir() for one in self.checkpoints.values())

    @property
    def folder(self) -> Path:
        """Where the files beside the weights are."""
        return self.path if "" not in self.checkpoints else self.checkpoints[""].folder

    @property
    def shards(self) -> tuple[WeightsFile, ...]:
        """All weights files."""
        return tuple(shard for one in self.checkpoints.values() for shard in one.shards)

    @cached_property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All tensors of the files, codes and scales apart."""
        return tuple(stored for shard in self.shards for stored in shard.tensors.values())

    @cached_property
    def raw(self) -> Mapping[str, StoredTensor]:
        """The same by name; those of a component with its name before theirs."""
        return raw_tensors(self.checkpoints)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """What the weights files were when their headers were read."""
        return {shard.path: shard.stamp for shard in self.shards}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found and not used, one sentence each."""
        return tuple(note for one in self.checkpoints.values() for note in one.notes)

    @property
    def bytes(self) -> int:
        """Size of all weights files."""
        return sum(one.bytes for one in self.checkpoints.values())

    @property
    def parameters(self) -> int:
        """How many numbers its weights are."""
        return sum(one.spec.elements for one in self.tensors.values() if not is_alias(one))

    @property
    def activation_scales(self) -> tuple[str, ...]:
        """The scales of inputs and caches beside coded weights; they are none of its tensors."""
        if self.quantization is None:
            return ()
        names = (stored.spec.name for stored in self.stored)
        return tuple(name for name in names if name.rpartition(".")[2] in ACTIVATION_SCALES)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How its weights are coded; ``None`` where they are plain numbers."""
        coded = [
            one.settings.get("format", one.codec.name)
            for one in self.tensors.values()
            if isinstance(one, CodedTensor)
        ]
        if not coded:
            return None
        ((name, _),) = Counter(coded).most_common(1)
        parts = [one for name, one in self.checkpoints.items() if name]
        said = (config.quantization or {} for config in (self.config, *map(config_of, parts)))
        told = next((one["quant_method"] for one in said if "quant_method" in one), None)
        codec = next(
            one.codec
            for one in self.tensors.values()
            if isinstance(one, CodedTensor) and one.settings.get("format", one.codec.name) == name
        )
        methods: tuple[str, ...] = getattr(codec, "methods", ())
        if methods and told not in methods:
            told = methods[0]
        return Quantization(str(told or name), name, len(coded))

    # --- what it is

    @property
    def told(self) -> Told:
        """What it says of itself to the schemes of adapters that depend on it."""
        metadata = self.shards[0].metadata if self.shards else {}
        return Told(base=metadata, config=self.config.language, is_tied=self.config.is_tied)

    @cached_property
    def _headers(self) -> Headers:
        split = (name.rpartition(".") for name in self.tensors)
        modules = {module: None for module, _, leaf in split if _is_weight(module, leaf)}
        owners = {owner: None for n in self.tensors if (owner := n.rpartition(".")[0])}
        others = tuple(owner for owner in owners if owner not in modules)
        components = tuple(c for c in self.checkpoints if c)
        return Headers(modules.keys(), self.config, components, others)

    @cached_property
    def layout(self) -> Layout:
        """How it is cut into files.

        Raises:
            BaseModelError: Two layouts claim it.
        """
        return layout_of(self._headers, self.path)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The components of the pipeline that it is; none for a single model."""
        return self.layout.components(self._headers)

    @cached_property
    def family(self) -> str | None:
        """The family of diffusion models that it is of, if it is of one."""
        return self.layout.family(self._headers) or family_name(tuple(self.modules))

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The tensor of every module that has a weight, by the path libraries know it by."""
        found: dict[str, str] = {}
        for leaf in reversed(WEIGHT_LEAVES):
            for name in self.tensors:
                module, _, last = name.rpartition(".")
                if last == leaf and _is_weight(module, leaf):
                    found[self._spelled.get(module, module)] = name
        found |= {path: name for name, path in self._parameters.items()}
        return found

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of these, of the parts of those that are several in one, and live names."""
        fused = ((module, self.layout.fused(module, self.config)) for module in self.modules)
        parts = [part for module, one in fused if one and one.whole == module for part in one.parts]
        others = dict.fromkeys((*parts, *self.live.modules))
        return (*self.modules, *(path for path in others if path not in self.modules))

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of the weight of each of them, as it is stored."""
        return {module: self.tensors[name].spec.shape for module, name in self.modules.items()}

    @cached_property
    def _spelled(self) -> Mapping[str, str]:
        """Libraries' path of each module that the files spell otherwise."""
        return self.layout.paths(self._headers)

    @cached_property
    def _parameters(self) -> Mapping[str, str]:
        """Libraries' path of each tensor that is a module's weight there, and no module's here."""
        told = self.layout.parameters(self._headers)
        return {name: path for name, path in told.items() if name in self.tensors}

    @cached_property
    def _own_modules(self) -> Mapping[str, str]:
        """The files' path of each module that libraries spell otherwise, by their path."""
        return {path: module for module, path in self._spelled.items()}

    def is_turned(self, path: str) -> bool:
        """Whether the files have a linear layer as ``(in, out)`` that libraries have otherwise."""
        return path in self._parameters.values() and self.layout.is_turned(path)

    def is_exchanged(self, path: str) -> bool:
        """Whether the files have the outputs of a module in another order than libraries."""
        name = self.modules.get(path)
        rows = self.tensors[name].spec.shape[0] if name is not None else 0
        return bool(rows) and self.layout.exchanged(path, rows, self.config) is not None

    def path_of(self, name: str) -> str:
        """Return the path of the module that libraries have for the tensor called ``name``."""
        module = name.rpartition(".")[0]
        return self._parameters.get(name) or self._spelled.get(module, module)

    def name_in_libraries(self, name: str) -> str:
        """Return what libraries call the parameter that the tensor called ``name`` is."""
        path, leaf = self.path_of(name), name.rpartition(".")[2]
        if not path:
            return name
        leaf = "weight" if self.modules.get(path) == name else leaf
        return f"{self.live.path(path, leaf)}.{leaf}"

    @cached_property
    def index(self) -> ModuleIndex:
        """The modules by the paths of the files."""
        return ModuleIndex(self.tensors, self.config.model_types)

    @cached_property
    def _spelled_index(self) -> ModuleIndex:
        """The modules that the files spell otherwise than libraries do, by libraries' paths."""
        paths = (*self._spelled.values(), *self._parameters.values())
        return ModuleIndex((f"{path}.weight" for path in paths), self.config.model_types)

    @cached_property
    def _inside(self) -> Mapping[str, ModuleIndex]:
        """The modules of each component by their paths inside it."""
        names: dict[str, list[str]] = {component: [] for component in self.components}
        for name in self.tensors:
            path = self.path_of(name)
            leaf = "weight" if self.modules.get(path) == name else name.rpartition(".")[2]
            component, _, local = path.partition(".")
            if component in names:
                names[component].append(f"{local}.{leaf}")
        types = self.config.model_types
        return {component: ModuleIndex(mine, types) for component, mine in names.items()}

    @cached_property
    def live(self) -> LiveModel:
        """The names of the live model, where its files have others."""
        is_single = "" in self.checkpoints
        told = self.layout.live(self.config, self.tensors)
        return told or LiveModel(self.config if is_single else ModelConfig(), self.tensors)

    @cached_property
    def _sharings(self) -> tuple[Sharing, ...]:
        told = self.layout.sharings(self.tensors)
        return possible_ties(self, self._tasks) if told is None else told

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """What several of its parameters share; stored values are compared."""
        return find_ties(self, self._sharings)

    @property
    def tie(self) -> Tie | None:
        """The weight that its embedding and its head share, if they do."""
        return next((tie for tie in self.ties if tie.head is not None), None)

    @cached_property
    def hidden(self) -> Mapping[str, str]:
        """Parameters that are tied and not stored, and the tensor that has their values."""
        return hidden_names(self, self._sharings)

    @cached_property
    def _hidden_names(self) -> tuple[tuple[ModuleIndex, Mapping[str, str]], ...]:
        """These by the names of the files, then by those of the live model."""
        spelled = ({one: one for one in self.hidden}, {self.live.name(n): n for n in self.hidden})
        return tuple((ModuleIndex(names, self.config.model_types), names) for names in spelled)

    def _hidden_name(self, module: str, leaf: str) -> str | None:
        for index, names in self._hidden_names if self.hidden else ():
            owner = index.find(module, parameter=leaf)
            if owner is not None:
                return names[f"{owner}.{leaf}"]
        return None

    def weight(self, name: str) -> Weight:
        """Return what holds the values of the parameter ``name``, stored under its name or not."""
        return self.tensors[name if name in self.tensors else self.hidden[name]]

    def holds(self, name: str) -> bool:
        """Whether it has a parameter ``name``, stored under its name or not."""
        return name in self.tensors or name in self.hidden

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the parameter ``name``, stored under its name or not."""
        return (
            self.tensors[name].spec.shape if name in self.tensors else self.weight(name).spec.shape
        )

    @cached_property
    def _widening(self) -> bool | None:
        return is_conv1d_by_shape(self.tensors)

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a square weight is stored as ``(in, out)``; ``None`` if nothing can tell.

        Decided by the other layers of the same kind, then by the model type; diffusion models
        have no such layers.
        """
        types = self.config.model_types
        if self.is_turned(module):
            return True
        if self.layout.is_linear:
            return False
        if module.rpartition(".")[2] in CONV1D_LEAVES:
            if self._widening is not None:
                return self._widening
            if not types:
                return None if self.family is None else False
            return bool(types & CONV1D_MODEL_TYPES)
        return False if types else None

    # --- where things are

    def tensor(self, module: str, leaf: str) -> str | None:
        """Return the name of the parameter ``leaf`` of ``module``, or ``None``.

        Raises:
            BaseModelError: Several modules could be meant.
        """
        if f"{module}.{leaf}" in self.tensors:
            return f"{module}.{leaf}"
        component, _, local = module.partition(".")
        if component in self.components:
            found = self._inside[component].find(local, parameter=leaf)
            path = f"{component}.{found}"
            if leaf == "weight" and path in self.modules:
                return self.modules[path]
            return f"{self._own_modules.get(path, path)}.{leaf}" if found is not None else None
        live = self.live.tensor(f"{module}.{leaf}") or self.live.find(module, leaf)
        if live is not None:
            return live
        owner = self.index.find(module, parameter=leaf)
        return f"{owner}.{leaf}" if owner is not None else None

    def parameter(self, module: str, leaf: str, *, family: str | None = None) -> str | None:
        """Return the name of a parameter, whichever naming ``module`` is in, or ``None``.

        Unlike :meth:`tensor` it also finds what is tied and not stored.

        Raises:
            BaseModelError: Several modules could be meant.
        """
        families = dict.fromkeys((self.family or family, family))
        paths = dict.fromkeys(path for one in families for path in self._spellings(module, one))
        # A name that is there comes before what looks like another one.
        alike = (path for path in paths if not self.is_exchanged(path))
        exact = (f"{self._own_modules.get(path, path)}.{leaf}" for path in alike)
        found = next((name for name in exact if name in self.tensors), None)
        found = found or next(filter(None, (self.tensor(path, leaf) for path in paths)), None)
        return found or self._hidden_name(module, leaf)

    def has(self, module: str) -> bool:
        """Whether it has ``module``, with parameters or as a container.

        Raises:
            BaseModelError: Several modules could be meant.
        """
        return self.index.find(module) is not None

    def find(self, module: str, *, family: str | None = None) -> Place | None:
        """Return where the weight of ``module`` is, whichever way the model is cut.

        A projection may be rows of a fused one, one of a stack of experts, or tied to a weight
        of another name; what an adapter has in one, the model may have in several.

        Args:
            module: Its path in the live model, in the files, or in another library.
            family: The family of diffusion models that the path is of, where that is known; what
                the model itself tells comes first.

        Raises:
            BaseModelError: Several modules could be meant.
        """
        found = self._find(module, self.family or family)
        if found is None and self.family not in (None, family):
            found = self._find(module, family)
        return found

    def _find(self, module: str, family: str | None) -> Place | None:
        return (
            self.own_place(module, family)
            or expert_place(module, self)
            or self._cut_place(module)
            or fused_place(self._in_backbone(module), self, family)
            or parameter_place(module, self)
            or self._hidden_place(module)
            or self._place_alike(module)
        )

    def _place_alike(self, module: str) -> Place | None:
        """Return the place of what a live model of another class calls ``module``."""
        other = self.live.like(module)
        return self.find(other) if other is not None and other != module else None

    def place(self, module: str) -> Place:
        """Return where the weight of ``module`` is.

        Raises:
            MissingModuleError: It is nowhere; the nearest modules are told.
        """
        found = self.find(module)
        if found is None:
            nearest = self.nearest(module)
            raise MissingModuleError(
                f"{self.path}: {module}",
                "the base has no such module",
                hint=f"nearest: {', '.join(nearest)}" if nearest else None,
            )
        return found

    def nearest(self, module: str) -> list[str]:
        """Return the paths of modules that look most like ``module``."""
        return self.index.nearest(module)

    def own_place(self, module: str, family: str | None = None) -> Place | None:
        """Return the place of a module that has a tensor to itself.

        Raises:
            BaseModelError: Several modules could be meant.
        """
        name = self._name_of(module, family)
        if name is None:
            return None
        path = self.path_of(name)
        stored = self.tensors[name]
        region = natural_region(path, stored.spec.shape, self)
        exchanged = self.layout.exchanged(path, region.rows, self.config)
        if exchanged is not None:
            plain = not self.layout.pairs_biases(self.config)
            region = replace(region, exchanged=exchanged, has_plain_bias=plain)
        return Place(
            path,
            natural_shape(stored.spec.shape, transposed=region.transposed),
            stored.spec.dtype,
            (Piece(name, stored, region),),
            tie=self._tie_of(name),
        )

    def _cut_place(self, module: str) -> Place | None:
        """Return the place of a module whose outputs the layout has in several stretches."""

        def rows(name: str) -> int | None:
            return self.tensors[name].spec.shape[0] if name in self.tensors else None

        found = self.layout.stretches(module, rows, self.config)
        if not found:
            return None
        like = self.tensors[found[0].tensor]
        columns = math.prod(like.spec.shape[1:])
        pieces = tuple(
            Piece(
                each.tensor,
                self.tensors[each.tensor],
                Region(each.count, columns, each.row, exchanged=each.exchanged),
                each.first,
            )
            for each in found
        )
        count = sum(each.count for each in found)
        return Place(module, (count, *like.spec.shape[1:]), like.spec.dtype, pieces)

    def may_be_tied(self, name: str) -> bool:
        """Whether the parameter ``name`` is a side of a tie, if the stored values are alike."""
        return any(name in sharing.names for sharing in self._sharings)

    def _tie_of(self, name: str) -> Tie | None:
        """Return the tie that a weight is a side of; what is no such is not looked at for it."""
        if not self.may_be_tied(name):
            return None
        return next((tie for tie in self.ties if name in tie.names), None)

    def _name_of(self, module: str, family: str | None) -> str | None:
        exact = self._exact(module, family)
        if exact is not None:
            return exact
        for _, whole, fusion in fusions(module, family):
            if any(self._exact(name, family) for name in (whole, *fusion.modules)):
                return None  # it is here, cut otherwise; what looks alike is another one
        if self.live.fused(module) is not None:
            return None
        return next(filter(None, map(self._like, self._spellings(module, family))), None)

    def _exact(self, module: str, family: str | None) -> str | None:
        """Return the weight of a module that has one of the names that this one may have."""
        for leaf in WEIGHT_LEAVES:
            if f"{module}.{leaf}" in self.tensors and _is_weight(module, leaf):
                return f"{module}.{leaf}"
        paths = self._spellings(module, family)
        found = next((self.modules[path] for path in paths if path in self.modules), None)
        return found or self.live.tensor(f"{module}.weight")

    def _spellings(self, module: str, family: str | None) -> Iterator[str]:
        """Yield what ``module`` may be called, what it is most likely called first."""
        yield module
        if (inside := self._in_backbone(module)) != module:
            module = inside
            yield module
        component, _, local = module.partition(".")
        is_inside = component in self.components
        if component in COMPONENTS and not is_inside:
            yield local
        for name in other_names(module, family):
            yield f"{component}.{name}"
            if not is_inside:
                yield name

    def _in_backbone(self, module: str) -> str:
        """Return a path that names no component as one inside the backbone, where it may be."""
        component = module.partition(".")[0]
        backbone = next((each for each in self.components if each in BACKBONES), None)
        if backbone is None or component in self.components or component in COMPONENTS:
            return module
        return f"{backbone}.{module}"

    def _like(self, module: str) -> str | None:
        """Return the weight of the one module whose path differs only in its outer parts."""
        if self._spelled and module.partition(".")[0] not in self.components:
            found = self._spelled_index.find(module, parameter="weight")
            if found is not None:
                return self.modules[found]
        names = (self.tensor(module, leaf) for leaf in WEIGHT_LEAVES if _is_weight(module, leaf))
        return next((name for name in names if name is not None), None)

    def _hidden_place(self, module: str) -> Place | None:
        """Return the place of a module whose weight is tied to another and not stored."""
        name = self._hidden_name(module, "weight")
        if name is None:
            return None
        owner = name.removesuffix(".weight")
        stored = self.weight(name)
        region = natural_region(owner, stored.spec.shape, self)
        shape = natural_shape(stored.spec.shape, transposed=region.transposed)
        piece = Piece(name, stored, region)
        return Place(owner, shape, stored.spec.dtype, (piece,), tie=self._tie_of(name))


def _is_weight(module: str, leaf: str) -> bool:
    """Whether a parameter is what libraries call the weight of its module."""
    return bool(module) and leaf in WEIGHT_LEAVES and (leaf != "scale" or module.endswith(NORM))


def open_model(path: Path) -> Model:
    """Open a model, or a pipeline's folder with a sub-folder for each component.

    Raises:
        BaseModelError: There is neither, or it is damaged.
        FileFormatError: A file breaks the rules of its format.
        UnsupportedError: Its weights are in codes that are known and not read.
    """
    return Model(path, _checkpoints(path))


def open_stored(path: Path) -> Model:
    """Open a model as one of the tensors that its files hold, whatever codes they are in.

    Raises:
        BaseModelError: There is none, or it is damaged.
        FileFormatError: A file breaks the rules of its format.
    """
    checkpoints = _checkpoints(path)
    return Model(path, checkpoints, tensors=raw_tensors(checkpoints))


def _checkpoints(path: Path) -> dict[str, Checkpoint]:
    parts = [path / name for name in COMPONENTS if (path / name).is_dir()]
    if parts:
        return {part.name: open_checkpoint(part) for part in parts}
    return {"": open_checkpoint(path)}
