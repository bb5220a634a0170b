"""Adapters of one file told apart by name, module paths flattened: a ``torch.save`` dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from loratool.adapter.scheme import Embeddings, KeyScheme, Spelling, Template, are_transposed
from loratool.adapter.slots import AdapterKey, Slot
from loratool.files.spec import StoredTensor

__all__ = ["SCHEME"]

FLAT: Final = re.compile(r"[^.]*_[^.]*\.[^.]+\.lora_[AB]", re.DOTALL)
DEFAULT: Final = "default"
"""What an adapter without a name is called; no layer is."""
LAYER: Final = re.compile(
    r"\d+|\w*(proj|dense|query|key|value|fc\d?|linear\d?|attn|qkv|out|mlp|to_[qkv]|w\d|head|embed\w*)",
    re.DOTALL,
)
"""What the last component of a dotted path looks like, and the name of an adapter does not."""


class PrefixedScheme(KeyScheme):
    """A key of loralib with a short path looks the same; all keys of a file together tell."""

    def parse(self, key: str) -> AdapterKey | None:
        found = self._parse_named(key) if key.count(".") == 2 else None
        return found if found is not None and "." not in found.module else None

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        factors = [key for key in tensors if key.endswith((".lora_A", ".lora_B"))]
        if not factors or any(key.count(".") != 2 for key in factors):
            return 0
        names = {key.split(".")[1] for key in factors}
        if names == {DEFAULT}:
            return self.factor_keys(tensors)
        if not all(FLAT.fullmatch(key) for key in factors):
            return 0
        if any(LAYER.fullmatch(name) for name in names) or are_transposed(self.pairs(tensors)):
            return 0
        return self.factor_keys(tensors)


SCHEME = PrefixedScheme(
    name="prefixed",
    summary="flattened paths, then the adapter's name; a torch.save dict",
    example="encoder_layer_0_attention_query.default.lora_A",
    writes=True,
    spelling=Spelling.BARE_FLAT,
    embeddings=Embeddings.FACTORS,
    has_convolutions=False,
    weights_name="adapter_model.bin",
    written_suffix=".bin",
    priority=3,
    templates=(
        Template("{module}.{adapter}.lora_A", Slot.DOWN),
        Template("{module}.{adapter}.lora_B", Slot.UP),
        Template("{module}.{adapter}.alpha", Slot.ALPHA),
    ),
)
