"""UniLoRA: the numbers of A and B are those of one vector, at places that the file tells."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.sparse import within
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Slots, Variant
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["unilora_indices_A"],
    "peft": {
        ".unilora_indices_A": "unilora_indices_A",
        ".unilora_indices_B": "unilora_indices_B",
        ".unilora_scales_A": "unilora_scales_A",
        ".unilora_scales_B": "unilora_scales_B",
    },
    "peft_types": ["UNILORA"],
    "evidence": 2,
    "priority": 10,
}

VECTOR: Final = "unilora_theta_d"
PLACES: Final = Slot("unilora_indices_A"), Slot("unilora_indices_B")
SCALES: Final = Slot("unilora_scales_A"), Slot("unilora_scales_B")


class UniLora(Variant):
    """``A = θ[i] ∘ s``, and B alike, without any further scale."""

    name = "unilora"
    words = "UniLoRA, factors of the numbers of one vector"
    shapes = MappingProxyType(
        {
            "unilora_indices_A": "rank in",
            "unilora_scales_A": "rank in",
            "unilora_indices_B": "out rank",
            "unilora_scales_B": "out rank",
            "unilora_theta_d": "n",
        }
    )
    whole_numbers = frozenset(("unilora_indices_A", "unilora_indices_B"))
    is_scaled = False
    has_factors = True
    fields = frozenset(
        (
            "theta_d_length",
            "proj_seed",
            "save_indices",
            "unilora_dropout",
            "init_theta_d_bound",
        )
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return the vector."""
        for key, tensor in tensors.items():
            if key.rpartition(".")[2] == VECTOR:
                return {VECTOR: tensor}
        return {}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        down, up = (shapes[slot] for slot in PLACES)
        return Geometry(down[0], up[0], down[1])

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import bank_numbers

        vector = read(site.settings[VECTOR])
        found = []
        for slot, scales in zip(PLACES, SCALES, strict=True):
            places = read(site.slots[slot])
            within(site, places, vector.shape[0])
            found.append(bank_numbers(vector, places) * read(site.slots[scales]))
        down, up = found
        return down, up


VARIANT = UniLora()
