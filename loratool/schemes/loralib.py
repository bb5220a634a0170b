"""Microsoft's loralib: bare parameters beside the weights; alpha lives in the training code."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter.scheme import Embeddings, KeyScheme, Template
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor

__all__ = ["SCHEME"]


class LoralibScheme(KeyScheme):
    """The same keys may hold transposed factors; the ranks of each pair tell."""

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        count = self.factor_keys(tensors)
        wrong = sum(
            down.spec.shape[0] % max(1, up.spec.shape[1]) != 0
            and down.spec.shape[1] == up.spec.shape[0]
            for down, up in self.pairs(tensors)
        )
        return max(1, count - 2 * wrong) if count else 0


SCHEME = LoralibScheme(
    name="loralib",
    summary="microsoft/LoRA, bare parameters",
    example="transformer.h.0.attn.c_attn.lora_A",
    writes=True,
    embeddings=Embeddings.FACTORS,
    has_convolutions=False,
    is_open=True,
    weights_name="adapter_model.safetensors",
    foreign=("base_model.model.",),
    templates=(
        Template("{module}.lora_A", Slot.DOWN),
        Template("{module}.lora_B", Slot.UP),
        Template("{module}.alpha", Slot.ALPHA),
    ),
)
