"""Plain A and B in place of what a file stores: exactly where that exists, else the best ones.

LoHa, LoKr, CP convolutions and VeRA are low-rank matrices written in another form. What rotates
or rescales the base's weight (OFT, BOFT, (IA)³, GLoRA, DoRA) needs that weight, and a rank; so do
whole differences, but no base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Final

from loratool.adapter.model import Adapter, Kind
from loratool.adapter.slots import Slot
from loratool.adapter.variants import VARIANT_WORDS
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.ops.conversion.base import Base
from loratool.ops.conversion.parts import Part
from loratool.ops.conversion.values import Computed, Stored, Value, reshaped, scaled, widest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Approximation", "needs_base", "to_plain"]

HADA: Final = (
    Slot.HADA_W1_A,
    Slot.HADA_W1_B,
    Slot.HADA_W2_A,
    Slot.HADA_W2_B,
    Slot.HADA_T1,
    Slot.HADA_T2,
)
NEED_BASE: Final = frozenset(("dora", "oft", "boft", "ia3", "glora", "vera"))
NO_MATRIX: Final = frozenset(("norm", "bias"))
THREE_BY_THREE: Final = ("conv1", "conv2", "conv_in", "conv_out", "conv")
"""Convolutions of a U-Net whose kernel is 3 × 3; all others have 1 × 1."""
FACTOR_DTYPES: Final = ("F64", "F32", "F16", "BF16")


def needs_base(variant: str) -> bool:
    """Whether the delta of a variant depends on the base's weight, or its shape."""
    return variant in NEED_BASE


class Approximation:
    """Both factors of a dense delta, computed once and kept until both are read.

    Attributes:
        squared_norm: ``‖Δ‖_F²`` once it is computed.
        squared_error: ``‖Δ - up @ down‖_F²``.
    """

    def __init__(self, delta: Callable[[], Tensor], rank: int, seed: int) -> None:
        self._delta = delta
        self._rank = rank
        self._seed = seed
        self._lock = Lock()
        self._kept: dict[int, Tensor] = {}
        self.squared_norm = 0.0
        self.squared_error = 0.0

    def factor(self, index: int) -> Tensor:
        """Return A (0) or B (1) in float32 or float64."""
        import torch

        from loratool.math.extraction import leading_part

        with self._lock:
            if index not in self._kept:
                generator = torch.Generator().manual_seed(self._seed)
                delta = self._delta().flatten(1)
                found = leading_part(delta, self._rank, generator)
                self.squared_norm = found.squared_norm
                self.squared_error = found.squared_residual
                factors = found.factors
                self._kept = {
                    0: _padded(factors.down * factors.scale, self._rank, 0),
                    1: _padded(factors.up, self._rank, 1),
                }
            return self._kept.pop(index)


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    import torch

    missing = rank - factor.shape[axis]
    if missing <= 0:
        return factor
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis)


def to_plain(
    part: Part, adapter: Adapter, base: Base | None, rank: int | None
) -> tuple[Part, Approximation | None]:
    """Return ``part`` with A and B, and how well they stand for it where they are not exact.

    Args:
        part: Any part.
        adapter: Where it comes from.
        base: The base, where one was given.
        rank: The rank of what has to be approximated.

    Raises:
        UnsupportedError: It needs a base or a rank, or has no matrix at all.
    """
    if part.variant in ("lora", "stacked") and part.is_plain:
        return part, None
    if part.variant in NO_MATRIX:
        raise UnsupportedError(
            f"{adapter.path}: {part.module}",
            f"is {VARIANT_WORDS[part.variant]}, which no A and B express",
            hint="leave it out with --drop, which says so in the report",
        )
    if part.variant in ("loha", "lokr", "cp", "vera"):
        return _exact(part, adapter, base), None
    return _approximate(part, adapter, base, rank)


def _exact(part: Part, adapter: Adapter, base: Base | None) -> Part:
    tensors = {slot: v.tensor for slot, v in part.values.items() if isinstance(v, Stored)}
    if part.variant == "cp":
        made = _folded_mid(part, tensors)
    elif part.variant == "loha":
        made = _from_hadamard(part, tensors, base)
    elif part.variant == "lokr":
        made = _from_kronecker(part, tensors, base)
    else:
        made = _from_vera(part, tensors, adapter, base)
    if Slot.MAGNITUDE in part.values:
        raise UnsupportedError(
            f"{adapter.path}: {part.module}",
            f"is a {part.variant} with magnitudes (DoRA); its delta depends on the base's weight",
        )
    return replace(made, variant="lora")


