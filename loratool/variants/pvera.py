"""PVeRA: VeRA whose ranks have a mean and a variance; what is merged is the mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import whole
from loratool.adapter.model import Site
from loratool.adapter.projected import Projected
from loratool.adapter.slots import Slot
from loratool.adapter.variant import LARGEST, Array, Geometry, Read, Settings, Shapes

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["pvera_lambda_b"],
    "peft": {".pvera_lambda_b": "pvera_lambda_b", ".pvera_lambda_d": "pvera_lambda_d"},
    "peft_types": ["PVERA"],
    "evidence": 2,
    "priority": 10,
}

ROWS, RANKS = Slot("pvera_lambda_b"), Slot("pvera_lambda_d")


class Pvera(Projected):
    """``diag(b) B[:out] @ diag(d) A[:, :in]`` of the first half of ``d`` and of the rows of A."""

    name = "pvera"
    words = "PVeRA, scaled projections that all modules share"
    shapes = MappingProxyType(
        {
            "pvera_lambda_b": "out",
            "pvera_lambda_d": "ranks",
            "pvera_A": "ranks .",
            "pvera_B": ". .",
        }
    )
    spare = frozenset(("pvera_A", "pvera_B"))
    shared = ("pvera_A", "pvera_B")
    fields = frozenset(
        (
            "projection_prng_key",
            "save_projection",
            "d_initial",
            "init_weights",
            "pvera_dropout",
            "sample_at_inference",
            "generator_seed",
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
        return Geometry(shapes[RANKS][0] // 2, shapes[ROWS][0], self.inputs(settings))

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        yield from super().problems(site)
        ranks, other = site.slots[RANKS].spec.shape[0], site.settings.get("pvera_B")
        if ranks % 2 or (other is not None and other.spec.shape[1] * 2 != ranks):
            yield "LT003", f"has {ranks} means and variances, expected two for each rank"

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (ROWS,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import vera_factors

        rows, ranks = read(site.slots[ROWS]), read(site.slots[RANKS])
        one, other = self.projections(site, read, ranks)
        half = site.geometry.rank
        up, down = vera_factors(
            rows, ranks[:half], one[:half, :], other, site.out_features, width or 0
        )
        return down, up

    def drawn(self, site: Site, like: Array) -> tuple[Array, Array]:
        """See :class:`Projected`."""
        from loratool.math.namespace import beside
        from loratool.math.projections import vera_projections

        rank = site.geometry.rank
        one, other = vera_projections(
            site.settings["seed"], (2 * rank, rank), *site.settings[LARGEST]
        )
        return beside(one, like), beside(other, like)


VARIANT = Pvera()
