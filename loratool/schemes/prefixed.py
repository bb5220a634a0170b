"""Adapters of one file told apart by name, module paths flattened: a ``torch.save`` dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from loratool.adapter.keys import KeyTable, Template, are_transposed
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.files.spec import StoredTensor
from loratool.names.paths.flat import BareFlatPaths
from loratool.schemes.parts.roles import FactorsOfTable, Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"\.lora_[AB]$",
    "weights": ("adapter_model.bin",),
}

FLAT: Final = re.compile(r"[^.]*_[^.]*\.[^.]+\.lora_[AB]", re.DOTALL)
DEFAULT: Final = "default"
"""What an adapter without a name is called; no layer is."""
LAYER: Final = re.compile(
    r"\d+|\w*(proj|dense|query|key|value|fc\d?|linear\d?|attn|qkv|out|mlp|to_[qkv]|w\d|head|embed\w*)",
    re.DOTALL,
)
"""What the last component of a dotted path looks like, and the name of an adapter does not."""


class PrefixedKeys(KeyTable):
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


SCHEME = Scheme(
    name="prefixed",
    summary="flattened paths, then the adapter's name; a torch.save dict",
    example="encoder_layer_0_attention_query.default.lora_A",
    keys=PrefixedKeys(
        templates=(
            Template("{module}.{adapter}.lora_A", Slot.DOWN),
            Template("{module}.{adapter}.lora_B", Slot.UP),
            Template("{module}.{adapter}.alpha", Slot.ALPHA),
        ),
    ),
    paths=BareFlatPaths(),
    scale=FoldedScale(),
    roles=Roles(embeddings=FactorsOfTable(), has_convolutions=False),
    settings=Settings(),
    home=Home(weights_name="adapter_model.bin", suffix=".bin"),
    priority=3,
)