def _folded_mid(part: Part, tensors: dict[Slot, StoredTensor]) -> Part:
    down, up, mid = (tensors[slot] for slot in (Slot.DOWN, Slot.UP, Slot.MID))
    into = (down.spec.shape[1], *mid.spec.shape[2:])

    def fold(up: Tensor, down: Tensor, mid: Tensor) -> Tensor:
        from loratool.math.exact_variants import fold_mid

        return fold_mid(up, down, mid)[1]

    shape = (mid.spec.shape[0], *into)
    folded = Computed("A folded with its core", (up, down, mid), fold, shape, down.spec.dtype)
    made = part.factored(folded, part.up, note="its core was folded into A", alpha=part.alpha)
    return replace(made, kind=Kind.CONV)


def _from_hadamard(part: Part, tensors: dict[Slot, StoredTensor], base: Base | None) -> Part:
    from loratool.math.exact_variants import hadamard_factors, hadamard_rank

    used = [tensors.get(slot) for slot in HADA]
    present = [slot for slot, tensor in zip(HADA, used, strict=True) if tensor is not None]
    if len(present) < 4:
        raise AdapterError(part.module, "lacks one of the four factors of a LoHa")

    def factors(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(present, values, strict=True))
        return hadamard_factors(*(given.get(slot) for slot in HADA))  # type: ignore[arg-type]

    shapes = [tensor.spec.shape if tensor else None for tensor in used]
    rank = hadamard_rank(*shapes)  # type: ignore[arg-type]
    core = tensors.get(Slot.HADA_T1)
    kernel = core.spec.shape[2:] if core is not None else _kernel(part, base)
    stored = [tensor for tensor in used if tensor is not None]
    return _replaced(part, stored, factors, rank, kernel, "the Hadamard product written out")


