"""bitsandbytes' LLM.int8(): ``W = Q · SCB / 127``, SCB being the largest magnitude of each row.

Files of old versions may hold codes in tiles made for one kind of GPU; ``weight_format`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.numbers import decode
from loratool.codecs.parts import needed, scales
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".SCB"]}

SUFFIX: Final = ".SCB"
FORMATS: Final = ("row", "col32", "col_turing", "col_ampere")
LARGEST: Final = 127.0
SCALES: Final = ("F32", "F16", "BF16")


class _EightBits:
    """``weight`` I8 ``(out, in)``, ``scale`` ``(out,)``, and the ``format`` of the codes."""

    name: Final = "bitsandbytes-int8"
    methods: Final = ("bitsandbytes",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`."""
        found = {}
        for name, scale in tensors.items():
            module = name.removesuffix(SUFFIX)
            if module == name:
                continue
            weight = needed(tensors, module, "weight", "scales of bitsandbytes' codes")
            if weight.spec.dtype != "I8" or len(weight.spec.shape) != 2:
                raise FileFormatError(
                    weight.spec.name,
                    f"is {weight.spec.dtype} {list(weight.spec.shape)} beside {name!r}, expected "
                    "a matrix of I8",
                )
            rows = weight.spec.shape[0]
            if scale.spec.dtype not in SCALES or scale.spec.shape not in ((rows,), (rows, 1)):
                raise FileFormatError(
                    name,
                    f"is {scale.spec.dtype} {list(scale.spec.shape)}, expected one float for each "
                    f"of {rows} rows",
                )
            parts = {"weight": weight, "scale": scale}
            if (kind := tensors.get(f"{module}.weight_format")) is not None:
                _check_format(kind)
                parts["format"] = kind
            dtype = said.logical_dtype(scale.spec.dtype)
            spec = TensorSpec(weight.spec.name, dtype, weight.spec.shape)
            found[module] = CodedTensor(CODEC, parts, spec, {"format": "int8"})
        return found

    def decode_rows(
        self,
        coded: CodedTensor,
        start: int,
        stop: int,
        parts: Parts,
        kind: DTypeLike = np.float64,
    ) -> NDArray[Any]:
        """See :class:`Codec`."""
        weight, scale = coded.parts["weight"], coded.parts["scale"]
        shape = (stop - start, coded.width)
        values = decode(parts.rows(weight, start, stop), "I8", shape, kind)
        factors = scales(scale, parts.rows(scale, start, stop), (stop - start, 1))
        if values.dtype == np.float64:
            values *= factors
            values /= LARGEST
        else:
            values *= (factors / LARGEST).astype(values.dtype)
        return values

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(
            coded.spec.name,
            "is not written in bitsandbytes' 8 bits again",
            hint="merge to 16 bits with --quantized dequantize; load_in_8bit quantises as it loads",
        )


def _check_format(part: StoredTensor) -> None:
    """Refuse codes that do not lie row by row.

    Raises:
        UnsupportedError: They lie in tiles.
        FileFormatError: Nothing says how they lie.
    """
    if part.spec.dtype != "U8" or part.spec.elements != 1:
        raise FileFormatError(
            part.spec.name, f"is {part.spec.dtype} {list(part.spec.shape)}, expected one U8"
        )
    number = read_bytes(part)[0]
    if number >= len(FORMATS):
        raise FileFormatError(part.spec.name, f"is {number}, expected 0 to {len(FORMATS) - 1}")
    if number:
        raise UnsupportedError(
            part.spec.name,
            f"says that the codes lie in tiles ({FORMATS[number]}), which is not read",
            hint="save the model again with bitsandbytes 0.45 or later, or merge on the 16-bit "
            "original",
        )


CODEC: Final[Codec] = _EightBits()
