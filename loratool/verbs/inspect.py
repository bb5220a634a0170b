"""``inspect``: what an adapter or a model is, from headers alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.adapter.about import About, about, without_pictures
from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.model import Adapter, Site
from loratool.adapter.recognise import looks_like_adapter
from loratool.adapter.wrapped import factor_names
from loratool.display.shown import Shown
from loratool.errors import (
    BaseModelError,
    LoratoolError,
    OptionError,
    UnsupportedError,
)
from loratool.files.checkpoint import is_index, open_checkpoint
from loratool.files.containers import open_weights
from loratool.files.missing import missing
from loratool.files.places import located, origin_of
from loratool.schemes import claimed, sidecar_names, weights_names
from loratool.schemes.detection import distributed, forms
from loratool.schemes.opening import open_adapter

if TYPE_CHECKING:
    from loratool.base.model import Model, Quantization
    from loratool.display.document import Document
    from loratool.verbs.advice import Advice
    from loratool.verbs.inspection.many import Inspections
    from loratool.verbs.spectrum import Spectrum

__all__ = ["AdapterInfo", "ModelInfo", "ModuleInfo", "inspect", "inspect_many", "is_adapter"]

ADAPTER_SHARE: Final = 0.5
"""A file whose keys are factors for at least this part is an adapter, not a model."""


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One adapted module, as the command line shows it."""

    module: str
    kind: str
    variant: str
    rank: int
    alpha: float | None
    scale: float
    in_features: int
    out_features: int
    dtype: str
    experts: int = 1

    @staticmethod
    def of(site: Site) -> ModuleInfo:
        """Describe ``site``."""
        stored = site.down or site.up or next(iter(site.slots.values()))
        return ModuleInfo(
            module=site.label,
            kind=site.kind.value,
            variant=site.variant.name,
            rank=site.rank,
            alpha=site.scaling.alpha,
            scale=site.scaling.factor,
            in_features=site.in_features,
            out_features=site.out_features,
            dtype=stored.spec.dtype,
            experts=site.experts,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        fields = {name: getattr(self, name) for name in ModuleInfo.__slots__ if name != "experts"}
        return fields | ({"experts": self.experts} if self.experts > 1 else {})


@dataclass(frozen=True, slots=True)
class AdapterInfo(Shown):
    """What an adapter is.

    Attributes:
        adapter: The opened adapter.
        about: What it says of itself.
        spectra: The spectra of its modules, where those were asked for, in the same order.
        hashes: Hashes of its weights file, where those were asked for, by name.
        advice: Which ranks would be enough, where spectra were asked for.
    """

    adapter: Adapter
    about: About
    spectra: tuple[Spectrum, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    advice: Advice | None = None

    @property
    def path(self) -> Path:
        """What was named."""
        return self.adapter.path

    @property
    def modules(self) -> tuple[ModuleInfo, ...]:
        """Its modules."""
        return tuple(ModuleInfo.of(site) for site in self.adapter.sites)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing, one sentence each."""
        partial = {s.variant.name for s in self.adapter.sites if s.variant.undetermined}
        notes = (*self.adapter.notes, *self.about.notes)
        if self.spectra and partial:
            words = f"{', '.join(sorted(partial))}: the spectra are those of scale · B @ A alone"
            notes = (*notes, words)
        recorded, found = self.about.hashes.get("sshs_model_hash"), self.hashes.get("AutoV3")
        if recorded and found and recorded != found:
            notes = (*notes, "the hash that sshs_model_hash records is not that of the tensors")
        return notes

    @property
    def base(self) -> dict[str, int]:
        """How much of a base lies in the same file: tensors, parameters and bytes."""
        specs = [stored.spec for stored in self.adapter.beside.values()]
        return {
            "tensors": len(specs),
            "parameters": sum(spec.elements for spec in specs),
            "bytes": sum(spec.nbytes for spec in specs),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        adapter = self.adapter
        return {
            "schema": 1,
            "kind": "adapter",
            "path": str(adapter.path),
            **_hub(adapter.path),
            "scheme": adapter.scheme,
            "base_model": adapter.base_model,
            "family": adapter.family,
            "parameters": adapter.parameters,
            "bytes": adapter.nbytes,
            "modules": [
                module.as_json() | (spectrum.as_json() if spectrum else {})
                for module, spectrum in zip_longest(self.modules, self.spectra)
            ],
            "extras": [extra.key for extra in adapter.extras],
            "about": self.about.as_json(),
            **({"hashes": dict(self.hashes)} if self.hashes else {}),
            "metadata": without_pictures(adapter.metadata),
            "notes": list(self.notes),
            **({"base": self.base} if adapter.beside else {}),
            **({"advice": self.advice.as_json()} if self.advice is not None else {}),
        }

    def records(self) -> list[dict[str, Any]]:
        """Return flat rows, for a table or a DataFrame: one for each module.

        With spectra they have norms and ranks too.
        """
        from loratool.names.kinds import positions_of

        names = [module.module for module in self.modules]
        positions = positions_of(names, self.adapter.components, self.adapter.family)
        return [
            {
                "module": module.module,
                "section": position.section,
                "layer_kind": position.kind,
                "layer": position.layer,
                **{name: value for name, value in module.as_json().items() if name != "module"},
                **(spectrum.summary if spectrum is not None else {}),
            }
            for module, position, spectrum in zip_longest(self.modules, positions, self.spectra)
        ]

    def document(self, *, unfolded: bool = False, names_all: bool = False) -> Document:
        """Return what people see of it.

        Args:
            unfolded: Give every module a row.
            names_all: Name modules also where their spectra are told by parts.
        """
        from loratool.verbs.inspection.shown import adapter_document

        return adapter_document(self, unfolded=unfolded, names_all=names_all)


@dataclass(frozen=True, slots=True)
class ModelInfo(Shown):
    """What a model is.

    Attributes:
        model: The opened model.
        dtypes: Dtype to number of tensors.
        unread: Why its weights are not read, where they are in codes that are only known.
        hashes: Hashes of its one weights file, where those were asked for, by name.
    """

    model: Model
    dtypes: Mapping[str, int]
    unread: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """What was named."""
        return self.model.path

    @property
    def quantization(self) -> Quantization | None:
        """How its weights are coded, if they are."""
        if not self.unread:
            return self.model.quantization
        from loratool.base.model import Quantization  # no adapter needs it

        told = self.model.config.quantization or {}
        return Quantization(str(told.get("quant_method") or "unknown"), "not read", 0)

    @property
    def parameters(self) -> int:
        """How many numbers its weights are."""
        return self.model.parameters

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing, one sentence each."""
        notes, factors = (*self.unread, *self.model.notes), self.model.factors
        if not factors:
            return notes
        words = f"holds {len(factors)} factors of an adapter beside its weights, such as"
        return (*notes, f"{words} {factors[0]!r}")

    @property
    def model_type(self) -> str | None:
        """What ``config.json``, or the file itself, calls the kind of model."""
        return self.model.config.called

    @property
    def metadata(self) -> dict[str, str]:
        """What the first of its files says of itself."""
        return dict(self.model.shards[0].metadata) if self.model.shards else {}

    @property
    def components(self) -> dict[str, int]:
        """The parameters of each component of a pipeline; empty for a single model."""
        from loratool.codecs.weights import is_alias  # no adapter needs it

        model = self.model
        counts: dict[str, int] = dict.fromkeys(model.components, 0)
        if counts:
            for name, weight in model.tensors.items():
                component = model.path_of(name).partition(".")[0]
                if component in counts and not is_alias(weight):
                    counts[component] += weight.spec.elements
        return counts

    @property
    def architectures(self) -> list[str]:
        """The classes that ``config.json`` names."""
        return list(self.model.config.architectures)

    @property
    def is_tied(self) -> bool | None:
        """Whether its loader ties embeddings, as far as ``config.json`` says."""
        config = self.model.config
        return None if config.is_tied is None else not config.is_untied

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        return {
            "schema": 1,
            "kind": "model",
            "path": str(self.model.path),
            **_hub(self.model.path),
            "model_type": self.model_type,
            "architectures": self.architectures,
            "layout": self.model.layout.name,
            "family": self.model.family,
            "components": self.components,
            "parameters": self.parameters,
            "bytes": self.model.bytes,
            "quantization": asdict(found) if (found := self.quantization) else None,
            "tensors": len(self.model.stored),
            "dtypes": dict(self.dtypes),
            "shards": len(self.model.shards),
            **({"hashes": dict(self.hashes)} if self.hashes else {}),
            "metadata": without_pictures(self.metadata),
            "notes": list(self.notes),
        }

    def document(self) -> Document:
        """Return what people see of it."""
        from loratool.verbs.inspection.shown import model_document

        return model_document(self)


def _hub(path: Path) -> dict[str, Any]:
    """Return the model and commit of what came from the hub."""
    origin = origin_of(path)
    return {"hub": origin.as_json()} if origin is not None else {}


def inspect(
    path: str | PathLike[str],
    *,
    spectrum: bool = False,
    hashes: bool = False,
    adapter_name: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AdapterInfo | ModelInfo:
    """Say what is at ``path``, from headers alone; torch is not imported.

    Args:
        path: An adapter or a model, file or folder.
        spectrum: Read the factors of an adapter too, and add the singular values of its deltas.
        hashes: Read the weights file too, for the hashes by which other tools know it.
        adapter_name: Which adapter, where there are several.
        threads: With ``spectrum``: number of modules in work at a time.
        progress: With ``spectrum``: called with how much is done and how much there is.

    Raises:
        LoratoolError: It is neither, or a file breaks the rules of its format.
    """
    place = located(path)
    if not place.exists():
        raise missing(place)
    adapter = (
        open_adapter(place, adapter_name=adapter_name)
        if is_adapter(place)
        else _adapter_in_model(place, adapter_name)
    )
    if adapter is not None:
        found: tuple[Spectrum, ...] = ()
        advice: Advice | None = None
        if spectrum:
            from loratool.verbs.advice import advice_on
            from loratool.verbs.spectrum import spectra

            found = spectra(adapter, threads=threads, progress=progress)
            advice = advice_on(adapter, found)
        hashed = _hashed(list(adapter.stamps)) if hashes else {}
        return AdapterInfo(adapter, about(adapter), found, hashed, advice)
    if spectrum:
        raise OptionError(place, "a model; only adapters have deltas with a spectrum")
    from loratool.base.model import open_model, open_stored  # no adapter needs it

    unread: tuple[str, ...] = ()
    try:
        model = open_model(place)
    except UnsupportedError as error:
        unread = (f"its weights are not read: {error}",)
        model = open_stored(place)
    dtypes = Counter(stored.spec.dtype for stored in model.stored)
    hashed = _hashed([shard.path for shard in model.shards]) if hashes else {}
    return ModelInfo(model, dict(dtypes.most_common()), unread, hashed)


def inspect_many(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    recursive: bool = False,
    duplicates: bool = False,
    spectrum: bool = False,
    hashes: bool = False,
    adapter_name: str | None = None,
    threads: int | None = None,
) -> Inspections:
    """Say what is at many paths, one after another; what cannot be read does not stop the rest.

    Going through the result yields an :class:`AdapterInfo`, a :class:`ModelInfo` or, where a path
    cannot be read, an ``Unread`` for each, as it is read. ``records()`` returns rows as plain
    dictionaries; a notebook or ``print`` shows them as a table.

    Args:
        paths: Files and folders. Of a folder that is no adapter and no model, every weights file
            in it is one, and every folder in it that is.
        recursive: Look into all folders.
        duplicates: Say in rows which earlier adapter has the same content. Files that may have it
            by their headers are read whole.
        spectrum: As in :func:`inspect`.
        hashes: As in :func:`inspect`.
        adapter_name: As in :func:`inspect`.
        threads: As in :func:`inspect`.
    """
    from loratool.verbs.inspection.many import Inspections  # one path needs none of it

    several = [paths] if isinstance(paths, str | PathLike) else paths
    return Inspections(
        several,
        recursive=recursive,
        duplicates=duplicates,
        spectrum=spectrum,
        hashes=hashes,
        adapter_name=adapter_name,
        threads=threads,
    )


def _hashed(files: Sequence[Path]) -> dict[str, str]:
    from loratool.files.hashes import hashes_of  # few ask for it

    if len(files) != 1:
        raise OptionError("--hashes", f"what is in {len(files)} files has no hash of its own")
    return hashes_of(files[0])


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter by itself, and not a model.

    Raises:
        FileFormatError: A file breaks the rules of its format.
    """
    if path.is_file():
        return path.name in sidecar_names() or (not is_index(path.name) and _holds_factors(path))
    there = {entry.name: entry for entry in os.scandir(path)}
    if not there.keys().isdisjoint((*sidecar_names(), *weights_names())):
        return True
    if (described := distributed(path)) is not None:
        return bool(factor_names(open_weights(described).tensors))
    if any((path / name / CONFIG_NAME).exists() for name, e in there.items() if e.is_dir()):
        from loratool.base.config import is_model_folder

        if not is_model_folder(path):
            return True
    try:
        shards = open_checkpoint(path).shards
    except BaseModelError:
        return False
    return len(shards) == 1 and _holds_factors(shards[0].path)


def _adapter_in_model(path: Path, adapter_name: str | None) -> Adapter | None:
    """Return the adapter whose factors lie beside the weights that they are for, in one file.

    A model that is published with several adapters in it, each with a name, stays a model.
    """
    if is_index(path.name):
        return None
    try:
        (weights,) = [shard.path for shard in open_checkpoint(path).shards]
        if not factor_names(open_weights(weights).tensors):
            return None
        adapter = open_adapter(weights, adapter_name=adapter_name)
    except (LoratoolError, ValueError):
        return None
    return adapter if adapter.beside else None


def _holds_factors(path: Path) -> bool:
    """Whether most of a file's keys are an adapter's, of a scheme that is read or not."""
    keys = open_weights(path).tensors
    best = max((scheme.keys.factor_keys(keys) for scheme in claimed(keys)), default=0)
    if best > 0 and best >= ADAPTER_SHARE * len(keys):
        return True
    return bool(keys) and looks_like_adapter(keys, forms())
