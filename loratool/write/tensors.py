"""What the tensors of a module are called in a scheme."""

from __future__ import annotations

from loratool.adapter.part import Part
from loratool.adapter.scheme import Scheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import TensorSpec
from loratool.plan.adapter import Output
from loratool.values.expr import computed_dtype, spec_of

__all__ = ["alpha_output", "part_specs"]


def part_specs(
    spelling: str, part: Part, scheme: Scheme, name: str, dtype: str | None
) -> dict[Slot, TensorSpec]:
    """Return what the tensors of ``part`` are called and stored as.

    Args:
        spelling: Its module, as the scheme spells it.
        part: The module.
        scheme: The scheme.
        name: The adapter's name, for schemes that have one.
        dtype: The dtype to write floats in, or ``None`` for theirs.

    Raises:
        UnsupportedError: The scheme has no name for one of them.
    """
    adapter = name if scheme.keys.names_adapter else None
    path = _nested(spelling, part)
    factors = [part.values[slot] for slot in part.slots if slot in part.values]
    # A factor of 8 bits beside one that was computed gets as many as that one has.
    is_mixed = any(DTYPES[factor.dtype].is_mergeable for factor in factors)
    return {
        slot: spec_of(
            _key(AdapterKey(path, slot, adapter), part, scheme),
            value,
            dtype or (computed_dtype([value.dtype]) if is_mixed else None),
        )
        for slot, value in part.values.items()
    }


def _nested(spelling: str, part: Part) -> str:
    """Return the path with the ``base_layer`` steps that PEFT's wrappers make."""
    if not part.nesting:
        return spelling
    steps = ".base_layer" * part.nesting
    if part.parameter is not None:
        return spelling + steps
    parent, _, leaf = spelling.rpartition(".")  # the projection inside an nn.MultiheadAttention
    return f"{parent}{steps}.{leaf}"


def _key(key: AdapterKey, part: Part, scheme: Scheme) -> str:
    try:
        return scheme.keys.format(key)
    except KeyError:
        raise UnsupportedError(
            part.module,
            f"the scheme {scheme.name!r} has no name for {key.slot.value!r}",
            hint="write another scheme with --to, such as --to peft",
        ) from None


def alpha_output(spelling: str, part: Part, scheme: Scheme) -> Output | None:
    """Return a module's alpha tensor, where it has one."""
    value = scheme.scale.record(part)
    if value is None:
        return None
    return Output(spec_of(scheme.keys.format(AdapterKey(spelling, Slot.ALPHA)), value), value)
