"""AWQ: whole numbers of 4 bits in groups of inputs, in the two layouts that are plain.

``W[o, i] = scales[g, o] · (q[i, o] - z[g, o])`` with ``g = i // group_size``. In the layout "gemm"
words run along the outputs, eight of them in an order of its own. In "gemv" all is turned: words
run along the inputs, in order, and the groups are padded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.parts import needed, scales
from loratool.codecs.words import scale_groups, unpack
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".qweight", ".qzeros"], "methods": ["awq"]}

SUFFIX: Final = ".qweight"
CODES: Final = 8
"""Codes in a word."""
ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight the nibbles of a word hold, the lowest one first."""
SCALES: Final = ("F16", "BF16", "F32")
PADDED: Final = {64: 2, 32: 4}
"""Words that zeros are padded to a multiple of, by the size of smaller groups."""
HINT: Final = "merge on the 16-bit original"
KEEP: Final = "merge to 16 bits with --quantized dequantize, then quantise again with AutoAWQ"


class _Awq:
    """Three tensors: ``qweight``, ``qzeros``, ``scales``."""

    name: Final = "awq"
    methods: Final = ("awq", "auto-round")

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; what has its words along the inputs, or a ``g_idx``, is GPTQ."""
        found = {}
        for name, words in tensors.items():
            module = name.removesuffix(SUFFIX)
            if module == name or f"{module}.g_idx" in tensors:
                continue
            layout = _layout(tensors, module, words, said)
            if layout is None:
                continue
            _check_version(module, words, said)
            found[module] = _coded(tensors, module, words, said, layout)
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
        words, zeros, scale = (coded.parts[name] for name in ("qweight", "qzeros", "scales"))
        size, count = coded.settings["group_size"], stop - start
        if coded.settings["layout"] == "gemv":
            codes = unpack(_words(parts, words, start, stop), 4, coded.width)
            groups = coded.width // size
            data = parts.rows(scale, start, stop)
            factors = scales(scale, data, (count, scale.spec.shape[1]), kind)[:, :groups]
            zero = unpack(_words(parts, zeros, start, stop), 4, groups)
            return scale_groups(codes, zero.astype(kind), factors, size, kind)
        groups = scale.spec.shape[0]
        data = parts.columns(scale, start, stop)
        factors = scales(scale, data, (groups, count), kind).T
        codes, zero = (_outputs(parts, part, start, stop) for part in (words, zeros))
        return scale_groups(codes, zero.astype(kind), factors, size, kind)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(coded.spec.name, "AWQ needs calibration data", hint=KEEP)


def _words(parts: Parts, part: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Return the bytes of some rows, ``(stop - start, bytes)``."""
    data = np.frombuffer(parts.rows(part, start, stop), np.uint8)
    return data.reshape(stop - start, 4 * part.spec.shape[1])


