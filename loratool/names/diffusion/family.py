"""What a family of models is: one table of rows, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

__all__ = ["NUMBER", "Family", "Fusion", "Row", "single"]

NUMBER: Final = "*"
"""The segment of a template that stands for the number of a block."""

REPEATED: Final = frozenset(
    (
        "transformer_blocks",
        "single_transformer_blocks",
        "double_blocks",
        "single_blocks",
        "joint_blocks",
        "blocks",
    )
)
"""The segments that a block number follows, in either naming; all other numbers are literal."""

MAX_DIGITS: Final = 6
"""No model has a million blocks; longer numbers are not read at all."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """What one native module is, in hub modules.

    Attributes:
        modules: Hub modules, in the order of their rows in the native module's output.
        sizes: ``"equal"``: each one has as many rows as the others. ``"input"``: all but the last
            have as many rows as they have inputs, and the last one has the rest.
        swapped: Whether the two halves of the output rows are exchanged: the native module gives
            (shift, scale) where the hub's gives (scale, shift).
    """

    modules: tuple[str, ...]
    sizes: str = "equal"
    swapped: bool = False


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


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models whose modules correspond one to one.

    Args:
        name: ``"sd1"``, ``"sdxl"``, ``"flux"``, …
        backbone: The name that diffusers gives the component: ``"unet"`` or ``"transformer"``.
        rows: The table. No module may occur twice in the same naming.

    Raises:
        ValueError: A module occurs twice, so that the table would not be bijective.
    """

    name: str
    backbone: str
    rows: tuple[Row, ...] = field(repr=False, compare=False)
    _by_native: Mapping[str, Row] = field(init=False, repr=False, compare=False)
    _by_hub: Mapping[str, Row] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_native = {row.native: row for row in self.rows}
        by_hub = {module: row for row in self.rows for module in row.hub.modules}
        if len(by_native) != len(self.rows) or len(by_hub) != sum(
            len(row.hub.modules) for row in self.rows
        ):
            raise ValueError(f"{self.name}: a module occurs twice in the table")
        object.__setattr__(self, "_by_native", by_native)
        object.__setattr__(self, "_by_hub", by_hub)

    def from_native(self, module: str) -> Fusion | None:
        """Return what a native module is; ``None`` if the family has no such native module."""
        found = look_up(module, self._by_native)
        return None if found is None else numbered(found[0].hub, found[1])

    def to_native(self, module: str) -> tuple[str, Fusion] | None:
        """Return the native module that contains a hub module, and all that it is made of.

        Returns:
            The native module's name and its fusion, of which ``module`` is one part; ``None`` if
            the family has no such hub module.
        """
        found = look_up(module, self._by_hub)
        if found is None:
            return None
        row, number = found
        return row.native.replace(NUMBER, number), numbered(row.hub, number)

    def has(self, module: str) -> bool:
        """Whether the family has a module of this name, hub or native."""
        return any(look_up(module, table) for table in (self._by_hub, self._by_native))


def look_up(module: str, table: Mapping[str, Row]) -> tuple[Row, str] | None:
    """Return the row of a module and the number of its block, as written."""
    if NUMBER in module:
        return None
    exact = table.get(module)
    if exact is not None:
        return exact, ""
    segments = module.split(".")
    for index, (parent, number) in enumerate(pairwise(segments), 1):
        if parent in REPEATED:
            row = table.get(".".join((*segments[:index], NUMBER, *segments[index + 1 :])))
            return (row, number) if row is not None and is_below(number, row.count) else None
    return None


def is_below(number: str, count: int) -> bool:
    """Whether a segment is a number, as models write it, that is less than ``count``."""
    return is_number(number) and int(number) < count


def is_number(segment: str) -> bool:
    """Whether a segment is a number as models write it: short, decimal, without leading zeros."""
    return (
        0 < len(segment) <= MAX_DIGITS
        and segment.isascii()
        and segment.isdigit()
        and (segment[0] != "0" or segment == "0")
    )


def numbered(fusion: Fusion, number: str) -> Fusion:
    """Return a fusion with the number of a block in its place."""
    modules = tuple(module.replace(NUMBER, number) for module in fusion.modules)
    return Fusion(modules, fusion.sizes, fusion.swapped)
