"""How a weight is stored that is no plain tensor: codes and scales, in several tensors.

A codec is one file of this folder with a ``CODEC`` and, as a literal, a ``CLAIM``: what its
tensors or its configuration look like. It is found by itself: the claims are read from the text of
the files, and a file is imported only once its claim matches. No list is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from loratool.discovery import Plugins
from loratool.errors import UnsupportedError
from loratool.files.dtypes import DTYPES, dtype_named
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from loratool.codecs.number import Codes

__all__ = [
    "Claim",
    "Codec",
    "CodedTensor",
    "Read",
    "claims",
    "codec_named",
    "logical_dtype",
    "quantization_of",
    "recognise",
]

Read = Callable[[StoredTensor, int, int], Any]
"""Returns the bytes of some rows of a stored tensor, from the first to one before the last.

Rows run along the first axis; a scalar has one.
"""
FILES: Final = Plugins(__package__ or "", "CODEC")


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A weight as numbers, and the tensors that it is stored in.

    Attributes:
        codec: What understands them.
        parts: The stored tensors by their role, such as ``weight`` and ``scale``.
        spec: What the weight is called, what shape it has, and what float it stands for.
        settings: What else the codec has to know.
    """

    codec: Codec
    parts: Mapping[str, StoredTensor]
    spec: TensorSpec
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the weight as a matrix."""
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def width(self) -> int:
        """Its columns, kernels flattened."""
        return self.spec.elements // self.rows if self.rows else 0


class Codec(Protocol):
    """One way to store weights.

    Attributes:
        name: What it is called in reports.
    """

    @property
    def name(self) -> str: ...

    def recognise(
        self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
    ) -> dict[str, CodedTensor]:
        """Return the weights that are stored in this way, by their modules; headers only.

        Raises:
            FileFormatError: Tensors that can be nothing else do not fit together.
        """
        ...

    def decode_rows(
        self,
        coded: CodedTensor,
        start: int,
        stop: int,
        read: Read,
        kind: DTypeLike = "float64",
    ) -> NDArray[Any]:
        """Return rows ``start`` to ``stop`` as numbers, ``(stop - start, width)``.

        In float64 they are exact; float32 rounds the product of code and scale.
        """
        ...

    def row_step(self, coded: CodedTensor) -> int:
        """Return how many rows share scales: cuts for :meth:`encode_rows` are multiples of it."""
        ...

    def encode_rows(
        self, coded: CodedTensor, start: int, stop: int, values: NDArray[Any]
    ) -> dict[str, tuple[int, Codes]]:
        """Return rows ``start`` to ``stop``, rounded once, with scales of their own.

        Args:
            coded: Says how.
            start: A multiple of :meth:`row_step`.
            stop: A multiple of it, or the end.
            values: ``(stop - start, width)``, finite.

        Returns:
            By the role of a part, its first row and its rows as they are stored.

        Raises:
            ValueError: The rows are cut elsewhere, or a value is not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """What a codec's tensors look like at a glance.

    Attributes:
        codec: The name of its file.
        suffixes: Endings of tensor names, of which one is there wherever the codec is.
        methods: Values of ``quant_method`` in a configuration.
    """

    codec: str
    suffixes: tuple[str, ...]
    methods: tuple[str, ...]


def claims() -> tuple[Claim, ...]:
    """Return the claims of all codecs, in the order of their names; none is imported."""
    return tuple(
        Claim(name, tuple(claim.get("suffixes", ())), tuple(claim.get("methods", ())))
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


def recognise(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> dict[str, CodedTensor]:
    """Return all weights of a model that are no plain tensors, by their modules.

    Where several codecs see a weight, the one that explains most tensors is right.

    Raises:
        UnsupportedError: Two explain as many.
        FileFormatError: See :meth:`Codec.recognise`.
    """
    found: dict[str, CodedTensor] = {}
    for codec in _claimed(tensors, config):
        for module, coded in codec.recognise(tensors, config).items():
            other = found.setdefault(module, coded)
            if other is coded:
                continue
            if len(other.parts) == len(coded.parts):
                raise UnsupportedError(
                    module, f"may be stored as {other.codec.name} and as {codec.name}"
                )
            found[module] = max(other, coded, key=lambda item: len(item.parts))
    return found


def _claimed(tensors: Iterable[str], config: Mapping[str, Any]) -> Iterator[Codec]:
    method = quantization_of(config).get("quant_method")
    endings = tuple(suffix for claim in claims() for suffix in claim.suffixes)
    names = [name for name in tensors if name.endswith(endings)] if endings else []
    for claim in claims():
        if method in claim.methods or any(name.endswith(claim.suffixes) for name in names):
            yield codec_named(claim.codec)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what ``config.json`` says of quantisation; empty where it says nothing."""
    parts = (config, config.get("text_config"))
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(found, Mapping):
                return found
    return {}


def logical_dtype(config: Mapping[str, Any], scale: str | None = None) -> str:
    """Return the float that quantised weights stand for, as a header calls it.

    Args:
        config: ``config.json``, which may name it.
        scale: The dtype of the scales: the next witness, where it has 16 bits.
    """
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            named = dtype_named(str(part.get("dtype") or part.get("torch_dtype")))
            if named is not None and named.is_mergeable:
                return named.name
    is_half = scale in DTYPES and DTYPES[scale].is_mergeable and DTYPES[scale].bits == 16
    return scale if scale is not None and is_half else "BF16"
