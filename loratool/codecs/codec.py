"""How a weight is stored that is no plain tensor: codes and scales, in several tensors.

A codec is one file of this folder with a ``CODEC`` and, as a literal, a ``CLAIM``: what its
tensors or its configuration look like. It is found by itself: the claims are read from the text of
the files, and a file is imported only once its claim matches. No list is edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from loratool.discovery import Plugins
from loratool.errors import UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from loratool.codecs.numbers.number import Codes

__all__ = [
    "Claim",
    "Codec",
    "CodedTensor",
    "Description",
    "Doubting",
    "Encoder",
    "Parts",
    "claims",
    "codec_named",
    "recognise",
]

FILES: Final = Plugins(__package__ or "", "CODEC")


class Parts(Protocol):
    """Reads the stored tensors that a weight is made of."""

    def rows(self, part: StoredTensor, start: int, stop: int) -> memoryview:
        """Return the bytes of some rows, from the first to one before the last.

        Rows run along the first axis; a scalar has one.
        """
        ...

    def columns(
        self, part: StoredTensor, start: int, stop: int, rows: tuple[int, int] | None = None
    ) -> memoryview:
        """Return the bytes of some columns of some rows, by default of all, row by row.

        Columns are what is beyond the first axis, as one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Description:
    """What a model says of itself that tells how its weights are stored.

    Attributes:
        quantization: What its configuration, or a file beside it, says of quantisation.
        dtype: The float that its weights are meant as (``BF16``), where it says so.
        metadata: What the headers of its files say.
    """

    quantization: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """The ``quant_method``, in lower case."""
        method = self.quantization.get("quant_method")
        return method.lower() if isinstance(method, str) else None

    def logical_dtype(self, scale: str | None = None) -> str:
        """Return the float of 16 bits that coded weights stand for, as a header calls it.

        Args:
            scale: The dtype of the scales: the next witness, where the model says nothing.
        """
        named = self.dtype or scale
        is_half = named in DTYPES and DTYPES[named].is_mergeable and DTYPES[named].bits == 16
        return named if named is not None and is_half else "BF16"


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A weight as numbers, and the tensors that it is stored in.

    Attributes:
        codec: What understands them.
        parts: The stored tensors by their role, such as ``weight`` and ``scale``: all that belong
            to this weight, those too that its numbers do not depend on.
        spec: What the weight is called, what shape it has, and what float it stands for.
        settings: What else the codec has to know.
        columns: Of the matrix that rows are decoded of; 0 for all that is beyond the first axis.
    """

    codec: Codec
    parts: Mapping[str, StoredTensor]
    spec: TensorSpec
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: int = 0

    @property
    def width(self) -> int:
        """Columns of the weight as a matrix: kernels flattened, stacks one below the other."""
        if self.columns or not self.spec.shape:
            return self.columns or 1
        rows = self.spec.shape[0]
        return self.spec.elements // rows if rows else 0

    @property
    def rows(self) -> int:
        """Its rows."""
        return self.spec.elements // self.width if self.width else 0


class Encoder(Protocol):
    """Writes one weight again, rounded once, with scales of its own.

    Attributes:
        roles: The parts that it writes; the others stay as they are.
        step: How many rows share scales: cuts are multiples of it.
        needs_largest: Whether a scale depends on the largest magnitude of the whole weight.
    """

    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def step(self) -> int: ...
    @property
    def needs_largest(self) -> bool: ...

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """Return rows ``start`` to ``stop`` as they are stored.

        Args:
            start: A multiple of the step.
            stop: A multiple of it, or the end.
            values: ``(stop - start, width)``, finite.
            largest: The largest magnitude of the whole weight, where that is needed.

        Returns:
            By the role of a part, its first row and its rows as they are stored; of what has no
            rows of its own, such as the scale of a whole weight, the same from every call.

        Raises:
            ValueError: The rows are cut elsewhere, or a value is not finite.
        """
        ...


class Codec(Protocol):
    """One way to store weights.

    Attributes:
        name: What it is called in reports.

    Where one tool alone writes such tensors there is an attribute ``methods`` too: the values of
    ``quant_method`` that they are of, the usual one first.
    """

    @property
    def name(self) -> str: ...

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """Return the weights that are stored in this way, by their modules.

        Headers only, but for what describes a single weight and lies in a tensor.

        Raises:
            FileFormatError: Tensors that can be nothing else do not fit together.
            UnsupportedError: They are of a kind that is not read.
        """
        ...

    def decode_rows(
        self,
        coded: CodedTensor,
        start: int,
        stop: int,
        parts: Parts,
        kind: DTypeLike = "float64",
    ) -> NDArray[Any]:
        """Return rows ``start`` to ``stop`` as numbers, a new array ``(stop - start, width)``.

        In float64 they are exact; float32 rounds the product of code and scale.

        Raises:
            FileFormatError: A scale is NaN or infinite, or codes are out of range.
        """
        ...

    def encoder(self, coded: CodedTensor) -> Encoder:
        """Return what writes the weight again with other values.

        Raises:
            UnsupportedError: That takes data for calibration, a search, or is not done here.
        """
        ...


@runtime_checkable
class Doubting(Protocol):
    """A codec whose tensors do not always tell all that it has to know."""

    def doubt(self, coded: CodedTensor, parts: Parts) -> str | None:
        """Return what it is not sure of in a weight, in words that follow the weight's name."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """What a codec's tensors look like at a glance.

    Attributes:
        codec: The name of its file.
        suffixes: Endings of tensor names, of which one is there wherever the codec is.
        dtypes: Dtypes of tensors, of which one is there wherever the codec is.
        methods: Values of ``quant_method`` in a configuration.
        metadata: Keys of a header's metadata that describe its codes, and nothing else.
    """

    codec: str
    suffixes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()


def claims() -> tuple[Claim, ...]:
    """Return the claims of all codecs, in the order of their names; none is imported."""
    keys = ("suffixes", "dtypes", "methods", "metadata")
    return tuple(
        Claim(name, *(tuple(claim.get(key, ())) for key in keys))
        for name, claim in FILES.claims().items()
    )


def codec_named(name: str) -> Codec:
    """Return the codec in the file ``name``, which is imported.

    Raises:
        KeyError: There is none.
    """
    if name not in FILES.claims():
        raise KeyError(name)
    codec: Codec = FILES.load(name)
    return codec


def recognise(tensors: Mapping[str, StoredTensor], said: Description) -> dict[str, CodedTensor]:
    """Return all weights of a model that are no plain tensors, by their modules.

    Where several codecs see a weight, the one that explains most tensors is right.

    Raises:
        UnsupportedError: Two explain as many, or see :meth:`Codec.recognise`.
        FileFormatError: See :meth:`Codec.recognise`.
    """
    found: dict[str, CodedTensor] = {}
    for codec in _claimed(tensors, said):
        for module, coded in codec.recognise(tensors, said).items():
            other = found.setdefault(module, coded)
            if other is coded:
                continue
            if len(other.parts) == len(coded.parts):
                raise UnsupportedError(
                    module, f"may be stored as {other.codec.name} and as {codec.name}"
                )
            found[module] = max(other, coded, key=lambda item: len(item.parts))
    return found


def _claimed(tensors: Mapping[str, StoredTensor], said: Description) -> Iterator[Codec]:
    endings = tuple(suffix for claim in claims() for suffix in claim.suffixes)
    names = [name for name in tensors if name.endswith(endings)] if endings else []
    dtypes = {stored.spec.dtype for stored in tensors.values()}
    for claim in claims():
        if (
            said.method in claim.methods
            or not dtypes.isdisjoint(claim.dtypes)
            or not said.metadata.keys().isdisjoint(claim.metadata)
            or any(name.endswith(claim.suffixes) for name in names)
        ):
            yield codec_named(claim.codec)
