"""Bases whose weights are quantised in a way that nothing here reads, refused by name."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Final

from loratool.base.model import Model
from loratool.codecs.codec import CodedTensor
from loratool.errors import BaseModelError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor

__all__ = ["CODE", "UNREAD", "Unread", "check_base"]

CODE: Final = "LT027"
"""The finding that such a base is."""
HINT: Final = "merge on the 16-bit original; a quantised base would have to be rounded again"


@dataclass(frozen=True, slots=True)
class Unread:
    """A way to quantise weights that is known and not read.

    Attributes:
        name: What people call it.
        marks: Endings of tensor names that only it has.
    """

    name: str
    marks: tuple[str, ...]


UNREAD: Final = (
    Unread("bitsandbytes, 4 bits", (".absmax", ".quant_map", "__nf4", "__fp4")),
    Unread("bitsandbytes, 8 bits", (".SCB",)),
    Unread("GPTQ or AWQ", (".qweight", ".qzeros", ".g_idx")),
    Unread("compressed-tensors", (".weight_packed",)),
    Unread("scaled codes", (".weight_scale", ".weight_scale_inv")),
    Unread("MXFP4", ("_proj_blocks", "_proj_scales")),
)
MARKS: Final = tuple(mark for kind in UNREAD for mark in kind.marks)


def check_base(model: Model) -> list[str]:
    """Refuse a base with codes that no codec reads; return notes on one that merely says so.

    Raises:
        BaseModelError: There are such codes, or the factors of an adapter.
    """
    if model.factors:
        raise BaseModelError(
            model.path,
            f"holds {len(model.factors)} factors of an adapter beside its weights, such as "
            f"{model.factors[0]!r}",
            hint=f"fold them first: loratool merge {shlex.quote(str(model.path))} "
            f"{shlex.quote(str(model.path))} -o OUT",
        )
    told = model.config.quantization
    method = (told.get("quant_method") or "unknown") if told is not None else None
    is_coded = False
    for name, tensor in model.tensors.items():
        if isinstance(tensor, CodedTensor):
            is_coded = True
            continue
        if _is_of_mlx(name, model):
            raise BaseModelError(
                model.path, f"is quantised (MLX): {name!r} scales codes of U32", hint=HINT
            )
        if name.endswith(MARKS) or ".quant_state." in name:
            kind = next((kind.name for kind in UNREAD if name.endswith(kind.marks)), "by its names")
            raise BaseModelError(
                model.path, f"is quantised ({method or kind}): it holds {name!r}", hint=HINT
            )
        dtype = DTYPES[tensor.spec.dtype]
        if dtype.is_float and dtype.bits < 16:
            raise BaseModelError(
                model.path, f"is quantised: tensor {name!r} is {tensor.spec.dtype}", hint=HINT
            )
    if method and not is_coded:
        return [f"the base's config.json names the quantisation {method!r}, its weights are not"]
    return []


def _is_of_mlx(name: str, model: Model) -> bool:
    """Whether a tensor is the scales of a weight that MLX has packed into words."""
    module, _, leaf = name.rpartition(".")
    weight = model.tensors.get(f"{module}.weight") if leaf == "scales" else None
    return isinstance(weight, StoredTensor) and weight.spec.dtype == "U32"