def _from_kronecker(part: Part, tensors: dict[Slot, StoredTensor], base: Base | None) -> Part:
    from loratool.math.exact_variants import kronecker_factors, kronecker_rank

    left = [s for s in (Slot.LOKR_W1, Slot.LOKR_W1_A, Slot.LOKR_W1_B) if s in tensors]
    right = [s for s in (Slot.LOKR_W2, Slot.LOKR_W2_A, Slot.LOKR_W2_B) if s in tensors]
    core = [slot for slot in (Slot.LOKR_T2,) if slot in tensors]
    if len(left) != (1 if Slot.LOKR_W1 in left else 2) or len(right) != (
        1 if Slot.LOKR_W2 in right else 2
    ):
        raise AdapterError(part.module, "lacks a factor of its LoKr, or has one too many")
    whole = tensors.get(Slot.LOKR_W2)
    if whole is not None and len(whole.spec.shape) == 3 and part.site.scaling.alpha is not None:
        raise UnsupportedError(
            part.module, "is a LoKr of a one-dimensional convolution, which PEFT lays out otherwise"
        )

    def half(values: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        return values[0] if len(values) == 1 else (values[0], values[1])

    def factors(*values: Tensor) -> tuple[Tensor, Tensor]:
        first, second = len(left), len(left) + len(right)
        rest = values[second:]
        return kronecker_factors(
            half(values[:first]), half(values[first:second]), rest[0] if rest else None
        )

    def shapes(slots: Sequence[Slot]) -> tuple:  # type: ignore[type-arg]
        found = tuple(tensors[slot].spec.shape for slot in slots)
        return found[0] if len(found) == 1 else found

    core_shape = tensors[Slot.LOKR_T2].spec.shape if core else None
    rank = kronecker_rank(shapes(left), shapes(right), core_shape)
    if core_shape is not None:
        kernel = core_shape[2:]
    elif whole is not None and len(whole.spec.shape) > 2:
        kernel = whole.spec.shape[2:]
    elif whole is not None and base is None:
        kernel = ()
    else:
        kernel = _kernel(part, base)
    stored = [tensors[slot] for slot in (*left, *right, *core)]
    return _replaced(part, stored, factors, rank, kernel, "the Kronecker product written out")


def _from_vera(
    part: Part, tensors: dict[Slot, StoredTensor], adapter: Adapter, base: Base | None
) -> Part:
    from loratool.math.exact_variants import vera_factors

    shared = {key.rpartition(".")[2]: t for key, t in adapter.tensors.items() if ".vera_" in key}
    if not {"vera_A", "vera_B"} <= shared.keys():
        raise UnsupportedError(
            f"{adapter.path}: {part.module}",
            "is a VeRA without its shared projections (save_projection was false); only PEFT's "
            "random generator can make them again",
        )
    if base is None:
        raise UnsupportedError(
            f"{adapter.path}: {part.module}",
            "is a VeRA: only the base tells how many inputs it has",
            hint="give --base; headers are enough",
        )
    out = tensors[Slot.VERA_B].spec.shape[0]
    shape = base.weight(part.module).spec.shape
    into = shape[1] if shape[0] == out else shape[0]
    stored = [tensors[Slot.VERA_B], tensors[Slot.VERA_D], shared["vera_A"], shared["vera_B"]]
    rank = tensors[Slot.VERA_D].spec.shape[0]

    def factors(*values: Tensor) -> tuple[Tensor, Tensor]:
        one, other, shared_a, shared_b = values
        return vera_factors(one, other, shared_a, shared_b, out, into)

    made = _replaced(
        part, stored, factors, rank, (), "the shared projections written out", (out, into)
    )
    return replace(made, scale=1.0, alpha=None)


def _kernel(part: Part, base: Base | None) -> tuple[int, ...]:
    """Return the kernel of a convolution that is stored flattened."""
    weight = base.find(part.module) if base is not None else None
    if weight is not None:
        return weight.spec.shape[2:]
    into = part.site.in_features
    leaf = part.module.rpartition(".")[2]
    is_unet = part.module.startswith("unet.")
    return (3, 3) if is_unet and leaf in THREE_BY_THREE and into % 9 == 0 else ()


def _replaced(
    part: Part,
    stored: Sequence[StoredTensor],
    factors: Callable[..., tuple[Tensor, Tensor]],
    rank: int,
    kernel: tuple[int, ...],
    note: str,
    shape: tuple[int, int] | None = None,
) -> Part:
    out, width = shape or (part.site.out_features, part.site.in_features)
    into = (width // math.prod(kernel), *kernel)
    dtype = widest([tensor.spec.dtype for tensor in stored])
    tensors = tuple(stored)
    down = Computed("A", tensors, lambda *v: factors(*v)[1], (rank, *into), dtype)
    ones = (1,) * len(kernel)
    up = Computed("B", tensors, lambda *v: factors(*v)[0], (out, rank, *ones), dtype)
    others: dict[Slot, Value] = {s: v for s, v in part.values.items() if s is Slot.BIAS}
    return replace(
        part,
        values={Slot.DOWN: down, Slot.UP: up, **others},
        rank=rank,
        alpha=None,
        kind=Kind.CONV if kernel else Kind.LINEAR,
        notes=(*part.notes, note),
    )


def _approximate(
    part: Part, adapter: Adapter, base: Base | None, rank: int | None
) -> tuple[Part, Approximation]:
    where = f"{adapter.path}: {part.module}"
    words = VARIANT_WORDS.get(part.variant, f"a {part.variant}")
    if part.variant in ("kasa", "qalora") or part.kind is Kind.EMBEDDING:
        raise UnsupportedError(
            where,
            f"is {words}: its delta depends on the base",
            hint="merge it into its base, and extract the difference of the two",
        )
    if base is None and needs_base(part.variant):
        raise UnsupportedError(
            where,
            f"is {words}; its delta depends on the base's weight",
            hint="give --base and --rank",
        )
    if rank is None:
        raise UnsupportedError(
            where, f"is {words}; a plain LoRA can only come near it", hint="give --rank"
        )
    weight = base.weight(part.module) if base is not None and needs_base(part.variant) else None
    shape = weight.spec.shape if weight is not None else _shape_of(part)
    if len(shape) < 2:
        raise UnsupportedError(where, f"has the shape {list(shape)}, which has no rank")
    kernel = shape[2:]
    most = min(rank, shape[0], math.prod(shape[1:]))
    is_turned = weight is not None and _is_turned(part, shape)
    made = Approximation(lambda: _dense(part, weight, is_turned=is_turned), most, seed=0)
    dtype = _dtype(part)
    rows, width = (shape[1], shape[0]) if is_turned else (shape[0], shape[1])
    down = Computed("A", (), lambda: made.factor(0), (most, width, *kernel), dtype)
    ones = (1,) * len(kernel)
    up = Computed("B", (), lambda: made.factor(1), (rows, most, *ones), dtype)
    others: dict[Slot, Value] = {
        s: v for s, v in part.values.items() if s in (Slot.BIAS, Slot.UP_BIAS)
    }
    if Slot.UP_BIAS in others:
        others[Slot.UP_BIAS] = scaled(others[Slot.UP_BIAS], part.scale)
    plain = replace(
        part,
        values={Slot.DOWN: down, Slot.UP: up, **others},
        rank=most,
        scale=1.0,
        alpha=None,
        variant="lora",
        kind=Kind.CONV if kernel else Kind.LINEAR,
        notes=(*part.notes, f"{words}: the best plain LoRA of rank {most}"),
    )
    return plain, made


def _is_turned(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether the base stores the weight as ``(in, out)``, as GPT-2's Conv1D does."""
    if len(shape) != 2 or shape[0] == shape[1] or not part.site.out_features:
        return False
    return part.site.out_features == shape[1]


def _shape_of(part: Part) -> tuple[int, ...]:
    value = part.values.get(Slot.DIFF)
    return value.shape if value is not None else ()


def _dtype(part: Part) -> str:
    found = [value.dtype for value in part.values.values() if value.dtype in FACTOR_DTYPES]
    return widest(found) if found else "F32"


def _dense(part: Part, stored: StoredTensor | None, *, is_turned: bool) -> Tensor:
    """Return ΔW, ``(out, in, *kernel)`` in float64."""
    import torch

    from loratool.math import dense_variants as dense
    from loratool.ops.tensors import read_tensor

    values = {slot: torch.from_numpy(value.evaluate()) for slot, value in part.values.items()}
    if part.variant == "full":
        return values[Slot.DIFF]
    assert stored is not None
    weight = read_tensor(stored).double()
    if is_turned:
        weight = weight.T
    alpha = part.site.slots.get(Slot.ALPHA)
    limit = float(read_tensor(alpha).double().reshape(())) if alpha is not None else 0.0
    rescale = values.get(Slot.OFT_RESCALE)
    match part.variant:
        case "oft":
            return dense.diag_oft_delta(weight, values[Slot.OFT_BLOCKS], limit, rescale)
        case "boft":
            return dense.boft_delta(weight, values[Slot.OFT_BLOCKS], limit, rescale)
        case "ia3":
            flag = values.get(Slot.IA3_ON_INPUT)
            return dense.ia3_delta(weight, values[Slot.IA3], bool(flag is not None and flag.any()))
        case "glora":
            names = (Slot.GLORA_A1, Slot.GLORA_A2, Slot.GLORA_B1, Slot.GLORA_B2)
            a1, a2, b1, b2 = (values[slot] for slot in names)
            made = dense.glora_delta(weight, a1, a2, b1, b2, values.get(Slot.GLORA_BM))
            return made * part.scale
    down, up = values[part.slots[0]], values[part.slots[1]]
    delta = part.scale * (up.flatten(1) @ down.flatten(1))
    magnitude = values[Slot.MAGNITUDE]
    is_rows = magnitude.ndim == 1 or magnitude.shape[0] != 1 or magnitude.ndim == 4
    return dense.dora_delta(weight, delta.reshape(weight.shape), magnitude, out_axis=is_rows)


def shaped_like(part: Part, shape: tuple[int, ...]) -> Part:
    """Return a part whose factors have kernels of ones, or none, as the base's weight has."""
    down, up = part.down, part.up
    if part.kind is Kind.EMBEDDING or not part.is_plain:
        return part
    if len(shape) > 2 and len(down.shape) == 2 and down.shape[1] == math.prod(shape[1:]):
        ones = (1,) * (len(shape) - 2)
        made = part.factored(
            _as(down, (down.shape[0], *shape[1:])),
            _as(up, (*up.shape[:2], *ones)),
            alpha=part.alpha,
            note="shaped like the base's convolution",
        )
        return replace(made, kind=Kind.CONV)
    if len(shape) == 2 and len(down.shape) > 2 and set(down.shape[2:]) == {1}:
        made = part.factored(
            _as(down, down.shape[:2]),
            _as(up, up.shape[:2]),
            alpha=part.alpha,
            note="shaped like the base's linear layer",
        )
        return replace(made, kind=Kind.LINEAR)
    return part


def _as(value: Value, shape: tuple[int, ...]) -> Value:
    return reshaped(value, shape)
