"""XLabs' names of the attention processors of Flux.1, and the modules of diffusers they adapt."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.paths.component import EachAlone

__all__ = ["XlabsPaths"]

LEAVES: Final = {
    "double_blocks.qkv_lora1.q": "transformer_blocks.{}.attn.to_q",
    "double_blocks.qkv_lora1.k": "transformer_blocks.{}.attn.to_k",
    "double_blocks.qkv_lora1.v": "transformer_blocks.{}.attn.to_v",
    "double_blocks.qkv_lora2.q": "transformer_blocks.{}.attn.add_q_proj",
    "double_blocks.qkv_lora2.k": "transformer_blocks.{}.attn.add_k_proj",
    "double_blocks.qkv_lora2.v": "transformer_blocks.{}.attn.add_v_proj",
    "double_blocks.proj_lora1": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.proj_lora2": "transformer_blocks.{}.attn.to_add_out",
    "single_blocks.qkv_lora.q": "single_transformer_blocks.{}.attn.to_q",
    "single_blocks.qkv_lora.k": "single_transformer_blocks.{}.attn.to_k",
    "single_blocks.qkv_lora.v": "single_transformer_blocks.{}.attn.to_v",
    "single_blocks.proj_lora": "single_transformer_blocks.{}.proj_out",
}
"""Number 1 is of the image, 2 of the text; ``proj_lora`` of a single block is of all inputs."""
MODULE: Final = re.compile(
    r"(?:diffusion_model\.)?(?P<kind>double_blocks|single_blocks)\.(?P<block>\d+)\.processor\."
    r"(?P<leaf>.+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class XlabsPaths(EachAlone):
    """``double_blocks.0.processor.qkv_lora1``, of Flux' transformer."""

    has_components: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Refuse to.

        Raises:
            UnsupportedError: In any case.
        """
        raise UnsupportedError(module, "is not written in XLabs' names")

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the modules of diffusers' Flux."""
        found: dict[str, tuple[str, ...]] = {}
        for site in sites:
            match = MODULE.fullmatch(site.module)
            leaf = LEAVES.get(f"{match['kind']}.{match['leaf']}") if match else None
            path = f"transformer.{leaf.format(match['block'])}" if leaf and match else ""
            found[site.module] = (path,) if path else ()
        return Names(found, "flux", frozenset({"transformer"}))
