"""Research code that multiplies from the right: ``x @ lora_A @ lora_B``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.adapter.keys import KeyTable, are_transposed
from loratool.adapter.scheme import Home, Scheme
from loratool.files.spec import StoredTensor
from loratool.names.paths.dotted import PathPaths
from loratool.schemes.parts.roles import FactorsOfTable, Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.tutorials import TEMPLATES, has_letters

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^(?!base_model\.model\.).*\.("
    r"(lora|LoRA)_?(mat(rix)?_|weight_)?[AB]|lora(_(layer|adapter|module))?\.((lora_)?[AB]|[01])"
    r"|w(eight)?_lora_[AB]|lora_(down|up)|lora_[ab]|[AB]|parametrizations\.weight\.\d+\.(lora_)?[AB])([._]weight)?$",
    "weights": ("adapter_model.safetensors", "adapter_model.bin"),
}


class TransposedKeys(KeyTable):
    """loralib's keys; that the factors are transposed only their shapes tell."""

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        if has_letters(tensors):
            return 0  # mlx reads those, or they are layers, which are never turned
        pairs = self.pairs(tensors)
        return self.factor_keys(tensors) if pairs and are_transposed(pairs) else 0


SCHEME = Scheme(
    name="transposed",
    summary="research code: A is (in, r), B is (r, out)",
    example="blocks.0.attn.qkv.lora_A",
    keys=TransposedKeys(
        foreign=("base_model.model.",),
        templates=TEMPLATES,
    ),
    paths=PathPaths(),
    scale=FoldedScale(),
    roles=Roles(embeddings=FactorsOfTable(), is_transposed=True, has_convolutions=False),
    settings=Settings(),
    home=Home(weights_name="adapter_model.safetensors", is_open=True),
    priority=2,
)
