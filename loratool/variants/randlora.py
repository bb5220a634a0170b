"""RandLoRA (arXiv 2502.00987): a sum of random low-rank matrices that diagonals scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import flag, number, whole
from loratool.adapter.model import Site
from loratool.adapter.projected import Projected
from loratool.adapter.slots import Slot
from loratool.adapter.variant import LARGEST, SHAPE, Array, Geometry, Read, Settings, Shapes
from loratool.errors import AdapterError, UnsupportedError

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["randlora_lambda"],
    "peft": {".randlora_lambda": "randlora_lambda", ".randlora_gamma": "randlora_gamma"},
    "peft_types": ["RANDLORA"],
    "evidence": 2,
    "priority": 10,
}

WEIGHTS, SCALES = Slot("randlora_lambda"), Slot("randlora_gamma")


class RandLora(Projected):
    """``alpha / r · B @ A`` of full rank: λ and γ scale the rows of A, of the smaller side."""

    name = "randlora"
    words = "RandLoRA, scaled projections that all modules share"
    shapes = MappingProxyType(
        {
            "randlora_lambda": "rank bases",
            "randlora_gamma": "bases .",
            "randlora_A": "rank 1 .",
            "randlora_B": ". . rank",
        }
    )
    spare = frozenset(("randlora_A", "randlora_B"))
    shared = ("randlora_A", "randlora_B")
    fields = frozenset(
        (
            "projection_prng_key",
            "save_projection",
            "init_weights",
            "randlora_alpha",
            "randlora_dropout",
            "sparse",
            "very_sparse",
        )
    )

    def seed(self, module: str, config: LoraConfig) -> Mapping[str, Any]:
        """See :class:`Projected`."""
        return {
            "seed": whole(config, "projection_prng_key", 0, module),
            "rank": whole(config, "r", 32, module),
            "alpha": number(config, "randlora_alpha", 640, module),
            "sparse": flag(config, "sparse", False, module),
            "very sparse": flag(config, "very_sparse", False, module),
        }

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        out, into = settings.get(SHAPE) or (0, 0)
        return Geometry(math.prod(shapes[WEIGHTS]), out, into)

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        small = site.slots[SCALES].spec.shape[1]
        return len(shape) == 2 and min(shape) == small and super().places(site, shape)

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        super().check(site, shape)
        if "alpha" not in site.settings:
            raise UnsupportedError(
                site.module,
                "is a RandLoRA, whose randlora_alpha only adapter_config.json tells",
                hint="put the adapter_config.json beside it that it was saved with",
            )

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        return min(site.geometry.rank, site.out_features, site.in_features)

    def check_sizes(self, site: Site, shape: tuple[int, ...]) -> None:
        """See :class:`Projected`."""
        one, other = (site.settings[name].spec.shape for name in self.shared)
        bases = site.slots[WEIGHTS].spec.shape[1]
        if one[2] < min(shape) or other[0] < max(shape) or other[1] < bases:
            raise AdapterError(
                site.module,
                f"shares projections of the shapes {list(one)} and {list(other)}, which are too "
                f"small for {bases} bases of {list(shape)}",
                hint="is this the base that it was trained on?",
                code="LT022",
            )

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (WEIGHTS,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import shortest
        from loratool.math.projections import randlora_factors

        weights, scales = read(site.slots[WEIGHTS]), read(site.slots[SCALES])
        one, other = self.projections(site, read, weights)
        out, into = site.settings[SHAPE]
        up, down = shortest(*randlora_factors(one, other, weights, scales, out, into))
        rank = weights.shape[0]
        return down * (site.settings["alpha"] / rank), up

    def drawn_rank(self, site: Site) -> int:
        """See :class:`Projected`."""
        return site.slots[WEIGHTS].spec.shape[0]

    def drawn(self, site: Site, like: Array) -> tuple[Array, Array]:
        """See :class:`Projected`."""
        from loratool.math.namespace import beside
        from loratool.math.projections import randlora_projections

        out, into = site.settings[LARGEST]
        sparsity = 3.0 if site.settings["sparse"] else 0.0
        if site.settings["very sparse"]:
            sparsity = math.sqrt(min(out, into))
        rank = site.slots[WEIGHTS].spec.shape[0]
        one, other = randlora_projections(site.settings["seed"], rank, out, into, sparsity)
        return beside(one, like), beside(other, like)


VARIANT = RandLora()
