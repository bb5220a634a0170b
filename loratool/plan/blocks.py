"""Where blocks of a weight are computed: what the processor and a GPU each have to offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from loratool.codecs.weights import RowSource
from loratool.files.spec import StoredTensor
from loratool.math.namespace import Array
from loratool.math.products import Products
from loratool.plan.devices import check_torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Arithmetic", "Bench", "arithmetic_on", "bench_on"]


class Arithmetic(Protocol):
    """In what dtype, and where, something is computed: how it gets there."""

    def read(self, stored: StoredTensor) -> Array:
        """Return a whole tensor as numbers, contiguous, new."""
        ...

    def rows(self, reader: RowSource, start: int, count: int) -> Array:
        """Return rows of a stored tensor as numbers, ``(count, width)``, new."""
        ...

    def zeros(self, *shape: int) -> Array:
        """Return zeros."""
        ...

    def rounded(self, values: Array, dtype: str) -> Array:
        """Return values rounded to ``dtype``, in their own."""
        ...

    def converted(self, values: Array) -> Array:
        """Return values in this dtype, themselves where they have it."""
        ...

    def double(self) -> Arithmetic:
        """Return the same in float64."""
        ...


class Bench(Protocol):
    """What one thread computes blocks with: memory that it keeps, and its arithmetic."""

    @property
    def products(self) -> Products:
        """What adds products."""
        ...

    def load(
        self, data: memoryview, dtype: str, shape: tuple[int, int], *, is_double: bool = False
    ) -> Array:
        """Return stored numbers as a block that may be changed until the next call."""
        ...

    def take(self, values: Array) -> Array:
        """Return new numbers of the processor as a block that may be changed."""
        ...

    def given(self, block: Array) -> NDArray[Any]:
        """Return a block as an array of the processor, good until the next one."""
        ...

    def input(self, size: int) -> memoryview:
        """Return memory to read bytes into."""
        ...

    def kept(self, block: Array) -> Array:
        """Return a copy that stays until the next call."""
        ...

    def store(self, block: Array, dtype: str) -> tuple[memoryview, bool]:
        """Round a block once; return its bytes, good until the next call, and a verdict.

        The verdict is whether all numbers were finite and fitted.
        """
        ...

    def surviving(self, block: Array, original: Array, dtype: str) -> tuple[float, float]:
        """Return ``⟨W' - W, Δ⟩`` and ``‖Δ‖²`` of the block that was stored last.

        ``Δ`` is what was to be added; ``W'`` is what was stored. Destroys ``block``.
        """
        ...


def arithmetic_on(device: str, *, is_double: bool) -> Arithmetic:
    """Return float32 or float64 arithmetic on a device: numpy's on the processor.

    Raises:
        UnsupportedError: There is no such device, or PyTorch for it.
    """
    if device in ("auto", "cpu"):
        from loratool.plan.host import HostArithmetic

        return HostArithmetic("float64" if is_double else "float32")
    check_torch(device)
    import torch

    from loratool.plan.gpu import Arithmetic as TorchArithmetic
    from loratool.plan.gpu import resolve_device

    kind = torch.float64 if is_double else torch.float32
    return TorchArithmetic(kind, resolve_device(device))


def bench_on(device: str) -> Bench:
    """Return what a new thread needs to compute on a device.

    Raises:
        UnsupportedError: There is no such device, or PyTorch for it.
    """
    if device in ("auto", "cpu"):
        from loratool.plan.host import HostBench

        return HostBench()
    check_torch(device)
    from loratool.plan.gpu import TorchBench, resolve_device

    return TorchBench(resolve_device(device))
