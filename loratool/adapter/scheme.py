"""A key scheme as an object with parts: what each part answers, and nobody else knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from loratool.adapter.findings import Finding
from loratool.adapter.keys import KeyTable
from loratool.adapter.model import Adapter, Site
from loratool.adapter.part import Part
from loratool.adapter.slots import Slot
from loratool.adapter.told import Told
from loratool.files.spec import StoredTensor, TensorSpec
from loratool.values.expr import Constant, Expr

if TYPE_CHECKING:
    from loratool.names.family import Family

__all__ = [
    "RANKS",
    "Context",
    "Home",
    "Names",
    "NoPlaceError",
    "Paths",
    "Roles",
    "Scale",
    "Scheme",
    "Seal",
    "Settings",
    "Spelled",
    "Tokens",
    "Told",
    "Written",
]


RANKS: Final = "ranks"
"""Under which a site remembers how many tensor-parallel ranks its rows are of, one by one."""


class NoPlaceError(Exception):
    """A scheme has no place for something.

    Attributes:
        what: What it is, in words.
        slot: The one tensor that it is, where the rest of its module has a place.
    """

    def __init__(self, what: str, slot: Slot | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.slot = slot


@dataclass(frozen=True)
class Names:
    """What the modules of a file are.

    Attributes:
        paths: Module to its paths: one where it is known, several where it is ambiguous.
        family: The pipeline that they belong to, where known.
        components: What is a component of a pipeline for certain.
        is_native: Whether the backbone's paths were those of original checkpoints.
    """

    paths: Mapping[str, tuple[str, ...]]
    family: str | None = None
    components: frozenset[str] = frozenset()
    is_native: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """What the spelling of modules depends on.

    Attributes:
        scheme: The scheme's name, for messages.
        accepts: Whether a module may be spelled so in its keys.
        family: The pipeline that the modules belong to, where known.
        known: What is a component for certain.
        alone: The component whose modules go by their own names, if there is one.
    """

    scheme: str
    accepts: Callable[[str], bool]
    family: str | None = None
    known: frozenset[str] = frozenset()
    alone: str | None = None


@dataclass(frozen=True, slots=True)
class Spelled:
    """A module and what a scheme calls it."""

    name: str
    part: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a scheme is told about an adapter that is written in it.

    Attributes:
        modules: What it is made of, as the scheme calls and stores it.
        parts: The same modules under the paths that they have inside what is written.
        extras: Names of the tensors beside the deltas.
        source: The scheme that it comes in; empty for none, or for several.
        scheme: The scheme that is written.
        config: PEFT's configuration to start from; ``None`` where nothing has one.
        changes: Fields that it gets.
        keeps_targets: Whether its fields that choose modules mean exactly these modules.
        sidecar: The configuration that it came with, where that is another tool's.
        metadata: What it says about its training.
        family: The pipeline that its modules belong to, where known.
        stem: What the file was called that it comes from.
        title: What the output is called.
        name: The adapter's name in it, for schemes that have one.
    """

    modules: tuple[Spelled, ...]
    parts: tuple[Part, ...]
    extras: tuple[str, ...]
    source: str
    scheme: str
    config: Mapping[str, Any] | None
    changes: Mapping[str, Any]
    keeps_targets: bool
    sidecar: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    family: str | None
    stem: str
    title: str
    name: str = ""


