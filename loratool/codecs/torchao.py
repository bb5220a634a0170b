"""torchao's tensors as safetensors hold them: their parts, described in the header's metadata.

``M.weight`` lies in ``M._weight_qdata``, ``M._weight_scale`` and others; under its name the
metadata say in JSON which class it is of. Those whose codes lie in their own order are read:
``W = (qdata - zero_point) · scale``, with a scale for each row, block or weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.numbers import decode
from loratool.codecs.parts import scales
from loratool.codecs.stacks import stacked_rows
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.dtypes import dtype_named
from loratool.files.json import parse_json
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": ["_qdata"], "metadata": ["tensor_names"]}

SUFFIX: Final = "_qdata"
CODES: Final = {
    "Float8Tensor": ("F8_E4M3", "F8_E5M2"),
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
}
"""The classes that are read, and what their codes may be."""
FLOATS: Final = ("F32", "F16", "BF16")
WHOLE: Final = ("I8", "I32", "I64")
SHIFT: Final = "zero_point"
SMOOTH: Final = "act_pre_scale"
HINT: Final = "merge on the 16-bit original"


class _TorchAo:
    """``qdata``, ``scale`` and perhaps ``zero_point``, and what only activations need."""

    name: Final = "torchao"
    methods: Final = ("torchao",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`."""
        found = {}
        for name, codes in tensors.items():
            module, _, leaf = name.rpartition(".")
            if not leaf.startswith("_") or not leaf.endswith(SUFFIX):
                continue
            parameter = leaf[1:].removesuffix(SUFFIX)
            weight = f"{module}.{parameter}"
            kind, dtype, names = _described(weight, said)
            if kind not in CODES:
                raise UnsupportedError(
                    weight, f"is torchao's {kind:.40}, whose order of codes is not read", hint=HINT
                )
            parts = {"qdata": codes}
            for role in ("scale", *names):
                part = tensors.get(f"{module}._{parameter}_{role}")
                if part is None:
                    raise FileFormatError(
                        weight,
                        f"has torchao's codes, but no {f'_{parameter}_{role}'!r} beside them",
                        hint="download the model again, or the shard that is missing",
                    )
                parts[role] = part
            if SMOOTH in parts:
                raise UnsupportedError(
                    weight, f"has {SMOOTH!r}: its inputs are scaled, which is not read", hint=HINT
                )
            _check(kind, parts)
            shape = codes.spec.shape
            spec = TensorSpec(weight, said.logical_dtype(dtype or parts["scale"].spec.dtype), shape)
            width = shape[-1] if len(shape) > 2 else 0
            found[weight.removesuffix(".weight")] = CodedTensor(
                CODEC, parts, spec, {"format": kind}, width
            )
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
        codes = coded.parts["qdata"]
        shape = (stop - start, coded.width)
        data = stacked_rows(parts, codes, start, stop)
        values = decode(data, codes.spec.dtype, shape, kind)
        if start == stop:
            return values
        for role in (SHIFT, "scale"):
            part = coded.parts.get(role)
            if part is not None:
                numbers = _spread(codes, part, start, stop, parts, kind)
                blocks = values.reshape(*numbers.shape, -1)
                operation = np.subtract if role == SHIFT else np.multiply
                operation(blocks, numbers[..., None], out=blocks)
        return values

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(
            coded.spec.name,
            "is not written in torchao's codes again",
            hint="merge to 16 bits with --quantized dequantize, then quantise with torchao",
        )


def _spread(
    codes: StoredTensor, part: StoredTensor, start: int, stop: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return the scales of some rows, those of each row in one."""
    shape, grid = codes.spec.shape, part.spec.shape
    if part.spec.elements == 1:
        number = scales(part, parts.rows(part, 0, 1), (1, 1), kind)
        return np.broadcast_to(number, (stop - start, 1))
    # Which row of scales a row of codes has, where each axis has blocks of its own.
    places = np.unravel_index(np.arange(start, stop), shape[:-1])
    blocks = tuple(
        place // (size // count)
        for place, size, count in zip(places, shape[:-1], grid[:-1], strict=True)
    )
    rows = np.ravel_multi_index(blocks, grid[:-1])
    first, last = int(rows.min()), int(rows.max()) + 1
    found = scales(part, stacked_rows(parts, part, first, last), (last - first, grid[-1]), kind)
    return found[rows - first]


def _described(weight: str, said: Description) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the class of a weight, its dtype, and which tensors it has, by the metadata.

    Raises:
        FileFormatError: They do not say so.
    """
    text = said.metadata.get(weight)
    if text is None:
        raise FileFormatError(
            weight,
            "has torchao's codes, and no metadata that say what they are",
            hint="the file was written anew without them: download it again",
        )
    told = parse_json(text.encode("utf-8", "replace"), where=weight)
    kind = told.get("_type") if isinstance(told, dict) else None
    names = told.get("_tensor_data_names") if isinstance(told, dict) else None
    data = told.get("_data") if isinstance(told, dict) else None
    if (
        not isinstance(kind, str)
        or not isinstance(data, dict)
        or not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
    ):
        raise FileFormatError(weight, "has metadata that do not say which of torchao's it is")
    dtype = data.get("dtype")
    name = dtype.get("_data") if isinstance(dtype, dict) else None
    known = dtype_named(name) if isinstance(name, str) else None
    return kind, known.name if known is not None else None, tuple(names)


def _check(kind: str, parts: Mapping[str, StoredTensor]) -> None:
    """Refuse codes, scales and zero points that do not fit together.

    Raises:
        FileFormatError: They do not.
    """
    codes = parts["qdata"].spec
    if codes.dtype not in CODES[kind] or len(codes.shape) < 2 or not codes.elements:
        raise FileFormatError(
            codes.name,
            f"is {codes.dtype} {list(codes.shape)}, expected {' or '.join(CODES[kind])}",
        )
    for role, dtypes in (("scale", FLOATS), (SHIFT, WHOLE)):
        if role not in parts:
            continue
        spec = parts[role].spec
        fits = spec.elements == 1 or (
            len(spec.shape) == len(codes.shape)
            and math.prod(spec.shape) > 0
            and not any(size % n for size, n in zip(codes.shape, spec.shape, strict=True))
        )
        if spec.dtype not in dtypes or not fits:
            raise FileFormatError(
                spec.name,
                f"is {spec.dtype} {list(spec.shape)}, expected one of {', '.join(dtypes)} for each "
                f"block of codes {list(codes.shape)}",
            )


CODEC: Final[Codec] = _TorchAo()
