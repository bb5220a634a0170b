"""What a variant is: how the tensors of a module change its weight.

A variant is one file of ``loratool/variants`` with a subclass of :class:`Variant`. Whoever asks
what a module's delta is asks its variant; nobody compares names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor

if TYPE_CHECKING:
    from loratool.adapter.config import LoraConfig
    from loratool.adapter.model import Site
    from loratool.adapter.scaling import Scaling

__all__ = [
    "LARGEST",
    "NO_GEOMETRY",
    "SHAPE",
    "WEIGHT",
    "Array",
    "Change",
    "Choice",
    "Geometry",
    "Read",
    "Settings",
    "Shapes",
    "Slots",
    "Variant",
]

Array: TypeAlias = Any
"""An array of any library."""
Slots: TypeAlias = Mapping[Slot, StoredTensor]
Shapes: TypeAlias = Mapping[Slot, tuple[int, ...]]
Settings: TypeAlias = Mapping[str, Any]
Read: TypeAlias = Callable[[StoredTensor], Array]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes that a delta has, kernels flattened into its columns; 0 where nothing tells.

    Attributes:
        rank: What alpha is divided by: the rank of the factors, not of the delta.
        out: Rows.
        into: Columns.
    """

    rank: int
    out: int
    into: int


NO_GEOMETRY: Final = Geometry(0, 0, 0)
WEIGHT: Final = Slot("the base's weight")
"""Among the values of a change of a bias: the weight beside it, ``(out, in)``, as it was."""
SHAPE: Final = "shape"
"""In settings: the shape of the base's weight, ``(out, in)``, where one is at hand."""
LARGEST: Final = "largest"
"""In settings: the most outputs and the most inputs of all weights that the adapter changes."""


class Change:
    """What becomes of a weight ``W``, ``(out, in, *kernel)``, or of a part of it.

    One of the two methods is enough; each is the other's default.

    Attributes:
        grain: Rows and columns that only change together: parts begin and end at multiples of
            these, or at the end. 0 stands for all of them.
        of_original: Whether it is a change of the base's weight as it was, whatever other adapters
            have made of it.
    """

    grain: tuple[int, int] = (1, 1)
    of_original: bool = False

    def changed(self, part: Array, row: int, column: int) -> Array:
        """Return what a part of W becomes, new and of its dtype.

        Args:
            part: ``(rows, columns, *kernel)``, which is not written to.
            row: Its first row.
            column: Its first column (of inputs, whatever the kernel).
        """
        return part + self.difference(part, row, column)

    def difference(self, part: Array, row: int, column: int) -> Array:
        """Return :meth:`changed` less what was there, without the rounding of a subtraction."""
        return self.changed(part, row, column) - part


