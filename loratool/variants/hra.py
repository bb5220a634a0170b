"""HRA (arXiv 2405.17484): inputs that are mirrored in a few planes, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import flag
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.turned import Rowwise, Turned
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["hra_u"],
    "peft": {".hra_u": "hra_u"},
    "peft_types": ["HRA"],
    "evidence": 2,
    "priority": 10,
}

NORMALS: Final = Slot("hra_u")


class Hra(Turned):
    """``W (1 - 2 u₁ u₁ᵀ) (1 - 2 u₂ u₂ᵀ) …`` with unit vectors, made orthogonal if so set."""

    name = "hra"
    words = "HRA, mirrors of the base's inputs"
    shapes = MappingProxyType(
        {
            "hra_u": "in rank",
        }
    )
    fields = frozenset(("apply_GS", "init_weights"))

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return whether the planes are made orthogonal to each other."""
        if config is None:
            return {}
        return {"is orthogonal": flag(config, "apply_GS", False, module)}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        into, rank = shapes[NORMALS]
        return Geometry(rank, 0, into)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if not site.settings:
            yield (
                "LT022",
                "may have planes that are made orthogonal: apply_GS of adapter_config.json would "
                "tell",
            )

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.rotations import mirrored, orthonormal

        normals = values[NORMALS]
        if site.settings["is orthogonal"]:
            normals = orthonormal(normals)  # mirrors in these give the same in any order
        return Rowwise(lambda rows, _: mirrored(rows, normals))


VARIANT = Hra()
