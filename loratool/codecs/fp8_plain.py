"""FP8 that is merely cast: ``W = Q``, as in ``flux1-dev-fp8.safetensors``.

So it is read only where nothing speaks of scales. A weight without one among others that have
theirs is damaged. A file of several models is judged by each of them: beside a scaled backbone
there may be text encoders that are cast.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratool.codecs.codec import Codec, CodedTensor, Description, Encoder, Parts
from loratool.codecs.comfy import LEAF, Marks
from loratool.codecs.fp8 import COMPANIONS, LARGEST, WEIGHT_SCALES, scales_beside
from loratool.codecs.numbers import decode, encode
from loratool.codecs.numbers.number import Codes
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["CLAIM", "CODEC"]

CLAIM: Final = {"dtypes": ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]}

OF_AMD: Final = ("F8_E4M3FNUZ", "F8_E5M2FNUZ")
MARKERS: Final = ("scaled_fp8", LEAF)
SCALED_METHODS: Final = ("fp8", "fbgemm_fp8", "modelopt")
"""Methods that have a scale for each weight in FP8."""
MODEL: Final = re.compile(
    r"(model\.diffusion_model|diffusion_model|text_encoders\.[^.]+|conditioner\.embedders\.\d+"
    r"|cond_stage_model|first_stage_model|vae)\."
)
"""What begins the names of one model in a file of several."""
TABLE: Final = re.compile(r"(^|[._])(shared|wte|wpe|embed\w*|\w*embeddings?)\.weight$")
OTHER_SCALES: Final = ("._scale", ".absmax", ".SCB", ".scales", "_scale_2", "_global_scale")
"""Endings of names that only quantised models have, besides those of FP8."""


class _Fp8Plain:
    """One tensor: ``weight`` of any shape."""

    name: Final = "fp8-plain"

    def recognise(
        self, tensors: Mapping[str, StoredTensor], said: Description
    ) -> dict[str, CodedTensor]:
        """See :class:`Codec`."""
        found: dict[str, CodedTensor] = {}
        models = defaultdict(list)
        for name in tensors:
            models[_model_of(name)].append(name)
        marks = Marks(tensors, said)
        for names in models.values():
            bare, scaled = _sorted(names, tensors)
            is_marked = any(marks.has(name.removesuffix(".weight")) for name in names)
            is_comfy = is_marked or any(name.rpartition(".")[2] in MARKERS for name in names)
            if is_comfy and scaled:
                # ComfyUI scales linear layers alone; what else is in FP8 is cast.
                found |= _cast((n for n in bare if not _is_linear(tensors[n])), tensors, said)
                bare = [name for name in bare if _is_linear(tensors[name])]
            if not bare:
                continue
            _check(bare, scaled, tensors, said)
            if not (said.quantization or is_comfy or any(n.endswith(OTHER_SCALES) for n in names)):
                found |= _cast(bare, tensors, said)
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
        weight = coded.parts["weight"]
        data = parts.rows(weight, start, stop)
        return decode(data, weight.spec.dtype, (stop - start, coded.width), kind)

    def encoder(self, coded: CodedTensor) -> Encoder:
        """See :class:`Codec`."""
        return _Encoder(coded)


class _Encoder:
    """Every number by itself; what is too large becomes the largest."""

    roles: Final = ("weight",)
    step: Final = 1
    needs_largest: Final = False

    def __init__(self, coded: CodedTensor) -> None:
        self._spec = coded.parts["weight"].spec

    def encode(
        self, start: int, stop: int, values: NDArray[Any], largest: float | None = None
    ) -> dict[str, tuple[int, Codes]]:
        """See :class:`Encoder`."""
        if not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        limit = LARGEST[self._spec.dtype]
        codes = encode(np.clip(values, -limit, limit), self._spec.dtype)
        return {"weight": (start, codes.reshape((stop - start, *self._spec.shape[1:])))}


def _model_of(name: str) -> str:
    """Return what begins the names of the model that a tensor is of; nothing where it is alone."""
    found = MODEL.match(name)
    return found.group() if found else ""


def _sorted(names: list[str], tensors: Mapping[str, StoredTensor]) -> tuple[list[str], list[str]]:
    """Return the weights in FP8 that have no scale, and those that have one.

    Raises:
        UnsupportedError: One is in AMD's FP8, whose codes stand for other numbers.
    """
    bare: list[str] = []
    scaled: list[str] = []
    for name in names:
        spec = tensors[name].spec
        if spec.dtype in OF_AMD:
            raise UnsupportedError(
                name,
                f"is {spec.dtype}, AMD's way of FP8",
                hint="merge on the 16-bit original, or on a release in F8_E4M3",
            )
        is_beside = name.endswith("_zero_point") or _is_scale(name, tensors)
        if spec.dtype not in LARGEST or not spec.elements or is_beside:
            continue
        (scaled if scales_beside(name, tensors)[1] else bare).append(name)
    return bare, scaled


def _is_scale(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether numbers in FP8 are themselves what multiplies codes."""
    module, _, leaf = name.rpartition(".")
    if leaf in WEIGHT_SCALES and leaf != "scale":
        return True
    return leaf == "scale" and f"{module}.weight" in tensors


def _has_companion(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether something beside a weight is only there where it has a scale."""
    stem = scales_beside(name, tensors)[0]
    return any(f"{stem}{leaf}" in tensors for leaf in COMPANIONS)


def _is_linear(stored: StoredTensor) -> bool:
    """Whether this may be the weight of a linear layer, and is no table of embeddings."""
    spec = stored.spec
    return len(spec.shape) == 2 and spec.name.endswith(".weight") and not TABLE.search(spec.name)


def _check(
    bare: list[str], scaled: list[str], tensors: Mapping[str, StoredTensor], said: Description
) -> None:
    """Refuse weights without a scale where there should be one.

    Raises:
        FileFormatError: Others have theirs, or something says that they are scaled.
    """
    lonely = next((name for name in bare if _has_companion(name, tensors)), None)
    if scaled or lonely or said.method in SCALED_METHODS:
        name = lonely or bare[0]
        raise FileFormatError(
            name,
            f"is {tensors[name].spec.dtype} and has no scale beside it"
            + (f", as {scaled[0]!r} has" if scaled else ", but is said to be scaled"),
            hint="download the model again, or the shard that is missing",
        )


def _cast(
    names: Iterable[str], tensors: Mapping[str, StoredTensor], said: Description
) -> dict[str, CodedTensor]:
    """Return weights that are their codes, by their modules."""
    return {
        name.removesuffix(".weight"): CodedTensor(
            CODEC,
            {"weight": tensors[name]},
            TensorSpec(name, said.logical_dtype(), tensors[name].spec.shape),
        )
        for name in names
    }


CODEC: Final[Codec] = _Fp8Plain()
