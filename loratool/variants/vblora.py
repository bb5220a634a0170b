"""VB-LoRA (arXiv 2405.15179): factors made of a bank of vectors that all modules share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.sparse import within
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Slots, Variant
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["vblora_logits_A", "vblora_logits_A_topk_indices"],
    "peft": {
        ".vblora_logits_A": "vblora_logits_A",
        ".vblora_logits_B": "vblora_logits_B",
        ".vblora_logits_A_topk_indices": "vblora_logits_A_topk_indices",
        ".vblora_logits_B_topk_indices": "vblora_logits_B_topk_indices",
        ".vblora_logits_A_topk_weights": "vblora_logits_A_topk_weights",
        ".vblora_logits_B_topk_weights": "vblora_logits_B_topk_weights",
    },
    "peft_types": ["VBLORA"],
    "evidence": 2,
    "priority": 10,
}

BANK: Final = "vblora_vector_bank"
LOGITS: Final = Slot("vblora_logits_A"), Slot("vblora_logits_B")
CHOSEN: Final = tuple(Slot(f"{slot}_topk_indices") for slot in LOGITS)
SHARES: Final = tuple(Slot(f"{slot}_topk_weights") for slot in LOGITS)


class VbLora(Variant):
    """Each piece of A and B is a mean of the few vectors with the largest logits."""

    name = "vblora"
    words = "VB-LoRA, factors from a bank of vectors"
    is_scaled = False
    has_factors = True
    kernel_slots = frozenset()
    whole_numbers = frozenset(CHOSEN)
    fields = frozenset(
        (
            "num_vectors",
            "vector_length",
            "topk",
            "save_only_topk_weights",
            "vblora_dropout",
            "init_vector_bank_bound",
            "init_logits_std",
        )
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return the bank, and how many vectors a piece is made of."""
        found: dict[str, Any] = {}
        for key, tensor in tensors.items():
            if key.rpartition(".")[2] == BANK:
                found[BANK] = tensor
        if config is not None:
            found["topk"] = whole(config, "topk", 2, module)
        return found

    def expected(self, slots: Slots) -> Mapping[str, str]:
        """See :class:`Variant`."""
        if LOGITS[0] in slots or LOGITS[1] in slots:
            return {LOGITS[0]: "rank . n", LOGITS[1]: ". rank n", BANK: "n length"}
        places = {CHOSEN[0]: "rank in k", CHOSEN[1]: "out rank k", BANK: "n length"}
        return {**places, SHARES[0]: "rank in others", SHARES[1]: "out rank others"}

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        down, up = LOGITS if LOGITS[0] in shapes else CHOSEN
        length = settings[BANK].spec.shape[1]
        return Geometry(shapes[down][0], shapes[up][0] * length, shapes[down][1] * length)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if LOGITS[0] in site.slots and "topk" not in site.settings:
            yield "LT022", "has its topk in adapter_config.json, which is not there"
        if LOGITS[0] not in site.slots:
            count, others = (site.slots[slot].spec.shape[2] for slot in (CHOSEN[0], SHARES[0]))
            if others != count - 1:
                yield "LT003", f"is made of {count} vectors each, and has {others} shares"

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return ()

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import bank_pieces, leading_shares, whole_shares

        bank = read(site.settings[BANK])
        pieces = []
        for logits, chosen, shares in zip(LOGITS, CHOSEN, SHARES, strict=True):
            if logits in site.slots:
                found = leading_shares(read(site.slots[logits]), site.settings["topk"])
            else:
                found = read(site.slots[chosen]), whole_shares(read(site.slots[shares]))
            within(site, found[0], bank.shape[0])
            pieces.append(bank_pieces(bank, *found))
        down, up = pieces
        rank = down.shape[0]
        return down.reshape((rank, -1)), up.swapaxes(1, 2).reshape((-1, rank))


VARIANT = VbLora()
