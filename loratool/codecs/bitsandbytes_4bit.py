"""bitsandbytes' 4 bits, NF4 and FP4: the base of most QLoRA adapters.

``W = quant_map[code] · absmax[block]`` over the flattened weight, whatever its rows are: a block
goes on in the next row, and the last one may be short. Two codes lie in a byte, the first in its
high bits. What is left, a shape above all, is JSON in a tensor of bytes. The scales may be codes
themselves (double quantisation): ``absmax = nested_quant_map[code] · nested_absmax + offset``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.lookup import look_up, multiply_groups
from loratool.codecs.parts import scales
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES, dtype_named
from loratool.files.json import parse_json
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4"]}

STATE: Final = "quant_state.bitsandbytes__"
LEAVES: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
TYPES: Final = ("nf4", "fp4")
STORAGE: Final = ("U8", "I8", "BF16", "F16", "F32")
"""What the same bytes may be declared as, so that they are cut as other weights are (FSDP)."""
LONGEST: Final = 1 << 14
"""No description has more bytes."""


class _FourBits:
    """``codes``, ``absmax``, ``quant_map``, ``state``, and two more where scales are nested."""

    name: Final = "bitsandbytes-4bit"
    methods: Final = ("bitsandbytes",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; the weight may be any parameter, of a stack of experts too."""
        found = {}
        for name in _weights(tensors):
            state, parts = _parts(name, tensors)
            settings = _settings(name, state, parts)
            shape = settings.pop("shape")
            width = shape[-1] if len(shape) > 2 else 0
            dtype = said.logical_dtype(settings.pop("dtype"))
            spec = TensorSpec(name, dtype, shape)
            found[name.removesuffix(".weight")] = CodedTensor(CODEC, parts, spec, settings, width)
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
        first, last = start * coded.width, stop * coded.width
        if first == last:
            return np.empty((stop - start, coded.width), kind)
        data = _bytes(coded.parts["codes"], first // 2, -(-last // 2), parts)
        numbers = look_up(data, _map(coded.parts["quant_map"], parts), kind, high_first=True)
        values = numbers[first % 2 :][: last - first]
        size = coded.settings["blocksize"]
        factors = _absmax(coded, first // size, -(-last // size), parts)
        multiply_groups(values, factors.astype(kind, copy=False), size, first % size)
        return values.reshape(stop - start, coded.width)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(
            coded.spec.name,
            "is not written in bitsandbytes' 4 bits again: most of an update would be rounded away",
            hint="merge to 16 bits with --quantized dequantize; load_in_4bit quantises as it loads",
        )


def _weights(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return the names of the weights that a map or a description lies beside."""
    names: dict[str, None] = {}
    for name in tensors:
        weight, found, kind = name.rpartition(f".{STATE}")
        if found and kind in TYPES:
            names[weight] = None
        elif name.endswith(".quant_map"):
            names[name.removesuffix(".quant_map")] = None
    return list(names)


def _parts(
    name: str, tensors: Mapping[str, StoredTensor]
) -> tuple[StoredTensor, dict[str, StoredTensor]]:
    """Return the description of a weight, and all of its tensors.

    Raises:
        FileFormatError: One that each has is missing, or there are two descriptions.
    """
    states = [t for kind in TYPES if (t := tensors.get(f"{name}.{STATE}{kind}")) is not None]
    if len(states) != 1:
        raise FileFormatError(
            name,
            f"has {len(states)} descriptions of its 4-bit codes ('{STATE}nf4', '…fp4'), "
            "expected one",
        )
    parts = {"codes": name, **{leaf: f"{name}.{leaf}" for leaf in LEAVES}}
    found = {role: tensors[key] for role, key in parts.items() if key in tensors}
    for role in ("codes", "absmax", "quant_map"):
        if role not in found:
            raise FileFormatError(
                parts[role],
                "is missing, though other tensors of these 4-bit codes are there",
                hint="download the model again, or the shard that is missing",
            )
    return states[0], found | {"state": states[0]}


def _settings(name: str, state: StoredTensor, parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return what a description says, once all of its tensors are as it says.

    Raises:
        FileFormatError: It is damaged, or they are not.
    """
    if state.spec.dtype not in ("U8", "I8") or state.spec.nbytes > LONGEST:
        raise FileFormatError(
            state.spec.name,
            f"is {state.spec.dtype} {list(state.spec.shape)}, expected a short text in bytes",
        )
    said = parse_json(read_bytes(state), where=state.spec.name)
    if not isinstance(said, dict):
        raise FileFormatError(state.spec.name, "is no JSON object")
    kind = state.spec.name.rpartition("__")[2]
    if said.get("quant_type", kind) != kind:
        raise FileFormatError(
            state.spec.name, f"says {said['quant_type']!r:.20} of itself, named {kind!r}"
        )
    where, shape = state.spec.name, said.get("shape")
    if (
        not isinstance(shape, list)
        or not shape
        or not all(type(n) is int and 0 < n < 1 << 48 for n in shape)
    ):
        raise FileFormatError(where, f"has the shape {shape!r:.60}, which is none")
    size = _positive(said.get("blocksize"), "blocksize", where)
    count = math.prod(shape)
    blocks = -(-count // size)
    _check_codes(parts["codes"], shape)
    _check(parts["quant_map"], 16)
    dtype = dtype_named(str(said.get("dtype")))
    settings = {
        "format": kind,
        "blocksize": size,
        "shape": tuple(shape),
        "dtype": dtype.name if dtype is not None else None,
    }
    nested = [role for role in LEAVES if role.startswith("nested") and role in parts]
    told = [key for key in said if key.startswith("nested")]
    if not nested and not told:
        _check(parts["absmax"], blocks)
        return settings
    if len(nested) < 2 or not {"nested_blocksize", "nested_offset"} <= set(told):
        raise FileFormatError(
            name,
            f"has scales that are codes, of which there are {', '.join(nested + told)}; expected "
            "nested_absmax and nested_quant_map, and nested_blocksize and nested_offset in the "
            "description",
        )
    _check(parts["absmax"], blocks, ("U8",))
    step = _positive(said["nested_blocksize"], "nested_blocksize", where)
    _check(parts["nested_absmax"], -(-blocks // step))
    _check(parts["nested_quant_map"], 256)
    offset = said["nested_offset"]
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise FileFormatError(where, f"has the nested_offset {offset!r:.20}, expected a number")
    return settings | {"nested_blocksize": step, "nested_offset": float(offset)}


def _positive(value: Any, key: str, where: str) -> int:
    if type(value) is not int or not 0 < value < 1 << 48:
        raise FileFormatError(where, f"has the {key} {value!r:.20}, expected a positive number")
    return value


def _check_codes(codes: StoredTensor, shape: list[int]) -> None:
    spec = codes.spec
    if spec.dtype not in STORAGE or not spec.shape:
        raise FileFormatError(
            spec.name, f"is {spec.dtype} {list(spec.shape)}, which holds no 4-bit codes"
        )
    unit = DTYPES[spec.dtype].bits // 8
    wanted = -(-math.prod(shape) // (2 * unit)) * unit
    if spec.nbytes != wanted:
        raise FileFormatError(
            spec.name,
            f"has {spec.nbytes} bytes of codes, expected {wanted} for a weight {shape}",
        )


def _check(
    part: StoredTensor, count: int, dtypes: tuple[str, ...] = ("F32", "F16", "BF16", "F64")
) -> None:
    """Refuse a part that is no row or column of ``count`` numbers."""
    spec = part.spec
    if spec.dtype not in dtypes or spec.elements != count or spec.shape[:1] != (count,):
        raise FileFormatError(
            spec.name,
            f"is {spec.dtype} {list(spec.shape)}, expected {count} of {' or '.join(dtypes)}",
        )


def _bytes(codes: StoredTensor, first: int, last: int, parts: Parts) -> NDArray[np.uint8]:
    """Return some of the bytes that codes lie in, whatever they are declared as."""
    row = codes.spec.nbytes // codes.spec.shape[0]
    start, stop = first // row, -(-last // row)
    data = np.frombuffer(parts.rows(codes, start, stop), np.uint8)
    return data[first - start * row :][: last - first]


def _map(part: StoredTensor, parts: Parts) -> tuple[float, ...]:
    """Return what each of the 16 codes stands for."""
    return tuple(scales(part, parts.rows(part, 0, 16), (16,)).tolist())


def _absmax(coded: CodedTensor, first: int, last: int, parts: Parts) -> NDArray[np.float64]:
    """Return the scales of some blocks."""
    part = coded.parts["absmax"]
    data = parts.rows(part, first, last)
    step = coded.settings.get("nested_blocksize")
    if step is None:
        return scales(part, data, (last - first,))
    nested = coded.parts["nested_quant_map"]
    values = scales(nested, parts.rows(nested, 0, 256), (256,))[np.frombuffer(data, np.uint8)]
    outer = coded.parts["nested_absmax"]
    start, stop = first // step, -(-last // step)
    factors = scales(outer, parts.rows(outer, start, stop), (stop - start,))
    multiply_groups(values, factors, step, first % step)
    values += coded.settings["nested_offset"]
    return values


CODEC: Final[Codec] = _FourBits()