class Paths(Protocol):
    """How modules are spelled.

    Attributes:
        has_components: Whether paths say which model of a pipeline they are in.
        is_dotted: Whether they are those of one model, as it has them.
        is_whole: Whether all modules of a model have a place, or none.
        is_narrow: Whether the modules of a few families of models alone have names.
        keeps_unknown: Whether modules whose path is not known can be written as they were read.
        follows_base: Whether paths are those that the base itself has.
    """

    @property
    def has_components(self) -> bool: ...
    @property
    def is_dotted(self) -> bool: ...
    @property
    def is_whole(self) -> bool: ...
    @property
    def is_narrow(self) -> bool: ...
    @property
    def keeps_unknown(self) -> bool: ...
    @property
    def follows_base(self) -> bool: ...

    def spell(self, modules: Sequence[str], context: Context) -> list[str]:
        """Return what modules are called, given their paths.

        Raises:
            UnsupportedError: One has no name.
        """
        ...

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return what the modules of ``sites`` are.

        Args:
            sites: As a file has them.
            metadata: Of the file.
            base: Module paths of the base, if it is at hand.
        """
        ...

    def record(self, paths: Mapping[str, str]) -> Mapping[str, str]:
        """Return the metadata that a reader needs, given names and the paths that they are of."""
        ...

    def writes_native(
        self, wish: str | None, families: Sequence[str], *, is_native: bool
    ) -> bool | None:
        """Return whether backbones go by the names of original checkpoints; ``None``: never.

        Args:
            wish: ``native`` or ``diffusers``, where somebody said so.
            families: What the modules may belong to.
            is_native: Whether that is how they were read.
        """
        ...

    def own(self, family: Family) -> Family:
        """Return a family by the native names of the scheme, where it has its own of them."""
        ...

    def refusal(self, count: int) -> str | None:
        """Return why ``count`` modules are not known, where the scheme itself can tell."""
        ...

    def parameter(self, name: str) -> str:
        """Return the path of a parameter that a file holds beside the deltas."""
        ...


class Scale(Protocol):
    """Where the number that multiplies ``B @ A`` goes.

    Attributes:
        has_one_rank: Whether all modules have to have the same rank.
    """

    @property
    def has_one_rank(self) -> bool: ...

    def place(self, parts: Sequence[Part], *, fold: bool) -> list[Part]:
        """Return ``parts`` with the scale where it belongs.

        Args:
            parts: The modules.
            fold: Put it into the factors in any case.
        """
        ...

    def record(self, part: Part) -> Constant | None:
        """Return what is stored as the alpha of a module, if anything is."""
        ...


class Settings(Protocol):
    """What lies beside the tensors: in a file of its own, or in the metadata.

    Attributes:
        file: The name of the configuration; empty where there is none.
        names_targets: Whether it says which modules it is for, nested ones and raw parameters too.
        names_saved: Whether it says which modules are saved as a whole.
        stale: A regular expression for metadata that describes the form of such a file.
        naming: The same for what stays true as long as the scheme is the same.
        keeps_invocation: Whether it says after which tokens an adapter acts.
    """

    @property
    def file(self) -> str: ...
    @property
    def names_targets(self) -> bool: ...
    @property
    def names_saved(self) -> bool: ...
    @property
    def stale(self) -> str: ...
    @property
    def naming(self) -> str: ...
    @property
    def keeps_invocation(self) -> bool: ...

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """Whether a configuration is this scheme's, and not PEFT's."""
        ...

    def load(self, path: Path) -> dict[str, Any]:
        """Return what the file of its own says.

        Raises:
            FileFormatError: It cannot be read.
        """
        ...

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with the alphas and ranks that are recorded.

        Args:
            sites: As the tensors have them.
            metadata: Of the file.
            sidecar: The configuration, where it is this scheme's.
            where: Where that is.

        Raises:
            AdapterError: What is recorded cannot be understood.
            UnsupportedError: It says that the delta is no sum.
        """
        ...

    def base_model(self, metadata: Mapping[str, str]) -> str | None:
        """Return the model that a file of the scheme says that it is for, if it does."""
        ...

    def config(self, written: Written) -> dict[str, Any] | None:
        """Return the configuration, or ``None`` where there is none."""
        ...

    def dump(self, config: Mapping[str, Any]) -> Mapping[str, bytes]:
        """Return the configuration as files have it, by their names."""
        ...

    def metadata(self, written: Written) -> dict[str, str]:
        """Return what goes into the metadata."""
        ...

    def notes(self, written: Written) -> Iterator[str]:
        """Yield what a user should know about what is written."""
        ...

    def remarks(self, sites: Sequence[Site], sidecar: Mapping[str, Any] | None) -> Iterator[str]:
        """Yield what somebody who reads these settings should know, one sentence each."""
        ...

    def findings(self, adapter: Adapter) -> Iterator[Finding]:
        """Yield what is wrong with a stored adapter of this scheme, or missing beside it."""
        ...


