"""What a family of models is: one table of rows, read in both directions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from loratool.names.vocabulary import NUMBER, Vocabulary, flatten, is_number

__all__ = [
    "CLIP_G",
    "CLIP_L",
    "T5",
    "Family",
    "Fusion",
    "Proportion",
    "Release",
    "Row",
    "Stretch",
    "same",
    "single",
    "stretches",
]

CLIP_L, CLIP_G, T5 = "clip-l", "clip-g", "t5"
"""The roles of text encoders that several families have; what a scheme calls these is its own
business. One of another role is called by its role, as ComfyUI does (``qwen25_7b``)."""
NONE: Final = Vocabulary(())


@dataclass(frozen=True, slots=True)
class Stretch:
    """Outputs that a native module and one of the hub modules in it have in common.

    Attributes:
        part: Which of the hub modules.
        first: The first of its outputs.
        native: The first of the native module's outputs.
        count: How many they are.
    """

    part: int
    first: int
    native: int
    count: int


def stretches(heights: Sequence[int], *, swapped: bool = False) -> tuple[Stretch, ...] | None:
    """Return where the outputs of parts lie in the whole, those of the first part first.

    Args:
        heights: How many outputs each part has.
        swapped: Whether the halves of the whole are exchanged.

    Returns:
        The stretches; ``None`` where there are no halves to exchange.
    """
    if swapped:
        half, odd = divmod(sum(heights), 2)
        return None if odd else (Stretch(0, 0, half, half), Stretch(0, half, 0, half))
    found, start = [], 0
    for part, height in enumerate(heights):
        found.append(Stretch(part, 0, start, height))
        start += height
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What one native module is, in hub modules.

    Attributes:
        modules: Hub modules, in the order of their rows in the native module's output.
        sizes: ``"equal"``: each one has as many rows as the others. ``"input"``: all but the last
            have as many rows as they have inputs, and the last one has the rest. ``"grouped"``:
            the first one has as many rows as inputs, and the others share the rest equally, as
            keys and values do that several heads of queries look at.
        swapped: Whether the two halves of the output rows are exchanged: the native module gives
            (shift, scale) where the hub's gives (scale, shift).
        shares: The rows of each one, in proportion, where their sizes cannot be told otherwise.
    """

    modules: tuple[str, ...]
    sizes: str = "equal"
    swapped: bool = False
    shares: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the native module is one of the hub, output by output."""
        return len(self.modules) == 1 and not self.swapped

    def heights(
        self, inputs: int, total: int | None, known: Mapping[str, int] = MappingProxyType({})
    ) -> tuple[int, ...] | None:
        """Return how many rows each hub module has.

        Args:
            inputs: How many inputs all of them have.
            total: How many rows they have together, if that is known.
            known: The rows of some of them, by name.

        Returns:
            The rows; ``None`` where nothing tells, or where they do not add up.
        """
        count = len(self.modules)
        told = {"equal": 0, "grouped": 1, "input": count - 1}[self.sizes]
        first = [known.get(module, inputs) for module in self.modules[:told]]
        others = self.modules[told:]
        size = next((known[module] for module in others if module in known), None)
        if size is None and total is not None:
            size = (total - sum(first)) // len(others)
        elif size is None and self.shares:
            size = inputs * self.shares[-1] // self.shares[0]
        if size is None:
            return None
        found = (*first, *(known.get(module, size) for module in others))
        is_whole = min(found) > 0 and total in (None, sum(found))
        return found if is_whole else None


@dataclass(frozen=True, slots=True)
class Row:
    """One native module and what it is in the hub's naming.

    Attributes:
        native: The native module; ``*`` where the number of the block stands, if it has one.
        hub: What it is, with ``*`` in the same place of each of its modules.
        count: In how many blocks it occurs, counted from 0.
    """

    native: str
    hub: Fusion
    count: int = 1


def single(native: str, hub: str, count: int = 1, *, swapped: bool = False) -> Row:
    """Return the row of a native module that is one hub module."""
    return Row(native, Fusion((hub,), swapped=swapped), count)


def same(name: str, count: int = 1) -> Row:
    """Return the row of a module that both namings call alike."""
    return single(name, name, count)


@dataclass(frozen=True, slots=True)
class Release:
    """What the metadata of files call a model of the family.

    Attributes:
        base_version: The value of ``ss_base_model_version``.
        architecture: The value of ``modelspec.architecture``, without ``/lora``.
        implementation: The value of ``modelspec.implementation``.
        is_v2: The value of ``ss_v2``.
        width: Inputs of the modules that tell it from another release; ``None`` for the usual one.
    """

    base_version: str
    architecture: str
    implementation: str = "diffusers"
    is_v2: bool = False
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Proportion:
    """The shape of a layer that tells a family from another with the same names.

    Attributes:
        ending: How the path ends, in either naming.
        ratio: The larger side over the smaller one, as the two are meant.
        widens: Whether outputs are counted in inputs, else inputs in outputs.
    """

    ending: str
    ratio: float
    widens: bool

    def fits(self, module: str, outputs: int, inputs: int) -> bool:
        """Whether a module is such a layer."""
        large, small = (outputs, inputs) if self.widens else (inputs, outputs)
        return module.endswith(self.ending) and bool(small) and large / small == self.ratio


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models whose modules correspond one to one.

    Args:
        name: ``"sd1"``, ``"sdxl"``, ``"flux"``, …
        backbone: The name that diffusers gives the component: ``"unet"`` or ``"transformer"``.
        rows: The table. No module may occur twice in the same naming. Empty for models that were
            published in the naming of diffusers.
        hub_names: Names of diffusers' models of any depth; those of the table if not given.
        native_names: The same in the original naming.
        others: The same modules in further namings, each cut as that one cuts them; read, and
            never written.
        encoders: The components that are text encoders, with their roles; empty if not known.
        refines: The family that is meant where names fit both.
        is_trained_native: Whether kohya's trainers use the native names.
        releases: What metadata call its models.
        told_by: How the paths of the modules end whose inputs tell the releases apart.
        proportions: Layers by whose shape it is told from families with the same native names.
        depths: How many blocks models of the family have that have fewer than the table.
        widths: How many inputs layers of its published models have, by how their paths end in
            diffusers' names; by them it is told from families with the same names.

    Raises:
        ValueError: A module occurs twice, so that the table would not be bijective.
    """

    name: str
    backbone: str
    rows: tuple[Row, ...] = field(default=(), repr=False, compare=False)
    hub_names: Vocabulary = field(default=NONE, repr=False, compare=False)
    native_names: Vocabulary = field(default=NONE, repr=False, compare=False)
    others: tuple[Row, ...] = field(default=(), repr=False, compare=False)
    encoders: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    refines: str | None = field(default=None, compare=False)
    is_trained_native: bool = field(default=True, repr=False, compare=False)
    releases: tuple[Release, ...] = field(default=(), repr=False, compare=False)
    told_by: tuple[str, ...] = field(default=(), repr=False, compare=False)
    proportions: tuple[Proportion, ...] = field(default=(), repr=False, compare=False)
    depths: tuple[int, ...] = field(default=(), repr=False, compare=False)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    _by_native: Mapping[str, tuple[Row, ...]] = field(init=False, repr=False, compare=False)
    _by_hub: Mapping[str, tuple[Row, ...]] = field(init=False, repr=False, compare=False)
    _repeated: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        every = (*self.rows, *self.others)
        by_native = {row.native: (row,) for row in every}
        hubs = [module for row in self.rows for module in row.hub.modules]
        by_hub: dict[str, tuple[Row, ...]] = dict.fromkeys(hubs, ())
        if len(by_native) != len(every) or len(by_hub) != len(hubs):
            raise ValueError(f"{self.name}: a module occurs twice in the table")
        for row in every:
            for module in row.hub.modules:
                by_hub[module] += (row,)
        pairs = (pair for name in (*by_native, *by_hub) for pair in pairwise(name.split(".")))
        repeated = frozenset(parent for parent, number in pairs if number == NUMBER)
        # Of natives that flatten alike, the one that is written is meant.
        flat = {flatten(native): native for native in reversed(by_native)}
        for name, value in {
            "_by_native": by_native,
            "_by_hub": by_hub,
            "_repeated": repeated,
            "hub_names": Vocabulary(by_hub) if self.hub_names is NONE else self.hub_names,
            "native_names": Vocabulary(flat.values())
            if self.native_names is NONE
            else self.native_names,
        }.items():
            object.__setattr__(self, name, value)

    def recut(self, rows: Iterable[Row]) -> Family:
        """Return the same family with another naming in place of the native one.

        Args:
            rows: That naming; modules of diffusers that are in no row have no name in it.
        """
        return replace(
            self, rows=tuple(rows), hub_names=NONE, native_names=NONE, others=(), depths=()
        )

    @property
    def is_fused(self) -> bool:
        """Whether a native module is several of diffusers, or has its halves exchanged.

        The paths of such a file stay native: one module there is several in diffusers.
        """
        return not all(row.hub.is_plain for row in (*self.rows, *self.others))

    @property
    def is_alike(self) -> bool:
        """Whether both namings call every module alike."""
        return all(row.hub.modules == (row.native,) for row in self.rows)

    def release(self, widths: Collection[int] = ()) -> Release | None:
        """Return what metadata call the model.

        Args:
            widths: Inputs of the modules that :attr:`told_by` names.
        """
        usual = next((each for each in self.releases if each.width is None), None)
        return next((each for each in self.releases if {each.width} == set(widths)), usual)

    def from_native(self, module: str) -> Fusion | None:
        """Return what a native module is; ``None`` if the family has no such native module."""
        found = self._rows(module, self._by_native)
        return None if found is None else numbered(found[0][0].hub, found[1])

    def to_native(self, module: str) -> tuple[str, Fusion] | None:
        """Return the native module that contains a hub module, and all that it is made of.

        Returns:
            The native module's name and its fusion, of which ``module`` is one part; ``None`` if
            the family has no such hub module.
        """
        return next(iter(self.wholes(module)), None)

    def wholes(self, module: str) -> list[tuple[str, Fusion]]:
        """Return the native modules that contain a hub module, with what they are made of.

        Returns:
            One for each naming that has its own, the one that is written first.
        """
        found = self._rows(module, self._by_hub)
        if found is None:
            return []
        rows, number = found
        return [(row.native.replace(NUMBER, number), numbered(row.hub, number)) for row in rows]

    def names(self, module: str) -> tuple[str, ...]:
        """Return what a module is called in each naming that has exactly that module.

        Args:
            module: In any of them.

        Returns:
            The names, the native one that is written first and the hub's last.
        """
        made = self.from_native(module)
        if made is None or self.to_native(module):
            made = Fusion((module,))
        natives = [name for name, fusion in self.wholes(made.modules[0]) if fusion == made]
        return (*natives, *(made.modules if made.is_plain else ()))

    def is_written(self, native: str) -> bool:
        """Whether a native module is called so in the naming that is written."""
        made = self.from_native(native)
        return made is not None and self.to_native(made.modules[0]) == (native, made)

    @property
    def is_stacked(self) -> bool:
        """Whether the table counts blocks, so that it tells the last of them."""
        return any(row.count > 1 for row in self.rows)

    def is_last(self, module: str) -> bool:
        """Whether a module is of the last block of a stack, in either naming and any depth."""
        found = self._rows(module, self._by_hub) or self._rows(module, self._by_native)
        if found is None:
            return False
        (row, *_), number = found
        # Stacks of two are refiners of the input, which all models of their kind have.
        return row.count > 2 and number in {str(each - 1) for each in (row.count, *self.depths)}

    def parse(self, flat: str) -> tuple[str, ...]:
        """Return the modules, in either naming, whose flattened name is ``flat``."""
        found = (*self.hub_names.parse(flat), *self.native_names.parse(flat))
        return tuple(dict.fromkeys(found))

    def has(self, module: str) -> bool:
        """Whether the family has a module of this name, hub or native."""
        return any(self._rows(module, table) for table in (self._by_hub, self._by_native))

    def _rows(
        self, module: str, table: Mapping[str, tuple[Row, ...]]
    ) -> tuple[tuple[Row, ...], str] | None:
        """Return the rows of a module, and the number of its block, as written."""
        if NUMBER in module:
            return None
        exact = table.get(module)
        if exact is not None:
            return exact, ""
        segments = module.split(".")
        for index, (parent, number) in enumerate(pairwise(segments), 1):
            if parent in self._repeated and is_number(number):
                rows = table.get(".".join((*segments[:index], NUMBER, *segments[index + 1 :])))
                if rows is not None and is_below(number, rows[0].count):
                    return rows, number
        return None


def is_below(number: str, count: int) -> bool:
    """Whether a segment is a number, as models write it, that is less than ``count``."""
    return is_number(number) and int(number) < count


def numbered(fusion: Fusion, number: str) -> Fusion:
    """Return a fusion with the number of a block in its place."""
    modules = tuple(module.replace(NUMBER, number) for module in fusion.modules)
    return replace(fusion, modules=modules)
