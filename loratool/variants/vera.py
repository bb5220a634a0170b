"""VeRA (arXiv 2310.11454): projections that all modules share, scaled by trained vectors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import whole
from loratool.adapter.model import Site
from loratool.adapter.projected import Projected
from loratool.adapter.slots import Slot
from loratool.adapter.variant import LARGEST, Array, Geometry, Read, Settings, Shapes

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


class Vera(Projected):
    """``diag(b) B[:out] @ diag(d) A[:, :in]``, without any scale."""

    name = "vera"
    words = "VeRA, scaled projections that all modules share"
    shapes = MappingProxyType(
        {
            "vera_lambda_b": "out",
            "vera_lambda_d": "rank",
            "vera_A": "rank .",
            "vera_B": ". rank",
        }
    )
    spare = frozenset(("vera_A", "vera_B"))
    shared = SHARED
    fields = frozenset(
        (
            "projection_prng_key",
            "save_projection",
            "d_initial",
            "init_weights",
            "vera_dropout",
        )
    )

    def seed(self, module: str, config: LoraConfig) -> Mapping[str, Any]:
        """See :class:`Projected`."""
        return {
            "seed": whole(config, "projection_prng_key", 0, module),
            "rank": whole(config, "r", 256, module),
        }

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(shapes[RANKS][0], shapes[ROWS][0], self.inputs(settings))

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (ROWS,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import vera_factors

        rows, ranks = read(site.slots[ROWS]), read(site.slots[RANKS])
        one, other = self.projections(site, read, ranks)
        up, down = vera_factors(rows, ranks, one, other, site.out_features, width or 0)
        return down, up

    def drawn(self, site: Site, like: Array) -> tuple[Array, Array]:
        """See :class:`Projected`."""
        from loratool.math.namespace import beside
        from loratool.math.projections import vera_projections

        rank = site.geometry.rank
        one, other = vera_projections(site.settings["seed"], (rank, rank), *site.settings[LARGEST])
        return beside(one, like), beside(other, like)


VARIANT = Vera()
