"""GPTQ: whole numbers of 2 to 8 bits in groups of inputs, as AutoGPTQ and its heirs write them.

``W[o, i] = scales[g, o] · (q[i, o] - z[g, o])`` with ``g = g_idx[i]``. Words of ``qweight`` run
along the inputs, those of ``qzeros`` along the outputs. The first version of the format stores
``z - 1``, in as many bits; the second one ``z``. AutoRound has both.

A ``z`` of 0 is stored by the first version as a code of ones. GPTQModel takes 1 from whole words
instead, where such a code borrows from its neighbour; what it has written is read in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.parts import beside, needed, scales
from loratool.codecs.words import (
    INDICES,
    WORD,
    group_index,
    scale_groups,
    turned_words,
    unpack,
    words_for,
)
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {
    "suffixes": [".qweight", ".qzeros", ".g_idx", ".B"],
    "methods": ["gptq", "gptqmodel"],
}

SUFFIX: Final = ".qweight"
OURS: Final = ("gptq", "gptqmodel")
AWQ: Final = 8
"""Outputs in a word of AWQ, where GPTQ has one."""
PACKED: Final = ("I8", "I16", "I64")
"""Other words that GPTQModel can pack into."""
BITS: Final = (2, 3, 4, 8, 5, 6, 7)
"""Widths of codes, those first that people use."""
SCALES: Final = ("F16", "BF16", "F32")
READ: Final = ("", "gptq", "gptq_v2")
"""Values of ``checkpoint_format`` that are read."""
HINT: Final = "merge on the 16-bit original"
KEEP: Final = (
    "merge to 16 bits with --quantized dequantize, then quantise again with GPTQModel or AutoRound"
)


class _Gptq:
    """Three tensors and often a fourth: ``qweight``, ``qzeros``, ``scales``, ``g_idx``."""

    name: Final = "gptq"
    methods: Final = ("gptq", "auto-round", "gptqmodel")

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; what has its words along the outputs is AWQ."""
        _refuse_marlin(tensors, said)
        found = {}
        for name, words in tensors.items():
            module = name.removesuffix(SUFFIX)
            if module == name or not _is_ours(tensors, module, words, said):
                continue
            _check_format(module, words, said)
            found[module] = _coded(tensors, module, words, said)
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
        bits, size = coded.settings["bits"], coded.settings["group_size"]
        scale, index = coded.parts["scales"], coded.parts.get("g_idx")
        groups = scale.spec.shape[0]
        codes = unpack(turned_words(parts, coded.parts["qweight"], start, stop), bits, coded.width)
        data = parts.columns(scale, start, stop)
        factors = scales(scale, data, (groups, stop - start), kind).T
        zeros = _zeros(coded, start, stop, parts).T.astype(kind)
        where = size if index is None else group_index(parts, index, groups, size)
        return scale_groups(codes, zeros, factors, size if where is None else where, kind)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(coded.spec.name, "GPTQ needs calibration data", hint=KEEP)

    def doubt(self, coded: CodedTensor, parts: Parts) -> str | None:
        """Say that two writers store some of its zeros otherwise, and nothing tells which it was.

        All of them are read, which are few.
        """
        if coded.settings["version"] != 1 or coded.settings["borrows"]:
            return None
        if not (_zeros(coded, 0, coded.rows, parts) == 0).any():
            return None
        return (
            "has zeros of 0, read as AutoGPTQ stores them; GPTQModel stores its neighbours "
            "otherwise, and says so under meta.quantizer, which is not there"
        )


