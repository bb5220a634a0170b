"""MXFP4: FP4 in blocks of 32 with a power of two each, ``FP4[q] · 2^(scale - 127)``.

GPT-OSS has stacks of experts as ``P_blocks`` ``(experts, out, in / 32, 16)`` and ``P_scales``. The
parameter ``P`` that models and adapters name is the stack turned, ``(experts, in, out)``.
compressed-tensors' "mxfp4-pack-quantized" has ``weight_packed`` and ``weight_scale``, not turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Parts
from loratool.codecs.lookup import E2M1, look_up
from loratool.codecs.microscaled import BLOCK, STEP, encode_into
from loratool.codecs.numbers.number import Codes
from loratool.codecs.parts import beside, needed, refuse_rotated, scales
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": ["_blocks", ".weight_packed"], "methods": ["mxfp4"]}

BYTES: Final = BLOCK // 2
SCALES: Final = ("U8", "F8_E8M0")
SIX_BITS: Final = 6
OTHERS: Final = ("input_scale", "input_global_scale", "output_scale")
HINT: Final = "merge on the 16-bit original"


class _Mxfp4:
    """Codes and scales: of a matrix, or of a stack of experts."""

    name: Final = "mxfp4"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; ``P`` itself is the module of a stack."""
        found = {}
        for name, codes in tensors.items():
            if codes.spec.dtype != "U8":
                continue
            parameter = name.removesuffix("_blocks")
            if parameter != name:
                is_alone = f"{parameter}_scales" not in tensors
                if is_alone and codes.spec.shape[3:] != (BYTES,):
                    continue
                found[parameter] = _stack(tensors, parameter, codes, said)
            if name.endswith(".weight_packed"):
                module = name.removesuffix(".weight_packed")
                scale = tensors.get(f"{module}.weight_scale")
                if scale is None and f"{module}.weight_global_scale" in tensors:
                    continue
                if scale is None or scale.spec.dtype in SCALES:
                    found[module] = _matrix(tensors, module, codes, said)
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
        codes, scale = coded.parts["codes"], coded.parts["scales"]
        if len(coded.spec.shape) == 3:
            return _decode_stack(coded, start, stop, parts, kind)
        shape = (stop - start, scale.spec.shape[1])
        factors = scales(scale, parts.rows(scale, start, stop), shape, kind, dtype="F8_E8M0")
        data = np.frombuffer(parts.rows(codes, start, stop), np.uint8)
        values = look_up(data, E2M1, kind).reshape(*shape, BLOCK)
        values *= factors[:, :, None]
        return values.reshape(stop - start, coded.width)

    def encoder(self, coded: CodedTensor) -> _Encoder:
        """See :class:`Codec`."""
        return _Encoder(coded)


