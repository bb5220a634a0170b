"""MLX's quantised weights: words of 32 bits, with a scale for each group along a row.

Affine ones have a bias for each group, too: ``W = code · scale + bias``, codes of 1 to 8 bits being
a stream of bits through each row, the lowest first. The other modes have no biases and scales of 8
bits: MXFP4 and MXFP8 powers of two for 32 weights each, NVFP4 floats for 16. Bits and groups stand
in ``config.json`` under ``quantization``, those of single modules by their paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.lookup import E2M1, look_up
from loratool.codecs.numbers import decode
from loratool.codecs.parts import needed, scales
from loratool.codecs.stacks import stacked_rows
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"dtypes": ["U32"], "suffixes": [".biases"]}

BITS: Final = (1, 2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)
FLOATS: Final = ("F32", "F16", "BF16")
AFFINE: Final = "affine"
MODES: Final = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
"""Group and bits of what has no biases; each makes another proportion of codes to scales."""
SCALES: Final = {"mxfp4": "F8_E8M0", "mxfp8": "F8_E8M0", "nvfp4": "F8_E4M3"}
SAY: Final = "say which in config.json: quantization.bits and quantization.group_size"


class _Mlx:
    """``weight`` U32 ``(…, out, in · bits / 32)``, ``scales``, ``biases`` ``(…, out, groups)``."""

    name: Final = "mlx"
    methods: Final = ("mlx",)

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`; weights may be stacks of matrices."""
        found = {}
        for name, weight in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "biases" and f"{module}.scales" in tensors:
                is_other = f"{module}.qweight" in tensors
                if not is_other:
                    needed(tensors, module, "weight", "scales and biases of MLX's codes")
            if leaf != "weight" or weight.spec.dtype != "U32" or len(weight.spec.shape) < 2:
                continue
            parts = _parts(module, weight, tensors)
            mode, group, bits = _layout(module, parts, said)
            shape = (*weight.spec.shape[:-1], parts["scales"].spec.shape[-1] * group)
            scale = parts["scales"].spec.dtype
            found[module] = CodedTensor(
                CODEC,
                parts,
                TensorSpec(name, said.logical_dtype(scale), shape),
                {
                    "format": mode if mode != AFFINE else f"{AFFINE}-{bits}bit",
                    "mode": mode,
                    "group_size": group,
                    "bits": bits,
                },
                shape[-1] if len(shape) > 2 else 0,
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
        mode, bits = coded.settings["mode"], coded.settings["bits"]
        data = stacked_rows(parts, coded.parts["weight"], start, stop)
        grid = (stop - start, coded.parts["scales"].spec.shape[-1])
        factors = self._numbers(coded, "scales", start, stop, parts, kind)
        if mode == "mxfp8":
            values = decode(data, "F8_E4M3", data.shape, kind)
        else:
            codes = E2M1 if mode != AFFINE else tuple(map(float, range(1 << bits)))
            values = look_up(data, codes, kind)
        groups = values.reshape(*grid, coded.settings["group_size"])
        groups *= factors[..., None]
        if mode == AFFINE:
            groups += self._numbers(coded, "biases", start, stop, parts, kind)[..., None]
        return values.reshape(stop - start, coded.width)

    def _numbers(
        self,
        coded: CodedTensor,
        role: str,
        start: int,
        stop: int,
        parts: Parts,
        kind: DTypeLike,
    ) -> NDArray[Any]:
        part = coded.parts[role]
        grid = (stop - start, part.spec.shape[-1])
        dtype = SCALES.get(coded.settings["mode"])
        return scales(part, stacked_rows(parts, part, start, stop), grid, kind, dtype=dtype)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        raise UnsupportedError(
            coded.spec.name,
            "is not written in MLX's codes again: most of an update would be rounded away",
            hint="merge to 16 bits with --quantized dequantize, then quantise with mlx_lm.convert",
        )


def _parts(
    module: str, weight: StoredTensor, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors of a weight.

    Raises:
        FileFormatError: One is missing or of another shape, or scales are no scales.
        UnsupportedError: There is one more that nothing here knows.
    """
    found = {"weight": weight, "scales": needed(tensors, module, "scales", "MLX's codes")}
    scale = found["scales"].spec
    if scale.dtype in FLOATS:
        found["biases"] = needed(tensors, module, "biases", "MLX's codes and scales")
        bias = found["biases"].spec
        if bias.dtype not in FLOATS or bias.shape != scale.shape:
            raise FileFormatError(
                bias.name,
                f"is {bias.dtype} {list(bias.shape)}, expected floats like the scales, "
                f"{list(scale.shape)}",
            )
    elif scale.dtype != "U8":
        raise FileFormatError(scale.name, f"is {scale.dtype}, which is no scale of MLX's codes")
    elif f"{module}.biases" in tensors:
        raise FileFormatError(f"{module}.biases", "lies beside scales of U8, which have no biases")
    if scale.shape[:-1] != weight.spec.shape[:-1] or not scale.shape[-1]:
        raise FileFormatError(
            scale.name,
            f"has shape {list(scale.shape)}, expected some for each of the rows of the codes, "
            f"{list(weight.spec.shape)}",
        )
    if f"{module}.global_scale" in tensors:
        raise UnsupportedError(
            f"{module}.global_scale",
            "is a scale of a whole weight, which is not read in MLX's files",
            hint="merge on the 16-bit original",
        )
    return found


def _layout(
    module: str, parts: Mapping[str, StoredTensor], said: Description
) -> tuple[str, int, int]:
    """Return mode, group and bits: what the configuration says, or the only ones that fit.

    Raises:
        FileFormatError: What it says does not fit, or nothing tells which does.
        UnsupportedError: It names a mode that is not known.
    """
    own = said.quantization.get(module)
    told: Mapping[str, Any] = own if isinstance(own, dict) else said.quantization
    weight, scale = parts["weight"].spec, parts["scales"].spec
    words, groups = weight.shape[-1], scale.shape[-1]
    mode = told.get("mode") or (AFFINE if "biases" in parts else None)
    if mode is not None and mode not in (AFFINE, *MODES):
        raise UnsupportedError(
            module,
            f"is quantised in MLX's mode {mode!r:.20}, which is not read",
            hint="merge on the 16-bit original",
        )
    if mode is not None and (mode == AFFINE) != ("biases" in parts):
        raise FileFormatError(
            module, f"has scales of {scale.dtype}, and its mode is {mode!r} by config.json"
        )
    if mode != AFFINE:
        fitting = [
            (name, *sizes)
            for name, sizes in MODES.items()
            if mode in (None, name) and 32 * words == groups * sizes[0] * sizes[1]
        ]
        if len(fitting) == 1:
            return fitting[0]
        raise FileFormatError(
            scale.name,
            f"has shape {list(scale.shape)} for codes {list(weight.shape)}, which is not that of "
            f"{mode or 'any of ' + ', '.join(MODES)}",
        )
    bits, group = told.get("bits"), told.get("group_size")
    if group is not None and group not in GROUPS:
        raise UnsupportedError(
            module,
            f"is quantised by MLX in groups of {group!r:.10}; those of MLX have "
            f"{', '.join(map(str, GROUPS))} weights",
            hint="merge on the 16-bit original",
        )
    sizes = [
        (b, g)
        for b in (BITS if bits is None else (bits,))
        for g in (GROUPS if group is None else (group,))
        if b in BITS and type(g) is int and 32 * words == groups * g * b
    ]
    if len(sizes) == 1 and type(sizes[0][0]) is int:
        return AFFINE, sizes[0][1], sizes[0][0]
    if bits is not None and group is not None:
        raise FileFormatError(
            scale.name,
            f"has shape {list(scale.shape)} for codes {list(weight.shape)}, which is not that of "
            f"{bits!r:.10} bits in groups of {group!r:.10}, as config.json says",
        )
    raise FileFormatError(
        scale.name,
        f"has shape {list(scale.shape)} for codes {list(weight.shape)}, which "
        f"{'several' if sizes else 'no'} bits and sizes of groups make",
        hint=SAY,
    )


CODEC: Final[Codec] = _Mlx()
