"""Plain LoRA from an adapter whose initialisation changed the base, and its initial state.

PiSSA, OLoRA, CorDA and LoRA-GA take ``s · B₀ A₀`` out of the base before training, so that what
training did to the original weights is ``s · (B A - B₀ A₀)``: the factors side by side, exactly,
at twice the rank (as ``path_initial_model_for_weight_conversion`` of peft does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter.model import Adapter
from loratool.adapter.part import Part
from loratool.errors import AdapterError
from loratool.values.expr import Placed, concatenated, widest
from loratool.variants import variant_named
from loratool.write.stored import part_of

__all__ = ["without_initial"]


def without_initial(parts: Sequence[Part], initial: Adapter) -> list[Part]:
    """Return what training added to every part, relative to the original base.

    Args:
        parts: Of the trained adapter.
        initial: The adapter as it was before training.

    Raises:
        AdapterError: The two do not have the same modules, of the same shapes.
    """
    before = {site.label: part_of(site, initial) for site in initial.sites}
    made = [_difference(part, before.pop(part.label, None), initial) for part in parts]
    if before:
        raise AdapterError(
            initial.path, f"has the module {next(iter(before))!r}, which the trained adapter lacks"
        )
    return made


def _difference(part: Part, start: Part | None, initial: Adapter) -> Part:
    where = f"{initial.path}: {part.label}"
    if start is None:
        raise AdapterError(where, "is not there; expected the adapter as it was initialised")
    if not (part.is_plain and start.is_plain) or part.slots != start.slots:
        raise AdapterError(where, "is no plain LoRA of the same kind in both adapters")
    shapes = (part.down.shape[1:], part.up.shape[0])
    if (start.down.shape[1:], start.up.shape[0]) != shapes:
        raise AdapterError(where, "has another shape than in the trained adapter")
    if part.scale == 0:
        raise AdapterError(part.label, "has the scale 0")
    if not math.isclose(start.scale, part.scale, rel_tol=1e-6):
        raise AdapterError(
            where,
            f"has the scale {start.scale:g}, the trained adapter {part.scale:g}",
            hint="are these two states of one training?",
        )
    rank = part.rank + start.rank
    up = Placed(
        ((part.up, 0, 0), (start.up.scaled(-start.scale / part.scale), 0, part.rank)),
        (part.up.shape[0], rank, *part.up.shape[2:]),
        widest([part.up.dtype, start.up.dtype]),
    )
    down = concatenated([part.down, start.down])
    made = part.factored(down, up, note="its initial factors were subtracted, at twice the rank")
    return replace(made, variant=variant_named("lora"))