class _Encoder:
    """The scale of a block is one of two powers of two: whichever is nearer to its numbers."""

    roles: Final = ("codes", "scales")
    needs_largest: Final = False

    def __init__(self, coded: CodedTensor) -> None:
        self.coded = coded
        self.is_stack = len(coded.spec.shape) == 3
        self.step: int = coded.spec.shape[1] if self.is_stack else 1

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`."""
        if start % self.step or stop % self.step:
            raise ValueError(f"rows {start} to {stop} are no experts of {self.step}")
        if not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        codes, scale = self.coded.parts["codes"], self.coded.parts["scales"]
        first, last = start // self.step, stop // self.step
        packed = np.empty((last - first, *codes.spec.shape[1:]), np.uint8)
        powers = np.empty((last - first, *scale.spec.shape[1:]), np.uint8)
        if self.is_stack:
            for expert in range(last - first):
                turned = values[expert * self.step : (expert + 1) * self.step].T
                encode_into(turned, packed[expert], powers[expert])
        else:
            encode_into(values, packed, powers)
        return {"codes": (first, packed), "scales": (first, powers)}


def _decode_stack(
    coded: CodedTensor, start: int, stop: int, parts: Parts, kind: DTypeLike
) -> NDArray[Any]:
    """Return rows of a stack of experts, one below the other, each turned."""
    _, into, out = coded.spec.shape
    values = np.empty((stop - start, out), kind)
    count = max(1, STEP // max(1, out) // BLOCK) * BLOCK
    row = start
    while row < stop:
        expert, first = divmod(row, into)
        last = min(into, first + stop - row, first // BLOCK * BLOCK + count)
        _decode_expert(coded, expert, (first, last), parts, values[row - start :][: last - first])
        row += last - first
    return values


def _decode_expert(
    coded: CodedTensor, expert: int, rows: tuple[int, int], parts: Parts, values: NDArray[Any]
) -> None:
    """Write the inputs ``rows`` of one expert to ``values``, ``(rows, out)``."""
    codes, scale = coded.parts["codes"], coded.parts["scales"]
    _, into, out = coded.spec.shape
    begin, end = rows[0] // BLOCK, -(-rows[1] // BLOCK)
    powers = np.frombuffer(parts.rows(scale, expert, expert + 1), np.uint8).reshape(
        out, into // BLOCK
    )
    powers = np.ascontiguousarray(powers[:, begin:end].T)
    factors = scales(scale, powers, powers.shape, values.dtype, dtype="F8_E8M0")
    data = np.frombuffer(parts.rows(codes, expert, expert + 1), np.uint8).reshape(out, into // 2)
    # Bytes are turned, half a one for each number; each then makes two rows.
    turned = np.ascontiguousarray(data[:, begin * BYTES : end * BYTES].T)
    table = np.array(E2M1, values.dtype)
    for parity, nibbles in enumerate((turned & 15, turned >> 4)):
        first = (rows[0] + 1 - parity) // 2 - begin * BYTES
        last = (rows[1] + 1 - parity) // 2 - begin * BYTES
        which = np.arange(first, last) // BYTES
        made = table.take(nibbles[first:last], mode="clip")
        made *= factors[which]
        values[(parity - rows[0]) % 2 :: 2] = made


def _stack(
    tensors: Mapping[str, StoredTensor], parameter: str, codes: StoredTensor, said: Description
) -> CodedTensor:
    """Return a stack of experts.

    Raises:
        FileFormatError: Its tensors do not fit together.
    """
    scale = tensors.get(f"{parameter}_scales")
    if scale is None:
        raise FileFormatError(
            parameter,
            f"has codes of MXFP4, but no '{parameter.rpartition('.')[2]}_scales' beside them",
            hint="download the model again, or the shard that is missing",
        )
    shape = scale.spec.shape
    expected = ((*shape, BYTES), (*shape[:-1], shape[-1] * BYTES) if shape else ())
    if len(shape) != 3 or scale.spec.dtype not in SCALES or codes.spec.shape not in expected:
        raise FileFormatError(
            parameter,
            f"has codes {list(codes.spec.shape)} and {scale.spec.dtype} scales {list(shape)}, "
            "expected U8 of [experts, out, in / 32, 16] and [experts, out, in / 32]",
        )
    experts, out, blocks = shape
    spec = TensorSpec(parameter, said.logical_dtype(), (experts, blocks * BLOCK, out))
    return CodedTensor(CODEC, {"codes": codes, "scales": scale}, spec, columns=out)


def _matrix(
    tensors: Mapping[str, StoredTensor], module: str, codes: StoredTensor, said: Description
) -> CodedTensor:
    """Return the weight of a module.

    Raises:
        FileFormatError: Its tensors do not fit together.
        UnsupportedError: Its codes have six bits, or it is no matrix.
    """
    refuse_rotated(module, said)
    scale = needed(tensors, module, "weight_scale", "codes of FP4")
    if len(codes.spec.shape) != 2:
        raise UnsupportedError(
            codes.spec.name, f"is a stack of FP4 codes, {list(codes.spec.shape)}", hint=HINT
        )
    out, packed = codes.spec.shape
    if packed % BYTES or scale.spec.shape != (out, packed // BYTES):
        if scale.spec.shape == (out, 8 * packed // SIX_BITS // BLOCK):
            raise UnsupportedError(module, "has codes of six bits (MXFP6)", hint=HINT)
        raise FileFormatError(
            scale.spec.name,
            f"has shape {list(scale.spec.shape)}, expected {[out, packed // BYTES]}: one for each "
            f"{BLOCK} inputs of a weight {[out, 2 * packed]}",
        )
    return CodedTensor(
        CODEC,
        {"codes": codes, "scales": scale} | beside(tensors, module, OTHERS),
        TensorSpec(f"{module}.weight", said.logical_dtype(), (out, 2 * packed)),
    )


CODEC: Final[Codec] = _Mxfp4()