def _zeros(coded: CodedTensor, start: int, stop: int, parts: Parts) -> NDArray[np.uint8]:
    """Return what is subtracted from the codes of some outputs, ``(groups, stop - start)``."""
    part, bits = coded.parts["qzeros"], coded.settings["bits"]
    # Whole runs of codes, which begin and end with a word.
    run = WORD if WORD % bits else WORD // bits
    first = start // run * bits * run // WORD
    last = min(part.spec.shape[1], -(-stop // run) * bits * run // WORD)
    words = np.frombuffer(parts.columns(part, first, last), "<u4")
    words = words.reshape(part.spec.shape[0], last - first)
    if coded.settings["borrows"]:
        ones = sum(1 << shift for shift in range(0, WORD, bits))
        words = words + np.uint32(ones)
    begin = first * WORD // bits
    codes = unpack(words.view(np.uint8), bits, stop - begin)[:, start - begin :]
    if coded.settings["version"] == 1 and not coded.settings["borrows"]:
        codes = (codes + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return codes


def _is_ours(
    tensors: Mapping[str, StoredTensor], module: str, words: StoredTensor, said: Description
) -> bool:
    """Whether a module's words run along its inputs."""
    if f"{module}.g_idx" in tensors:
        return True
    scale = tensors.get(f"{module}.scales")
    is_whole = scale is not None and len(scale.spec.shape) == len(words.spec.shape) == 2
    if scale is None or not is_whole:
        # What is not whole belongs to whom the model names.
        return said.method in OURS
    columns, other = words.spec.shape[1], scale.spec.shape[1]
    if said.method in OURS:
        return other != AWQ * columns
    if words.spec.dtype != "I32" or said.method == "awq" or scale.spec.dtype not in SCALES:
        return False
    # With a word for each group it could be AWQ, turned; a group of GPTQ's fills more.
    is_taller = words.spec.shape[0] > scale.spec.shape[0] or said.method is not None
    return is_taller and other == columns


def _coded(
    tensors: Mapping[str, StoredTensor], module: str, words: StoredTensor, said: Description
) -> CodedTensor:
    """Return a module's weight.

    Raises:
        FileFormatError: Its tensors do not fit together.
    """
    zeros = needed(tensors, module, "qzeros", "codes of GPTQ")
    scale = needed(tensors, module, "scales", "codes of GPTQ")
    index = tensors.get(f"{module}.g_idx")
    for part, dtypes, rank in (
        *((part, ("I32",), 2) for part in (words, zeros)),
        (scale, SCALES, 2),
        *((part, tuple(INDICES), 1) for part in (index,) if part is not None),
    ):
        if part.spec.dtype not in dtypes or len(part.spec.shape) != rank:
            raise FileFormatError(
                part.spec.name,
                f"is {part.spec.dtype} of shape {list(part.spec.shape)}, expected "
                f"{' or '.join(dtypes)} with {rank} axes",
            )
    if index is None and said.quantization.get("desc_act") is True:
        needed(tensors, module, "g_idx", "codes of GPTQ in the order of activations (desc_act)")
    groups, out = scale.spec.shape
    bits, into = _measures(module, words, zeros, scale, index, said)
    size = _group_size(module, into, groups, said, is_free=index is not None)
    if zeros.spec.shape[0] != groups or words.spec.shape[1] != out:
        raise _unfit(module, words, zeros, scale)
    version = _version(said)
    return CodedTensor(
        CODEC,
        {"qweight": words, "qzeros": zeros, "scales": scale} | beside(tensors, module, ("g_idx",)),
        TensorSpec(f"{module}.weight", said.logical_dtype(scale.spec.dtype), (out, into)),
        {
            "bits": bits,
            "group_size": size,
            "version": version,
            "borrows": version == 1 and bits in (2, 4, 8) and _is_of_gptqmodel(said),
        },
    )


def _measures(
    module: str,
    words: StoredTensor,
    zeros: StoredTensor,
    scale: StoredTensor,
    index: StoredTensor | None,
    said: Description,
) -> tuple[int, int]:
    """Return bits of a code and number of inputs, as the shapes tell them.

    Rules for single modules (``dynamic``) make the configured width one of several.

    Raises:
        FileFormatError: No width, or more than one, makes these shapes.
    """
    rows, out = words.spec.shape[0], scale.spec.shape[1]
    told = said.quantization.get("bits")
    fitting = {}
    for bits in BITS:
        into = rows * WORD // bits if index is None else index.spec.shape[0]
        if index is None and rows and words_for(into, bits) != rows:
            continue
        if _fits(rows, into, bits) and _fits(zeros.spec.shape[1], out, bits):
            fitting[bits] = into
    if type(told) is int and told in fitting:
        return told, fitting[told]
    if len(fitting) != 1:
        raise _unfit(module, words, zeros, scale, index)
    return next(iter(fitting.items()))


def _fits(words: int, count: int, bits: int) -> bool:
    """Whether so many words hold so many codes: no more than these, or whole runs of them."""
    run = WORD if WORD % bits else WORD // bits
    return words in (words_for(count, bits), words_for(-(-count // run) * run, bits))


def _group_size(module: str, into: int, groups: int, said: Description, *, is_free: bool) -> int:
    """Return how many inputs a group has, where they are in order.

    Args:
        module: What has the groups.
        into: Its inputs.
        groups: How many groups.
        said: What the model says.
        is_free: Whether each input names its group.

    Raises:
        FileFormatError: So many inputs do not make so many groups.
    """
    told = said.quantization.get("group_size")
    if type(told) is int and told > 0 and -(-into // told) == groups:
        return told
    if groups and (is_free or not into % groups):
        return -(-into // groups)
    raise FileFormatError(
        f"{module}.scales",
        f"has {groups} groups for {into} inputs, and no g_idx says which has which",
    )


def _version(said: Description) -> int:
    """Return which of the two formats of zeros a model has."""
    packing = said.quantization.get("packing_format")
    if isinstance(packing, str) and packing.startswith("auto_round"):
        return 1 if "gptq" in packing and "gptqmodel" not in packing else 2
    if said.method == "auto-round" and not _format(said):
        return 2
    return 2 if _format(said) == "gptq_v2" else 1


def _format(said: Description) -> str:
    told = said.quantization.get("checkpoint_format", said.quantization.get("format"))
    return told.lower() if isinstance(told, str) else ""


def _is_of_gptqmodel(said: Description) -> bool:
    """Whether GPTQModel has written the file, by what it says of itself."""
    meta = said.quantization.get("meta")
    told = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = told if isinstance(told, list) else [told]
    return any(str(name).lower().startswith("gptqmodel") for name in names)


def _check_format(module: str, words: StoredTensor, said: Description) -> None:
    """Refuse words in another order.

    Raises:
        UnsupportedError: The configuration names such a format, or they are no words of 32 bits.
    """
    if words.spec.dtype in PACKED:
        raise UnsupportedError(module, f"is GPTQ packed into {words.spec.dtype}", hint=HINT)
    packing = said.quantization.get("packing_format")
    told = _format(said)
    if said.method in OURS and told not in READ:
        raise UnsupportedError(module, f"is GPTQ in the format {told!r}", hint=HINT)
    if isinstance(packing, str) and "marlin" in packing.lower():
        raise UnsupportedError(module, f"is GPTQ packed for {packing!r}", hint=HINT)
    if said.quantization.get("is_marlin_format") is True:
        raise UnsupportedError(module, "is GPTQ in the order of Marlin's kernels", hint=HINT)


def _refuse_marlin(tensors: Mapping[str, StoredTensor], said: Description) -> None:
    """Refuse modules whose codes are called ``B``, in tiles.

    Raises:
        UnsupportedError: There are such.
    """
    for name, stored in tensors.items():
        module = name.removesuffix(".B")
        if module == name or stored.spec.dtype != "I32":
            continue
        if f"{module}.s" in tensors:
            raise UnsupportedError(module, "is GPTQ in the order of Marlin's kernels", hint=HINT)


def _unfit(module: str, *parts: StoredTensor | None) -> FileFormatError:
    shapes = ", ".join(
        f"{part.spec.name.rpartition('.')[2]} {list(part.spec.shape)}"
        for part in parts
        if part is not None
    )
    return FileFormatError(module, f"has codes of GPTQ that no one width of bits makes: {shapes}")


CODEC: Final[Codec] = _Gptq()
