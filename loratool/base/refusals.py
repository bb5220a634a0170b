"""Bases whose weights are quantised in a way that nothing here reads, refused by name."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Final

from loratool.base.model import Model
from loratool.codecs.codec import CodedTensor
from loratool.errors import BaseModelError, FileFormatError, UnsupportedError
from loratool.files.dtypes import DTYPES

__all__ = ["CODE", "UNREAD", "Unread", "check_base"]

CODE: Final = "LT027"
"""The finding that such a base is."""
HINT: Final = "merge on the 16-bit original, then quantise the result again"


@dataclass(frozen=True, slots=True)
class Unread:
    """A way to quantise weights that is known and not read, or a part of one that is.

    Attributes:
        name: What people call it.
        marks: Endings of tensor names that only it has.
        methods: Values of ``quant_method``.
    """

    name: str
    marks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


UNREAD: Final = (
    Unread("AQLM", (".codebooks",), ("aqlm",)),
    Unread("BitNet", (), ("bitnet",)),
    Unread("EETQ", (".weight_scales",), ("eetq",)),
    Unread("FP-Quant", (".dqweight",), ("fp_quant",)),
    Unread("HIGGS", (".tables2",), ("higgs",)),
    Unread("Quark", (), ("quark",)),
    Unread("QuIP#", (".Qidxs",), ("quip",)),
    Unread("SINQ", (), ("sinq",)),
    Unread("SpQR", (".dense_weights", ".in_perm"), ("spqr",)),
    Unread("VPTQ", (".centroids.weight", ".vector_quant"), ("vptq",)),
    Unread("bitsandbytes, 4 bits", (".absmax", ".quant_map", "__nf4", "__fp4")),
    Unread("bitsandbytes, 8 bits", (".SCB",)),
    Unread("GPTQ or AWQ", (".qweight", ".qzeros", ".g_idx")),
    Unread("compressed-tensors", (".weight_packed",)),
    Unread("scaled codes", (".weight_scale", ".weight_scale_inv", ".scale_weight")),
    Unread("scaled experts", ("_weight_scale", "_weight_scale_2", "_weight_scale_inv")),
    Unread("MXFP4", ("_proj_blocks", "_proj_scales", "_weight.blocks", "_weight.scales")),
)
SCALES: Final = (".weight_scale", ".weight_scale_inv", ".scale_weight", ".weight_scale_2")
"""Endings of the names of scales, which stand beside a weight."""
MARKS: Final = tuple(mark for kind in UNREAD for mark in kind.marks)


def check_base(model: Model) -> list[str]:
    """Refuse a base with codes that no codec reads; return notes on one that merely says so.

    Raises:
        BaseModelError: It holds the factors of an adapter.
        FileFormatError: There are scales of weights that are missing.
        UnsupportedError: There are such codes.
    """
    if model.factors and not _has_weights(model):
        raise BaseModelError(
            model.path,
            "is an adapter, not a model",
            hint="give the model that it was trained on; a BASE comes before the adapters",
        )
    if model.factors:
        raise BaseModelError(
            model.path,
            f"holds {len(model.factors)} factors of an adapter beside its weights, such as "
            f"{model.factors[0]!r}",
            hint=f"fold them first: loratool merge {shlex.quote(str(model.path))} "
            f"{shlex.quote(str(model.path))} -o OUT",
        )
    told = model.config.quantization
    method = str(told.get("quant_method") or "unknown") if told is not None else None
    known = next((kind for kind in UNREAD if method in kind.methods), None)
    is_coded = False
    for name, tensor in model.tensors.items():
        if isinstance(tensor, CodedTensor):
            is_coded = True
            continue
        if name.endswith(SCALES) and not _has_weight(name, model):
            raise FileFormatError(
                name,
                "is the scale of codes that are not there",
                hint="download the model again, or the shard that is missing",
            )
        if name.endswith(MARKS) or ".quant_state." in name:
            kind = next((kind.name for kind in UNREAD if name.endswith(kind.marks)), "by its names")
            raise UnsupportedError(
                model.path,
                f"is quantised ({method or kind}): it holds {name!r}",
                hint=HINT,
                code=CODE,
            )
        dtype, is_matrix = DTYPES[tensor.spec.dtype], len(tensor.spec.shape) > 1
        is_weight = is_matrix and name.endswith(".weight")
        if (dtype.is_float and dtype.bits < 16) or (is_weight and not dtype.is_float):
            called = f" ({known.name if known else method})" if method else ""
            raise UnsupportedError(
                model.path,
                f"is quantised{called}: tensor {name!r} is {dtype.name}",
                hint=HINT,
                code=CODE,
            )
    if method and not is_coded:
        return [f"the base's config.json names the quantisation {method!r}, its weights are not"]
    return []


def _has_weights(model: Model) -> bool:
    """Whether a model with the factors of an adapter in it has anything beside them."""
    factors = set(model.factors)
    return any(name.endswith((".weight", ".bias")) and name not in factors for name in model.raw)


def _has_weight(scale: str, model: Model) -> bool:
    """Whether the module of a scale has a weight, or codes under another name."""
    module = scale.rpartition(".")[0]
    return any(f"{module}.{leaf}" in model.raw for leaf in ("weight", "weight_packed"))
