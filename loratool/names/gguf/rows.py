"""In which order a tensor of a GGUF file has the rows of the module that it is, or is a part of.

llama.cpp pairs the neighbours of a head for its rotary embeddings where transformers pairs its
halves, cuts fused projections, and sorts others by what they are. All of that is told by views:
a module's rows are seen as an array of several axes, a stretch of one axis is taken, and the
axes are put in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FORMS", "SAME", "Form", "Heads", "Rows", "Run"]


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a layer.

    Attributes:
        query: Of queries.
        key: Of keys and values.
    """

    query: int
    key: int

    @property
    def groups(self) -> int:
        """How many heads of queries share one of keys."""
        return self.query // self.key


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a module that lie one after the other in a tensor.

    Attributes:
        view: The axes that the module's rows are seen as; one of them may be -1.
        order: The axes in their order in the tensor.
        axis: The axis that a stretch is taken of.
        first: Where the stretch begins.
        last: Where it ends; ``None`` for the end of the axis.
    """

    view: tuple[int, ...] = (-1,)
    order: tuple[int, ...] = (0,)
    axis: int = 0
    first: int = 0
    last: int | None = None

    @property
    def known(self) -> int:
        """The rows for each of the unknown axis, of the module."""
        return prod(size for size in self.view if size > 0)

    @property
    def taken(self) -> tuple[int, ...]:
        """The axes after the stretch was taken; -1 stays."""
        if self.last is None and self.first == 0:
            return self.view
        sizes = list(self.view)
        sizes[self.axis] = (self.view[self.axis] if self.last is None else self.last) - self.first
        return tuple(sizes)

    def resolved(self, unknown: int) -> Run:
        """Return it with ``unknown`` for the axis of -1."""
        return replace(self, view=tuple(unknown if n < 0 else n for n in self.view))

    def indices(self) -> NDArray[Any]:
        """Return which row of the module each of its rows is, with all axes known."""
        import numpy as np

        rows = np.arange(prod(self.view)).reshape(self.view)
        taken = rows[(slice(None),) * self.axis + (slice(self.first, self.last),)]
        return taken.transpose(self.order).reshape(-1)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a module a tensor has, in which order.

    Attributes:
        runs: What lies one after the other.
    """

    runs: tuple[Run, ...] = (Run(),)

    @property
    def is_same(self) -> bool:
        """Whether it has all of them in their order."""
        return self.is_in_order and len(self.runs) == 1 and self.runs[0].taken == self.runs[0].view

    @property
    def is_in_order(self) -> bool:
        """Whether none of them lies before one that it is behind of in the module."""
        return all(run.order == tuple(range(len(run.view))) for run in self.runs)

    @property
    def is_all(self) -> bool:
        """Whether it has all rows of the module."""
        return sum(prod(map(abs, run.taken)) for run in self.runs) == self.runs[0].known

    def of_module(self, rows: int, where: str) -> Rows:
        """Return it for a module of ``rows`` rows, with no axis unknown.

        Raises:
            UnsupportedError: They are no rows of such a module.
        """
        return self._resolved(rows, self.runs[0].known, rows, where)

    def of_tensor(self, rows: int, where: str) -> Rows:
        """Return it for a tensor of ``rows`` rows, with no axis unknown.

        Raises:
            UnsupportedError: They are no rows of such a tensor.
        """
        known = sum(prod(size for size in run.taken if size > 0) for run in self.runs)
        return self._resolved(rows, known, rows, where)

    def _resolved(self, rows: int, known: int, total: int, where: str) -> Rows:
        if known <= 0 or rows % known:
            raise UnsupportedError(
                where,
                f"has {total} rows, which are no multiple of {known}",
                hint="are the attention heads those of its base?",
            )
        return Rows(tuple(run.resolved(rows // known) for run in self.runs))

    @property
    def module_rows(self) -> int:
        """How many rows the module has, with all axes known."""
        return prod(self.runs[0].view)

    def indices(self) -> NDArray[Any]:
        """Return which row of the module each row of the tensor is, with all axes known."""
        import numpy as np

        return np.concatenate([run.indices() for run in self.runs])

    @property
    def exchanged(self) -> tuple[int, int, int] | None:
        """``(n, a, b)`` where the module's rows, seen so, lie with the last two axes exchanged.

        ``None`` where they lie in their own order, or otherwise. All axes are known.
        """
        run = self.runs[0]
        is_whole = len(self.runs) == 1 and run.taken == run.view
        if not is_whole or run.order != (0, 2, 1) or len(run.view) != 3:
            return None
        count, outer, inner = run.view
        return count, outer, inner

    @property
    def swapped(self) -> tuple[int, int, int] | None:
        """The same where each of ``(n, a, b)`` may be several rows that stay together."""
        run = self.runs[0]
        is_whole = len(self.runs) == 1 and run.taken == run.view
        if is_whole and run.order == (1, 0, 2):
            return 1, run.view[0], run.view[1]
        return self.exchanged


SAME: Final = Rows()

Form = Callable[[Heads], Rows]


def _paired(count: Callable[[Heads], int]) -> Form:
    """Return halves of each head as neighbours."""
    return lambda heads: Rows((Run((count(heads), 2, -1), (0, 2, 1)),))


def _keys_by_group(heads: Heads) -> int:
    """Return the heads by which Baichuan's and Xverse's keys are paired."""
    return heads.query if heads.query == heads.key else heads.groups


def _sorted(heads: Heads) -> Rows:
    """Return queries, keys and values of each head as all queries, all keys, all values."""
    return Rows((Run((heads.query, 3, -1), (1, 0, 2)),))


def _falcon(heads: Heads) -> Rows:
    """Return the same of each group of heads that share keys and values."""
    size = heads.groups
    if heads.key == 1:
        return SAME
    if size == 1:
        return _sorted(heads)
    view = (heads.key, size + 2, -1)
    cuts = ((0, size), (size, size + 1), (size + 1, size + 2))
    return Rows(tuple(Run(view, (0, 1, 2), 1, first, last) for first, last in cuts))


def _grouped(part: int) -> Form:
    """Return one of queries, keys and values of groups of heads, paired but for the values."""

    def form(heads: Heads) -> Rows:
        size = heads.groups
        first, last = ((0, size), (size, size + 1), (size + 1, size + 2))[part]
        if part == 2:
            return Rows((Run((heads.key, size + 2, -1), (0, 1, 2), 1, first, last),))
        return Rows((Run((heads.key, size + 2, 2, -1), (0, 1, 3, 2), 1, first, last),))

    return form


def _third(part: int) -> Form:
    """Return one of queries, keys and values of as many heads each, paired but for the values."""

    def form(heads: Heads) -> Rows:
        if part == 2:
            return Rows((Run((3, -1), (0, 1), 0, 2, 3),))
        return Rows((Run((3, heads.query, 2, -1), (0, 1, 3, 2), 0, part, part + 1),))

    return form


def _stacked(part: int) -> Form:
    """Return one of queries, keys and values that lie one below the other."""

    def form(heads: Heads) -> Rows:
        ends = (0, heads.query, heads.query + heads.key, heads.query + 2 * heads.key)
        return Rows((Run((ends[3], -1), (0, 1), 0, ends[part], ends[part + 1]),))

    return form


def _half(part: int) -> Form:
    return lambda _: Rows((Run((2, -1), (0, 1), 0, part, part + 1),))


def _every_second(part: int) -> Form:
    return lambda _: Rows((Run((-1, 2), (0, 1), 1, part, part + 1),))


FORMS: Final[Mapping[str, Form]] = {
    "": lambda _: SAME,
    "queries": _paired(lambda heads: heads.query),
    "keys": _paired(lambda heads: heads.key),
    "keys by group": _paired(_keys_by_group),
    "sorted": _sorted,
    "sorted by group": _falcon,
    "queries of groups": _grouped(0),
    "keys of groups": _grouped(1),
    "values of groups": _grouped(2),
    "first third": _third(0),
    "second third": _third(1),
    "last third": _third(2),
    "queries below": _stacked(0),
    "keys below": _stacked(1),
    "values below": _stacked(2),
    "first half": _half(0),
    "second half": _half(1),
    "even": _every_second(0),
    "odd": _every_second(1),
}
"""The rows of a tensor by what the tables call them."""
HEADLESS: Final = frozenset(("", "last third", "first half", "second half", "even", "odd"))
"""Those that no heads decide."""
