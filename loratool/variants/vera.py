"""VeRA (arXiv 2310.11454): projections that all modules share, scaled by trained vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Slots, Variant
from loratool.errors import UnsupportedError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["vera_lambda_b"],
    "peft": {".vera_lambda_b": "vera_lambda_b", ".vera_lambda_d": "vera_lambda_d"},
    "peft_types": ["VERA"],
    "evidence": 2,
    "priority": 10,
}

ROWS, RANKS = Slot("vera_lambda_b"), Slot("vera_lambda_d")
SHARED: Final = ("vera_A", "vera_B")


class Vera(Variant):
    """``diag(b) B[:out] @ diag(d) A[:, :in]``, without any scale."""

    name = "vera"
    words = "VeRA, scaled projections that all modules share"
    is_scaled = False
    has_factors = True
    needs_shape = True

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return the shared projections, where the file has them, once or for every module."""
        found = {key: t for key, t in tensors.items() if key.rpartition(".")[2] in SHARED}
        return found | {key.rpartition(".")[2]: tensor for key, tensor in found.items()}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(shapes[RANKS][0], shapes[ROWS][0], 0)

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        if not all(name in site.settings for name in SHARED):
            raise UnsupportedError(
                site.module,
                "is a VeRA without its shared projections (save_projection was false); only "
                "PEFT's random generator can make them again",
            )
        if shape is None:
            raise UnsupportedError(
                site.module,
                "is a VeRA: only the base tells how many inputs it has",
                hint="give --base BASE; headers are enough",
            )

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        if shape is None:
            return 0
        return shape[1] if shape[0] == site.out_features else shape[0]

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (ROWS,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import vera_factors

        rows, ranks = read(site.slots[ROWS]), read(site.slots[RANKS])
        shared_a, shared_b = (read(site.settings[name]) for name in SHARED)
        up, down = vera_factors(rows, ranks, shared_a, shared_b, site.out_features, width or 0)
        return down, up


VARIANT = Vera()
