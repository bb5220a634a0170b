"""OSF, as PEFT stores it: the base's weakest directions are trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Variant

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["osf_U_low"],
    "peft": {
        ".osf_svd_params.U_low": "osf_U_low",
        ".osf_svd_params.S_low": "osf_S_low",
        ".osf_svd_params.V_low": "osf_V_low",
    },
    "peft_types": ["OSF"],
    "evidence": 2,
    "priority": 10,
}

LEFT, VALUES, RIGHT = (Slot(name) for name in ("osf_U_low", "osf_S_low", "osf_V_low"))
SLOTS: Final = (LEFT, VALUES, RIGHT)


class Replaced(Change):
    """The strongest directions of the original weight, and ``U diag(s) V`` instead of the rest."""

    grain = (0, 0)
    of_original = True

    def __init__(self, left: Array, values: Array, right: Array) -> None:
        self.low = (left * values[None, :]) @ right
        self.trained = values.shape[0]

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.principal import pissa_residual

        return self.low - pissa_residual(part, min(part.shape) - self.trained)


class Osf(Variant):
    """As many directions are trained as there are values; the others are the base's own."""

    name = "osf"
    words = "OSF, directions of the base that were trained"
    is_scaled = False
    is_linear = False
    needs_base = True
    has_change = True
    needs_whole = True
    shapes = MappingProxyType(
        {"osf_U_low": "out rank", "osf_S_low": "rank", "osf_V_low": "rank in"}
    )
    fields = frozenset(("effective_rank", "target_svd_config"))

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(shapes[VALUES][0], shapes[LEFT][0], shapes[RIGHT][1])

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        is_matrix = len(shape) == 2 and site.geometry.rank <= min(shape)
        return is_matrix and super().places(site, shape)

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        return Replaced(*(values[slot] for slot in SLOTS))


VARIANT = Osf()
