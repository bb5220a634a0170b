"""(IA)³ (arXiv 2205.05638) as PEFT stores it: what outputs or inputs are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.patterns import matches_target
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots, Variant
from loratool.errors import AdapterError
from loratool.files.dtypes import DTYPES
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["ia3_l"],
    "peft": {".ia3_l": "ia3_l"},
    "peft_types": ["IA3"],
    "evidence": 2,
    "priority": 10,
}

VECTOR: Final = Slot("ia3_l")
FEEDFORWARD: Final = "feedforward_modules"


class Multiplied(Change):
    """``W ∘ l``, along the rows or the columns."""

    def __init__(self, factors: Array, outputs: int, groups: int, *, is_on_input: bool) -> None:
        self.factors = factors.reshape((groups, -1))
        self.each = outputs // groups
        self.is_on_input = is_on_input

    def changed(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        return part * self._along(part, row, column)

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        return part * (self._along(part, row, column) - 1)

    def _along(self, part: Array, row: int, column: int) -> Array:
        """Return the factors in a shape that broadcasts over ``part``."""
        count, width, *kernel = part.shape
        ones = (1,) * len(kernel)
        if not self.is_on_input:
            return self.factors.reshape(-1)[row : row + count].reshape((count, 1, *ones))
        if self.factors.shape[0] == 1:
            return self.factors[0, column : column + width].reshape((1, width, *ones))
        groups = [(row + index) // self.each for index in range(count)]
        return self.factors[groups, :].reshape((count, width, *ones))


class PeftIa3(Variant):
    """``l`` is 1 where nothing changes; modules of ``feedforward_modules`` scale their inputs.

    Where outputs are scaled the bias is one of them.
    """

    name = "ia3"
    words = "(IA)³, factors of the base's rows or columns"
    is_scaled = False
    needs_base = True
    has_change = True
    kernel_slots = frozenset((VECTOR,))
    fields = frozenset((FEEDFORWARD, "init_ia3_weights"))

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return whether the inputs are scaled, by the shape or else the configuration."""
        shape = slots[VECTOR].spec.shape
        said = _is_listed(module, config)
        told = shape[0] == 1 if len(shape) == 2 and math.prod(shape) > 1 else None
        if None not in (said, told) and said != told:
            raise AdapterError(
                module,
                f"has a vector of shape {list(shape)}, but is{'' if said else ' not'} one of "
                f"{FEEDFORWARD}",
                code="LT003",
            )
        return {"is_on_input": said if told is None else told}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        size = math.prod(shapes[VECTOR])
        return Geometry(1, 0, size) if settings["is_on_input"] else Geometry(1, size, 0)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        spec = site.slots[VECTOR].spec
        if len(spec.shape) < 2 or max(spec.shape) != spec.elements:
            yield "LT003", f"has a vector of shape {list(spec.shape)}, expected one long side"
        if not DTYPES[spec.dtype].is_factor:
            yield "LT004", f"has a vector of dtype {spec.dtype}, expected a float"
        if site.settings["is_on_input"] is None:
            yield (
                "LT022",
                f"may scale outputs or inputs: {FEEDFORWARD} of adapter_config.json would tell",
            )

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        size = site.slots[VECTOR].spec.elements
        if not site.settings["is_on_input"]:
            return size == shape[0]
        groups = size // shape[1] if len(shape) > 2 else 1
        return size == groups * shape[1] and groups > 0 and shape[0] % groups == 0

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        is_on_input = bool(site.settings["is_on_input"])
        groups = site.slots[VECTOR].spec.elements // shape[1] if is_on_input else 1
        return Multiplied(values[VECTOR], shape[0], groups, is_on_input=is_on_input)

    def changes_bias(self, site: Site) -> bool:
        """See :class:`Variant`."""
        return not site.settings["is_on_input"]

    def bias_change(self, site: Site, values: Mapping[Slot, Array]) -> Change:
        """See :class:`Variant`."""
        return Multiplied(values[VECTOR], site.out_features, 1, is_on_input=False)


def _is_listed(module: str, config: LoraConfig | None) -> bool | None:
    """Whether PEFT takes a module for a feed-forward one; ``None`` where nothing says so.

    Unlike targets, names are any endings of a path.
    """
    said = config.raw.get(FEEDFORWARD) if config is not None else None
    if said is None:
        return None
    if isinstance(said, str):
        return matches_target(said, module)
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        raise AdapterError(
            module, f"{FEEDFORWARD} is {said!r:.60}, expected a list of names", code="LT015"
        )
    return module.endswith(tuple(said))


VARIANT = PeftIa3()