class Roles(Protocol):
    """In which roles, shapes and orientation the tensors of a module are stored.

    Attributes:
        is_transposed: Whether A is stored as ``(in, r)`` and B as ``(r, out)``.
        has_variants: Whether modules without A and B have a place.
    """

    @property
    def is_transposed(self) -> bool: ...
    @property
    def has_variants(self) -> bool: ...

    def view(self, slot: Slot, tensor: StoredTensor) -> StoredTensor:
        """Return a stored tensor as the model of an adapter sees it: A as ``(r, in)``."""
        ...

    def apart(self, site: Site) -> list[Site]:
        """Return the modules that a stored one stands for: one for each expert that it stacks."""
        ...

    def read(self, site: Site) -> Site:
        """Return ``site`` in the roles that its path calls for."""
        ...

    def magnitude(self, tensor: StoredTensor) -> Expr:
        """Return stored magnitudes as ``(out,)``, or as they are where they are of the inputs."""
        ...

    def cut(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` with those as several that are several there, before ranks are set.

        Raises:
            AdapterError: One has other rows than those.
            UnsupportedError: One is no plain LoRA, or nothing tells where it is cut.
        """
        ...

    def together(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` with those as one that are stored as one.

        Raises:
            UnsupportedError: Some of them are missing, or differ.
        """
        ...

    def stored(self, part: Part) -> Part:
        """Return ``part`` with its tensors as they are stored.

        Raises:
            NoPlaceError: One of them is not.
        """
        ...


class Tokens(Protocol):
    """What trained tokens are called, and how they are stored."""

    def key(self, name: str) -> str | None:
        """Return the name of a tensor, ``None`` where it is no token's embedding."""
        ...

    def stored(self, value: Expr) -> Expr:
        """Return its values in the shape that they are stored in."""
        ...


class Seal(Protocol):
    """Metadata that only the finished file tells: hashes of its data."""

    @property
    def room(self) -> Mapping[str, str]:
        """The keys, with values of the right length."""
        ...

    def close(
        self,
        read: Callable[[int, memoryview], None],
        size: int,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
    ) -> Mapping[str, str]:
        """Return the values.

        Args:
            read: Fills a buffer with data from an offset behind the header on.
            size: Bytes of data.
            specs: The tensors in their order.
            metadata: What else the header says.
        """
        ...


@dataclass(frozen=True, slots=True)
class Home:
    """What a file of a scheme is called, and what else has a place in it.

    Attributes:
        weights_name: The weights file in a folder; empty for ``<folder>``'s name.
        suffix: The ending of its weights file.
        is_open: Whether tensors that are no deltas may lie beside the factors.
        dtype: What factors of other schemes are written as unless somebody says; empty for theirs.
        tokens: How trained tokens are stored; ``None`` where they are not.
        library: What model cards call the library that loads it; empty where none is its own.
    """

    weights_name: str = ""
    suffix: str = ".safetensors"
    is_open: bool = False
    dtype: str = ""
    tokens: Tokens | None = None
    library: str = ""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store an adapter.

    Attributes:
        name: What the command line calls it.
        summary: One line on who writes it.
        example: A key, as people see it.
        keys: How tensors are named.
        paths: How modules are spelled.
        scale: Where the scale goes.
        roles: In which roles and shapes tensors are stored.
        settings: What lies beside them.
        home: What the file is called.
        seal: Metadata that only the finished file tells.
        beside: What is used instead where PEFT's configuration, or alphas, lie beside the input.
        resembles: Patterns of keys that are of its tool and no factors, with what they are.
        priority: Which scheme is meant where two recognise as many keys: the higher.
        join: Returns a tensor from its parts on tensor-parallel ranks, where its tool has such.
        follows: Returns the scheme for one model, where names or rows depend on which that is.
        is_written: Whether adapters are written in it too.
    """

    name: str
    summary: str
    example: str
    keys: KeyTable
    paths: Paths
    scale: Scale
    roles: Roles
    settings: Settings
    home: Home = field(default_factory=Home)
    seal: Seal | None = None
    beside: Mapping[str, tuple[Scale, Settings]] = field(default_factory=dict)
    resembles: tuple[tuple[str, str], ...] = ()
    priority: int = 0
    join: Callable[[str, Sequence[StoredTensor]], StoredTensor] | None = None
    follows: Callable[[Told], Scheme] | None = None
    is_written: bool = True

    def of(self, told: Told) -> Scheme:
        """Return the scheme as it is for one model."""
        return self.follows(told) if self.follows is not None else self

    def recorded(self, *, has_config: bool, has_alphas: bool) -> Scheme:
        """Return the scheme with the scale kept where the input has it, if it leaves that open."""
        key = "config" if has_config else "alpha" if has_alphas else ""
        if key not in self.beside:
            return self
        scale, settings = self.beside[key]
        return replace(self, scale=scale, settings=settings)
