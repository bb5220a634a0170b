"""What the tensors of a module are called in a scheme."""

from __future__ import annotations

from loratool.adapter.build import read_scalar
from loratool.adapter.part import Part
from loratool.adapter.scheme import KeyScheme, ScaleRule, Spelling
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import UnsupportedError
from loratool.files.spec import TensorSpec
from loratool.plan.adapter import Output
from loratool.values.expr import Constant, spec_of

__all__ = ["alpha_output", "part_specs"]


def part_specs(
    spelling: str, part: Part, scheme: KeyScheme, name: str, dtype: str | None
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
    adapter = name if scheme.spelling is Spelling.BARE_FLAT else None
    path = _nested(spelling, part)
    return {
        slot: spec_of(_key(AdapterKey(path, slot, adapter), part, scheme), value, dtype)
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


def _key(key: AdapterKey, part: Part, scheme: KeyScheme) -> str:
    try:
        return scheme.format(key)
    except KeyError:
        raise UnsupportedError(
            part.module,
            f"the scheme {scheme.name!r} has no name for {key.slot.value!r}",
            hint="write another scheme with --to, such as --to peft",
        ) from None


def alpha_output(spelling: str, part: Part, scheme: KeyScheme, rule: ScaleRule) -> Output | None:
    """Return a module's alpha tensor, where it has one."""
    if rule is not ScaleRule.ALPHA:
        return None
    if part.variant.is_scaled:
        number = part.written_alpha
    else:
        stored = part.stored(Slot.ALPHA)
        if stored is None or not part.variant.keeps_alpha:
            return None
        number = read_scalar(stored)
    spec = TensorSpec(scheme.format(AdapterKey(spelling, Slot.ALPHA)), "F32", ())
    return Output(spec, Constant(number, (), "F32"))
