"""NVFP4: FP4 in blocks of 16 inputs with a scale in FP8 each, and one scale for the whole weight.

modelopt's ``weight_scale_2`` multiplies, ``W = FP4[q] · weight_scale · weight_scale_2``;
compressed-tensors' ``weight_global_scale`` divides. Scales of blocks lie as the blocks do, which in
ComfyUI's files they do not: those say what they are, and are not read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Parts
from loratool.codecs.fp4 import LARGEST, in_bytes, nearest
from loratool.codecs.lookup import E2M1, look_up
from loratool.codecs.numbers import decode, encode, number
from loratool.codecs.numbers.number import Codes
from loratool.codecs.parts import beside, needed, refuse_rotated, scales
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"suffixes": [".weight_scale_2", ".weight_packed", ".weight_scale"]}

BLOCK: Final = 16
FACTORS: Final = {"weight": "weight_scale_2", "weight_packed": "weight_global_scale"}
"""What scales the whole weight, by what the codes are called."""
SCALES: Final = ("F32", "BF16", "F16")
PEAK: Final = 448.0
"""The largest scale of a block."""
SMALLEST: Final = 2.0**-9
OTHERS: Final = ("input_scale", "input_global_scale", "output_scale")
COMFY: Final = "_quantization_metadata"
TILE: Final = (128, 64)
"""Rows and columns of which both layouts of scales have a whole number."""
FUSED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("to_q", "to_k", "to_v"),
)
"""Modules that are one product for whoever runs the model, with one scale."""
HINT: Final = "merge on the 16-bit original"


class _Nvfp4:
    """Codes ``(out, in / 2)``, scales ``(out, in / 16)``, and a single number."""

    name: Final = "nvfp4"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`."""
        found = {}
        for name, codes in tensors.items():
            module, _, leaf = name.rpartition(".")
            if codes.spec.dtype != "U8" or leaf not in FACTORS:
                continue
            if leaf == "weight" and (COMFY in said.metadata or f"{module}.comfy_quant" in tensors):
                continue
            scale = tensors.get(f"{module}.weight_scale")
            is_whole = f"{module}.{FACTORS[leaf]}" in tensors
            if is_whole if scale is None else scale.spec.dtype == "F8_E4M3":
                found[module] = _coded(tensors, module, leaf, said)
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
        leaf = coded.settings["leaf"]
        codes, scale = coded.parts[leaf], coded.parts["weight_scale"]
        whole = coded.parts[FACTORS[leaf]]
        one = float(scales(whole, parts.rows(whole, 0, 1), (1,))[0])
        blocks = scales(
            scale, parts.rows(scale, start, stop), (stop - start, scale.spec.shape[1]), kind
        )
        data = np.frombuffer(parts.rows(codes, start, stop), np.uint8)
        values = look_up(data, E2M1, kind).reshape(*blocks.shape, BLOCK)
        if leaf == "weight":
            values *= blocks[:, :, None]
            values *= np.asarray(one, kind)
        else:
            _check_divisor(whole, one)
            factors = (blocks.astype(np.float64) / one).astype(kind)
            values *= factors[:, :, None]
        return values.reshape(stop - start, coded.width)

    def encoder(self, coded: CodedTensor) -> _Encoder:
        """See :class:`Codec`."""
        return _Encoder(coded)


