"""Microsoft's loralib: bare parameters beside the weights; alpha lives in the training code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from loratool.adapter.keys import KeyTable, are_upright
from loratool.adapter.scheme import Home, Scheme, Written
from loratool.files.spec import StoredTensor
from loratool.names.paths.dotted import PathPaths
from loratool.schemes.parts.peft_config import PeftSettings
from loratool.schemes.parts.roles import FactorsOfTable, Roles
from loratool.schemes.parts.scales import AlphaScale, ConfiguredScale, FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.tutorials import TEMPLATES, has_letters, may_be_torchtunes
from loratool.values.expr import Scaled

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^(?!base_model\.model\.).*\.("
    r"(lora|LoRA)_?(mat(rix)?_|weight_)?[AB]|lora(_(layer|adapter|module))?\.((lora_)?[AB]|[01])"
    r"|w(eight)?_lora_[AB]|lora_(down|up)|lora_[ab]|[AB]|parametrizations\.weight\.\d+\.(lora_)?[AB])([._]weight)?$",
    "weights": ("adapter_model.safetensors", "adapter_model.bin"),
}


class LoralibKeys(KeyTable):
    """The same keys may hold transposed factors; the ranks of each pair tell."""

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        count = self.factor_keys(tensors)
        if has_letters(tensors):
            pairs = self.pairs(tensors)
            if may_be_torchtunes(tensors):
                return 0
            return count if 2 * len(pairs) == count and are_upright(pairs) else 0
        wrong = sum(
            down.spec.shape[0] % max(1, up.spec.shape[1]) != 0
            and down.spec.shape[1] == up.spec.shape[0]
            for down, up in self.pairs(tensors)
        )
        return max(1, count - 2 * wrong) if count else 0


class LoralibSettings(Settings):
    """Nothing is recorded: the scale is in the code that makes the layers."""

    def notes(self, written: Written) -> Iterator[str]:
        """Yield what the code has to say, where the input said it."""
        parts = [item.part for item in written.modules]
        is_folded = any(isinstance(part.values.get(part.slots[1]), Scaled) for part in parts)
        if is_folded or written.config is not None:
            yield "loralib keeps its scale in the code: make the layers with lora_alpha = r"


SCHEME = Scheme(
    name="loralib",
    summary="microsoft/LoRA, bare parameters",
    example="transformer.h.0.attn.c_attn.lora_A",
    keys=LoralibKeys(
        foreign=("base_model.model.",),
        templates=TEMPLATES,
    ),
    paths=PathPaths(),
    scale=FoldedScale(),
    roles=Roles(embeddings=FactorsOfTable(), has_convolutions=False),
    settings=LoralibSettings(),
    home=Home(weights_name="adapter_model.safetensors", is_open=True),
    beside={
        "config": (ConfiguredScale(), PeftSettings()),
        "alpha": (AlphaScale(), LoralibSettings()),
    },
)
