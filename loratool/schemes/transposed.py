"""Research code that multiplies from the right: ``x @ lora_A @ lora_B``."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter.scheme import Embeddings, KeyScheme, Template, are_transposed
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor

__all__ = ["SCHEME"]


class TransposedScheme(KeyScheme):
    """loralib's keys; that the factors are transposed only their shapes tell."""

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        pairs = self.pairs(tensors)
        return self.factor_keys(tensors) if pairs and are_transposed(pairs) else 0


SCHEME = TransposedScheme(
    name="transposed",
    summary="research code: A is (in, r), B is (r, out)",
    example="blocks.0.attn.qkv.lora_A",
    writes=True,
    embeddings=Embeddings.FACTORS,
    is_transposed=True,
    has_convolutions=False,
    is_open=True,
    weights_name="adapter_model.safetensors",
    priority=2,
    foreign=("base_model.model.",),
    templates=(
        Template("{module}.lora_A", Slot.DOWN),
        Template("{module}.lora_B", Slot.UP),
        Template("{module}.alpha", Slot.ALPHA),
    ),
)