class _Encoder:
    """The largest number becomes the largest product; each block's the largest code."""

    needs_largest: Final = True
    step: Final = 1

    def __init__(self, coded: CodedTensor) -> None:
        self.coded = coded
        self.leaf: str = coded.settings["leaf"]
        self.whole = coded.parts[FACTORS[self.leaf]]
        siblings = coded.settings["siblings"]
        data = read_bytes(self.whole) if siblings else b""
        # A scale that several modules share stays, as long as it is large enough.
        self.kept = data if any(read_bytes(part) == data for part in siblings) else None

    @property
    def roles(self) -> tuple[str, ...]:
        """See :class:`Encoder`."""
        return (self.leaf, "weight_scale", FACTORS[self.leaf])

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`."""
        if largest is None or not math.isfinite(largest) or not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        factor, data = self._factor(largest)
        blocks = values.reshape(stop - start, self.coded.width // BLOCK, BLOCK).astype(np.float64)
        peaks = np.abs(blocks).max(axis=2)
        wanted = np.where(peaks > 0, np.clip(peaks / LARGEST / factor, SMALLEST, PEAK), 1.0)
        scale = encode(wanted, "F8_E4M3")
        blocks /= (decode(scale, "F8_E4M3", scale.shape) * factor)[:, :, None]
        packed = in_bytes(nearest(blocks).reshape(values.shape))
        return dict(zip(self.roles, ((start, packed), (start, scale), (0, data)), strict=True))

    def _factor(self, largest: float) -> tuple[float, Codes]:
        """Return what products are multiplied by, and how it is stored."""
        dtype, divides = self.whole.spec.dtype, self.leaf != "weight"
        if self.kept is not None:
            data = np.frombuffer(self.kept, number(dtype).code)
            kept = float(decode(data, dtype, (1,))[0])
            factor = 1 / kept if divides and kept > 0 else kept
            if 0 < factor < math.inf and largest <= LARGEST * PEAK * factor:
                return factor, data
        wanted = largest / (LARGEST * PEAK) if largest > 0 else 1.0
        data = encode(np.array([1 / wanted if divides else wanted]), dtype)
        stored = float(decode(data, dtype, (1,))[0])
        return (1 / stored if divides else stored), data


def _coded(
    tensors: Mapping[str, StoredTensor], module: str, leaf: str, said: Description
) -> CodedTensor:
    """Return a module's weight.

    Raises:
        FileFormatError: Its tensors do not fit together.
        UnsupportedError: Its inputs are scaled, or nothing tells how its scales lie.
    """
    refuse_rotated(module, said)
    codes, scale = tensors[f"{module}.{leaf}"], needed(tensors, module, "weight_scale", "FP4 codes")
    whole = needed(tensors, module, FACTORS[leaf], "FP4 codes")
    if f"{module}.pre_quant_scale" in tensors:
        raise UnsupportedError(
            module, "has a pre_quant_scale: its inputs are scaled before its weight", hint=HINT
        )
    if len(codes.spec.shape) != 2:
        raise UnsupportedError(
            codes.spec.name, f"is a stack of FP4 codes, {list(codes.spec.shape)}", hint=HINT
        )
    out, packed = codes.spec.shape
    into = 2 * packed
    is_scale = scale.spec.dtype == "F8_E4M3" and scale.spec.shape == (out, into // BLOCK)
    if not is_scale or into % BLOCK:
        raise FileFormatError(
            scale.spec.name,
            f"is {scale.spec.dtype} of shape {list(scale.spec.shape)}, expected F8_E4M3 of "
            f"{[out, into // BLOCK]}: one for each {BLOCK} inputs of a weight {[out, into]}",
        )
    if whole.spec.dtype not in SCALES or whole.spec.elements != 1:
        raise FileFormatError(
            whole.spec.name,
            f"is {whole.spec.dtype} of shape {list(whole.spec.shape)}, expected one float",
        )
    is_either = not out % TILE[0] and not into % TILE[1]
    if leaf == "weight" and is_either and not said.quantization:
        raise UnsupportedError(
            module,
            "is NVFP4, and nothing says whether its scales lie in modelopt's order or in ComfyUI's",
            hint="if it is modelopt's, let config.json say so: "
            '"quantization_config": {"quant_method": "modelopt"}',
        )
    return CodedTensor(
        CODEC,
        {leaf: codes, "weight_scale": scale, FACTORS[leaf]: whole}
        | beside(tensors, module, OTHERS),
        TensorSpec(f"{module}.weight", said.logical_dtype(), (out, into)),
        {"leaf": leaf, "siblings": _siblings(tensors, module, whole)},
    )


def _siblings(
    tensors: Mapping[str, StoredTensor], module: str, whole: StoredTensor
) -> tuple[StoredTensor, ...]:
    """Return the scales of those that are fused with a module, like its own."""
    parent, _, own = module.rpartition(".")
    leaf = whole.spec.name.rpartition(".")[2]
    names = (name for group in FUSED if own in group for name in group if name != own)
    found = (tensors.get(f"{parent}.{name}.{leaf}") for name in names)
    return tuple(part for part in found if part is not None and part.spec.dtype == whole.spec.dtype)


def _check_divisor(whole: StoredTensor, value: float) -> None:
    """Refuse to divide by zero.

    Raises:
        FileFormatError: That would be.
    """
    if not value:
        raise FileFormatError(
            whole.spec.name,
            "is 0, and the weight would be divided by it",
            hint="the file is damaged: download or quantise it again",
        )


CODEC: Final[Codec] = _Nvfp4()