def _outputs(parts: Parts, part: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Return the codes of some outputs, ``(stop - start, rows of the part)``."""
    first, last = start // CODES, -(-stop // CODES)
    rows = part.spec.shape[0]
    packed = np.frombuffer(parts.columns(part, first, last), np.uint8)
    turned = np.ascontiguousarray(packed.reshape(rows, 4 * (last - first)).T)
    turned = turned.reshape(last - first, 4, rows)
    codes = np.empty((last - first, CODES, rows), np.uint8)
    for nibble, output in enumerate(ORDER):
        byte = turned[:, nibble // 2]
        codes[:, output] = byte >> 4 if nibble % 2 else byte & 15
    flat = codes.reshape(CODES * (last - first), rows)
    return flat[start - CODES * first : stop - CODES * first]


def _layout(
    tensors: Mapping[str, StoredTensor], module: str, words: StoredTensor, said: Description
) -> str | None:
    """Return which of the layouts a module has; ``None`` where it is not AWQ."""
    scale, zeros = (tensors.get(f"{module}.{leaf}") for leaf in ("scales", "qzeros"))
    if said.method == "awq" and (words.spec.dtype != "I32" or scale is None or zeros is None):
        return "gemm"
    if scale is None or zeros is None or words.spec.dtype != "I32":
        return None
    if {len(part.spec.shape) for part in (words, scale, zeros)} != {2}:
        return "gemm" if said.method == "awq" else None
    if scale.spec.shape[1] == CODES * words.spec.shape[1]:
        return "gemm"
    is_turned = scale.spec.shape == (words.spec.shape[0], CODES * zeros.spec.shape[1])
    version = str(said.quantization.get("version", "gemv")).lower()
    if is_turned and said.method in ("awq", None) and version == "gemv":
        return "gemv"
    return "gemm" if said.method == "awq" else None


def _check_version(module: str, words: StoredTensor, said: Description) -> None:
    """Refuse words in another order.

    Raises:
        UnsupportedError: The configuration names such a layout, or the words are none of 32 bits.
    """
    version = str(said.quantization.get("version", "gemm")).lower()
    backend = str(said.quantization.get("backend", "autoawq")).lower()
    if said.method == "awq" and version not in ("gemm", "gemv"):
        raise UnsupportedError(module, f"is AWQ in the layout {version!r}", hint=HINT)
    if said.method == "awq" and backend == "llm-awq":
        raise UnsupportedError(module, f"is AWQ in the layout of {backend}", hint=HINT)
    if words.spec.dtype == "I16":
        raise UnsupportedError(module, "is AWQ in the layout 'gemv_fast'", hint=HINT)


def _coded(
    tensors: Mapping[str, StoredTensor],
    module: str,
    words: StoredTensor,
    said: Description,
    layout: str,
) -> CodedTensor:
    """Return a module's weight.

    Raises:
        FileFormatError: Its tensors do not fit together.
    """
    zeros = needed(tensors, module, "qzeros", "codes of AWQ")
    scale = needed(tensors, module, "scales", "codes of AWQ")
    for part, dtypes in ((words, ("I32",)), (zeros, ("I32",)), (scale, SCALES)):
        if part.spec.dtype not in dtypes or len(part.spec.shape) != 2:
            raise FileFormatError(
                part.spec.name,
                f"is {part.spec.dtype} of shape {list(part.spec.shape)}, expected a matrix of "
                + " or ".join(dtypes),
            )
    if layout == "gemv":
        out, into = words.spec.shape[0], CODES * words.spec.shape[1]
        size = _padded_group(into, zeros.spec.shape[1], said)
        is_whole = size > 0 and zeros.spec.shape[0] == out
    else:
        (into, columns), (groups, out) = words.spec.shape, scale.spec.shape
        size = into // groups if groups else 0
        is_whole = zeros.spec.shape == (groups, columns) and out == CODES * columns
        is_whole = is_whole and size * groups == into
    if not is_whole:
        shapes = ", ".join(
            f"{part.spec.name.rpartition('.')[2]} {list(part.spec.shape)}"
            for part in (words, zeros, scale)
        )
        raise FileFormatError(
            module, f"has codes of AWQ whose shapes do not fit together ({layout}): {shapes}"
        )
    return CodedTensor(
        CODEC,
        {"qweight": words, "qzeros": zeros, "scales": scale},
        TensorSpec(f"{module}.weight", said.logical_dtype(scale.spec.dtype), (out, into)),
        {"layout": layout, "group_size": size},
    )


def _padded_group(into: int, words: int, said: Description) -> int:
    """Return how many inputs a group has, of which padded zeros fill ``words``; 0 for none."""
    told = said.quantization.get("group_size", said.quantization.get("q_group_size"))
    sizes = [told if told != -1 else into] if type(told) is int else [128, 64, 32]
    fitting = [
        size for size in sizes if size > 0 and not into % size and _padded(into, size) == words
    ]
    return fitting[0] if len(fitting) == 1 else 0


def _padded(into: int, size: int) -> int:
    """Return how many words the zeros of one output fill."""
    words, step = math.ceil(into // size / CODES), PADDED.get(size, 1)
    return math.ceil(words / step) * step


CODEC: Final[Codec] = _Awq()
