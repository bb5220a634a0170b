"""OneTrainer until June 2026: dotted paths in which fused projections are apart ("OMI")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.part import Part
from loratool.adapter.scheme import Home, NoPlaceError, Scheme
from loratool.adapter.slots import Slot
from loratool.files.spec import StoredTensor
from loratool.names.paths.omi import OmiPaths
from loratool.schemes.parts.roles import LycorisRoles
from loratool.schemes.parts.scales import AlphaScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.tokens import BundledTokens
from loratool.values.expr import Expr
from loratool.variants import variant_templates

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {"keys": r"^(unet|transformer|clip_l|clip_g|t5|llama)\..+\.\w"}

SIGN: Final = re.compile(
    r"(clip_[lg]|t5|llama)\..+"
    r"|transformer\..+\.(qkv|\w+_attn_qkv|self_attn_qkv|kv_linear|linear1)\.\d"
    r"|transformer\..+mlp\.fc0"
    r"|unet\.(input_blocks|middle_block|output_blocks|time_embed|label_emb)\..+"
    r"|unet\..+\.attention\.attn\.(in_proj\.\d|out_proj)",
    re.DOTALL,
)
"""Modules that others call otherwise; the rest of such a file may be diffusers' too."""
MODULATION: Final = re.compile(r"(final_layer|joint_blocks\.\d+\.context_block)\.adaLN_modulation")


class OmiKeys(KeyTable):
    """Keys of which some have to be of modules that nobody else names so."""

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Return how many are factors, if there is any sign of this scheme."""
        parsed = [key for key in map(self.parse, tensors) if key is not None]
        has_sign = any(SIGN.fullmatch(key.module) for key in parsed)
        return sum(key.slot in self.factor_slots for key in parsed) if has_sign else 0


@dataclass(frozen=True)
class OmiRoles(LycorisRoles):
    """LyCORIS' way, but for magnitudes beside a B whose halves are exchanged."""

    def _stored_magnitude(self, part: Part) -> Expr:
        if MODULATION.search(part.module) and part.is_plain and not part.has_input_magnitudes:
            raise NoPlaceError(
                "magnitudes of the outputs of a modulation, whose halves OneTrainer exchanges "
                "in B alone",
                Slot.MAGNITUDE,
            )
        return super()._stored_magnitude(part)


SCHEME = Scheme(
    name="onetrainer",
    summary="OneTrainer until June 2026: native paths with fused projections apart (OMI)",
    example="transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight",
    keys=OmiKeys(
        modules=r"(unet|transformer|clip_l|clip_g|t5|llama)\..+",
        templates=(
            Template("{module}.lora_down.weight", Slot.DOWN),
            Template("{module}.lora_up.weight", Slot.UP),
            Template("{module}.lora_mid.weight", Slot.MID),
            Template("{module}.alpha", Slot.ALPHA),
            Template("{module}.dora_scale", Slot.MAGNITUDE),
            *variant_templates("{module}"),
        ),
    ),
    paths=OmiPaths(),
    scale=AlphaScale(),
    roles=OmiRoles(),
    settings=Settings(),
    home=Home(tokens=BundledTokens(are_stacks=True)),
    priority=2,
)