class Variant:
    """A kind of delta. What a subclass leaves out is as for plain LoRA, or not there.

    Attributes:
        name: What reports call it.
        words: What it is, as the end of a sentence.
        is_plain: Whether it is made of A and B, whatever lies beside or between them.
        is_compact: Whether A and B are stored in another form, which :meth:`factors` writes out.
        is_narrow: Whether a factor may span a divisor of the weight's side.
        is_blocked: Whether of block-diagonal factors only the blocks are stored.
        is_stacked: Whether A stacks the factors of parts of a merged projection.
        is_decomposed: Whether magnitudes rescale the changed weight, as in DoRA.
        is_linear: Whether a scale multiplies its delta.
        is_scaled: Whether its alpha, where there is one, is a scale.
        keeps_alpha: Whether its alpha is no scale, but has to be kept.
        has_factors: Whether :meth:`factors` returns an A and B that equal it.
        has_matrix: Whether it changes a matrix at all.
        has_change: Whether :meth:`change` says what becomes of a weight; :meth:`difference` is for
            what is added to any.
        needs_base: Whether its delta depends on the numbers of the weight.
        needs_shape: Whether only the weight's shape tells what its factors are.
        needs_places: Whether it has to know the base's weights: the shape of its own, and the
            largest sides of all that its adapter changes (:data:`SHAPE` and :data:`LARGEST`).
        bias_needs_weight: Whether what becomes of a bias depends on the weight, which is then among
            the values (:data:`WEIGHT`).
        needs_whole: Whether a change looks at the whole weight at once.
        takes_weights: Whether a part of its change means something.
        parameters: Roles of tensors that are added to whole parameters of the module, as they are,
            and what each may be called there; a bias in the role of that is one anyway.
        replaces: Whether they take the place of those parameters instead.
        residual: What has to be taken out of the base first, if anything.
        undetermined: Why A and B alone are not its delta, as ``is …``, with a place for
            ``{verb}``; empty where they are.
        remedy: What to do about that.
        between: Roles of diagonals between B and A.
        kernel_slots: Roles whose further dimensions are those of a convolution's kernel.
        embedding_slots: Roles that only an embedding has.
        fields: Further fields of PEFT's configuration that it knows.
        shapes: Its tensors and what they have to look like (:mod:`loratool.adapter.expected`);
            those that it shares with other modules by their names in the settings.
        spare: Those of them that it may lack.
        whole_numbers: Those of them that are places, which need not be floats.
        resizes: Whether what takes the place of a parameter may have another shape.
        mending: What to do where tensors are missing that its own tool can make again.
    """

    name: ClassVar[str]
    words: ClassVar[str] = ""
    is_plain: ClassVar[bool] = False
    is_compact: ClassVar[bool] = False
    is_narrow: ClassVar[bool] = False
    is_blocked: ClassVar[bool] = False
    is_stacked: ClassVar[bool] = False
    is_decomposed: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True
    is_scaled: ClassVar[bool] = True
    keeps_alpha: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    has_matrix: ClassVar[bool] = True
    has_change: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    needs_shape: ClassVar[bool] = False
    needs_places: ClassVar[bool] = False
    bias_needs_weight: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False
    takes_weights: ClassVar[bool] = True
    parameters: ClassVar[Mapping[Slot, tuple[str, ...]]] = MappingProxyType({})
    replaces: ClassVar[bool] = False
    residual: ClassVar[str | None] = None
    undetermined: ClassVar[str] = ""
    remedy: ClassVar[str] = (
        "merge it into its base (loratool merge BASE ADAPTER -o MERGED), and extract what the two "
        "differ in (loratool extract BASE MERGED --rank R -o OUT)"
    )
    between: ClassVar[tuple[Slot, ...]] = ()
    kernel_slots: ClassVar[frozenset[Slot]] = frozenset((Slot.DOWN,))
    embedding_slots: ClassVar[frozenset[Slot]] = frozenset()
    fields: ClassVar[frozenset[str]] = frozenset()
    shapes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    spare: ClassVar[frozenset[str]] = frozenset()
    whole_numbers: ClassVar[frozenset[str]] = frozenset()
    resizes: ClassVar[bool] = True
    mending: ClassVar[str | None] = None

    def __repr__(self) -> str:
        return f"<variant {self.name}>"

    # --- from headers

    def fits(self, slots: Slots, enabled: tuple[bool, ...]) -> bool:
        """Whether tensors that bear its signs are of this variant.

        Args:
            slots: The tensors of a module.
            enabled: Which parts of merged projections stacked factors are for.
        """
        return True

    def is_its_own(self, site: Site) -> bool:
        """Whether other tools mean another delta by these tensors, so that A and B are written."""
        return self.is_compact

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return what :attr:`Site.settings` has to remember beside the tensors.

        Args:
            module: The module.
            slots: Its tensors.
            config: PEFT's configuration, where there is one.
            tensors: All tensors of the adapter, by key.

        Raises:
            AdapterError: The configuration says something impossible.
        """
        return {}

    def expected(self, slots: Slots) -> Mapping[str, str]:
        """Return the part of :attr:`shapes` that a module with these tensors has to have."""
        return self.shapes

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """Return the shapes of the delta; a KeyError, IndexError or ValueError is no geometry."""
        return NO_GEOMETRY

    def scaling(self, site: Site, config: LoraConfig | None) -> Scaling | None:
        """Return the scale where it is not alpha by rank, as LoRA's is, else ``None``."""
        return None

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """Yield ``(code, problem)`` for everything that makes ``site`` unusable."""
        yield from ()

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """Whether its delta fits a weight of ``shape``, ``(out, in, *kernel)``.

        What the tensors do not tell fits everything.
        """
        found = site.geometry
        sizes = (shape[0], math.prod(shape[1:]))
        pairs = zip((found.out, found.into), sizes, strict=True)
        return all(wanted in (0, size) for wanted, size in pairs)

    def kernel(self, site: Site) -> tuple[int, ...] | None:
        """Return the kernel that its tensors tell; ``None`` where they are flattened."""
        return None

    def factor_rank(self, site: Site) -> int:
        """Return the rank of :meth:`factors`."""
        return site.rank

    def scale_slot(self, slots: Mapping[Slot, Any]) -> Slot | None:
        """Return the tensor that has to carry the scale, where readers ignore alpha."""
        return None

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """Make sure that :meth:`factors` can be computed.

        Args:
            site: The module.
            shape: That of the base's weight, where one was given.

        Raises:
            AdapterError: A tensor is missing.
            UnsupportedError: Something is missing that is in no file of the adapter.
        """

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """Return the columns of the delta, kernels flattened.

        Args:
            site: The module.
            shape: That of the base's weight, where one was given.
        """
        return site.in_features

    def outputs_together(self, site: Site) -> int:
        """Return how many outputs only change together, where a base may have them apart.

        0 stands for all of them.
        """
        return 0 if self.needs_whole or self.needs_base else 1

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """Return the roles of tensors that the delta follows: these times a number make it so.

        None where there are no such.
        """
        return ()

    def grown(self, site: Site) -> tuple[int, ...] | None:
        """Return the shape that the weight gets first, with zeros in what is new."""
        return None

    def changes_bias(self, site: Site) -> bool:
        """Whether the layer's bias changes too, where it has one."""
        return False

    # --- from numbers

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """Return A ``(r, in)`` and B ``(out, r)``, kernels flattened, without the scale.

        Args:
            site: The module.
            read: Returns the numbers of a stored tensor.
            width: Columns of the weight, where they are known.
        """
        raise NotImplementedError

    def difference_shape(self, site: Site) -> tuple[int, ...]:
        """Return the shape of :meth:`difference`; empty where there is no such thing."""
        return ()

    def difference(self, values: Mapping[Slot, Array]) -> Array:
        """Return the delta of a variant without factors that does not depend on a weight."""
        raise NotImplementedError

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """Return what becomes of a weight.

        Args:
            site: The module.
            values: The numbers of its tensors.
            shape: That of the whole weight, ``(out, in, *kernel)``.
            scale: What multiplies the delta.
        """
        raise NotImplementedError

    def bias_change(self, site: Site, values: Mapping[Slot, Array]) -> Change:
        """Return what becomes of a bias, seen as ``(out, 1)``."""
        raise NotImplementedError


Choice = Callable[["str", "Slots", "LoraConfig | None", "tuple[bool, ...]"], Variant]
"""Returns the variant of a module, from its path, tensors, configuration and enabled parts."""
