"""GraLoRA (arXiv 2505.20355): a weight cut into blocks, each with low-rank factors of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import number
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Slots, Variant
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["gralora_A"],
    "peft": {
        ".gralora_A": "gralora_A",
        ".gralora_B": "gralora_B",
        ".gralora_A_general.weight": "gralora_A_general",
        ".gralora_B_general.weight": "gralora_B_general",
    },
    "peft_types": ["GRALORA"],
    "evidence": 2,
    "priority": 10,
}

DOWN, UP = Slot("gralora_A"), Slot("gralora_B")
GENERAL: Final = Slot("gralora_A_general"), Slot("gralora_B_general")


class Gralora(Variant):
    """k × k blocks of rank r / k, and a plain LoRA beside them; alpha by both ranks together."""

    name = "gralora"
    words = "GraLoRA, low-rank factors of blocks"
    shapes = MappingProxyType(
        {
            "gralora_A": "k . rank",
            "gralora_B": "k rank .",
            "gralora_A_general": "more .",
            "gralora_B_general": ". more",
        }
    )
    spare = frozenset(("gralora_A_general", "gralora_B_general"))
    is_scaled = False
    has_factors = True
    kernel_slots = frozenset()
    fields = frozenset(("alpha", "gralora_k", "gralora_dropout", "hybrid_r", "init_weights"))

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return alpha."""
        return {} if config is None else {"alpha": number(config, "alpha", 64, module)}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        count, into, rank = shapes[DOWN]
        return Geometry(rank, shapes[UP][2] * count, count * into)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        down, up = (site.slots[slot].spec.shape for slot in (DOWN, UP))
        if down[2] % down[0]:
            yield "LT003", f"has blocks of rank {down[2]}, no multiple of their number {down[0]}"
        general = [site.slots[slot].spec.shape for slot in GENERAL if slot in site.slots]
        if len(general) == 1:
            yield "LT001", "has one of the factors that go over all blocks, but not the other"
        elif general and (general[1][0], general[0][1]) != (up[2] * up[0], down[1] * down[0]):
            shapes = [list(shape) for shape in (down, up, *general)]
            yield "LT003", f"has blocks and factors over all of them of the shapes {shapes}"
        if not site.settings:
            yield "LT022", "has its alpha in adapter_config.json, which is not there"

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        count, _, rank = site.slots[DOWN].spec.shape
        more = site.slots[GENERAL[0]].spec.shape[0] if GENERAL[0] in site.slots else 0
        return min(count * rank + more, site.out_features, site.in_features)

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return tuple(slot for slot in (UP, GENERAL[1]) if slot in slots)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import block_factors, shortest

        down, up = read(site.slots[DOWN]), read(site.slots[UP])
        rank = down.shape[2]
        general = None
        if GENERAL[0] in site.slots:
            general = read(site.slots[GENERAL[0]]), read(site.slots[GENERAL[1]])
            rank += general[0].shape[0]
        made, other = shortest(*block_factors(down, up, general))
        return other * (site.settings["alpha"] / rank), made


VARIANT = Gralora()
