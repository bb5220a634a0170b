"""Cosmos: NVIDIA's names, and those of diffusers. The two generations have different ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import T5, Family, Row, single
from loratool.names.templates import expand
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["cosmos", "cosmos2"],
    "segments": [
        "affline_norm",
        "blocks",
        "crossattn_proj",
        "final_layer",
        "img_context_proj",
        "llm_adapter",
        "norm_out",
        "patch_embed",
        "proj_out",
        "t_embedder",
        "t_embedding_norm",
        "time_embed",
        "transformer_blocks",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 36
BLOCKS_OF_IMAGES: Final = 28

HUB_BLOCK: Final = "transformer_blocks"

PARTS: Final = ("attn1", "attn2", "ff")
"""What a block is made of; each part has a norm before it, with a modulation in two steps."""

ENDS: Final = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
FEED_FORWARD: Final = {"layer1": "net.0.proj", "layer2": "net.2"}

# The first generation

FIRST_ENDS: Final = {
    **ENDS,
    "affline_norm": "time_embed.norm",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.adaLN_modulation.2": "norm_out.linear_2",
}
FIRST_ATTENTION: Final = {
    "to_q.0": "to_q",
    "to_q.1": "norm_q",
    "to_k.0": "to_k",
    "to_k.1": "norm_k",
    "to_v.0": "to_v",
    "to_out.0": "to_out.0",
}


def first_rows() -> Iterator[Row]:
    """Yield the table of the first generation, whose blocks are numbered within a word."""
    for native, hub in FIRST_ENDS.items():
        yield single(native, hub)
    for number in range(BLOCKS):
        for index, part in enumerate(PARTS):
            block, hub_block = f"blocks.block{number}.blocks.{index}", f"{HUB_BLOCK}.{number}"
            for step in (1, 2):
                yield single(
                    f"{block}.adaLN_modulation.{step}",
                    f"{hub_block}.norm{index + 1}.linear_{step}",
                )
            inner = "block" if part == "ff" else "block.attn"
            for native, hub in (FEED_FORWARD if part == "ff" else FIRST_ATTENTION).items():
                yield single(f"{block}.{inner}.{native}", f"{hub_block}.{part}.{hub}")


COSMOS: Final = Family(
    "cosmos",
    "transformer",
    tuple(first_rows()),
    encoders={"text_encoder": T5},
    depths=(28,),
    widths={".attn1.to_q": (4096, 5120), ".attn2.to_k": (1024,)},
)
"""Cosmos 1.

In diffusers' names it has nothing that the second generation lacks. The smaller models of the
two are told by their widths, the larger ones by nothing.
"""

# The second generation

SECOND_ENDS: Final = {
    **ENDS,
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "crossattn_proj.0": "crossattn_proj.0",
    "img_context_proj.0": "img_context_proj.0",
}
"""The projections of texts and images are in some models of Cosmos 2.5 alone."""

SECOND_PARTS: Final = ("self_attn", "cross_attn", "mlp")
SECOND_ATTENTION: Final = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
OF_IMAGES: Final = expand("{q_img,k_img,v_img,q_img_norm,k_img_norm}")
"""What the second attention may have besides in the smaller models, called alike."""


def second_rows() -> Iterator[Row]:
    """Yield the table of the second generation."""
    block, hub_block = "blocks.*", f"{HUB_BLOCK}.*"
    for native, hub in SECOND_ENDS.items():
        yield single(native, hub)
    for number, (name, part) in enumerate(zip(SECOND_PARTS, PARTS, strict=True), 1):
        for step in (1, 2):
            yield single(
                f"{block}.adaln_modulation_{name}.{step}",
                f"{hub_block}.norm{number}.linear_{step}",
                BLOCKS,
            )
        for native, hub in (FEED_FORWARD if part == "ff" else SECOND_ATTENTION).items():
            yield single(f"{block}.{name}.{native}", f"{hub_block}.{part}.{hub}", BLOCKS)
    for name in OF_IMAGES:
        yield single(f"{block}.cross_attn.{name}", f"{hub_block}.attn2.{name}", BLOCKS_OF_IMAGES)


SECOND_ROWS: Final = tuple(second_rows())

COSMOS2: Final = Family(
    "cosmos2",
    "transformer",
    SECOND_ROWS,
    native_names=Vocabulary(
        (
            *(row.native for row in SECOND_ROWS),
            *expand(
                "llm_adapter.embed",
                "llm_adapter.blocks.*.{self_attn,cross_attn}.{q_proj,k_proj,v_proj,o_proj}",
                "llm_adapter.blocks.*.{self_attn,cross_attn}.{q_norm,k_norm}",
                "llm_adapter.blocks.*.{norm_self_attn,norm_cross_attn,norm_mlp,mlp.0,mlp.2}",
                "llm_adapter.{in_proj,out_proj,norm}",
            ),
        )
    ),
    depths=(28,),
    widths={".attn1.to_q": (2048, 5120), ".attn2.to_k": (1024,)},
)
"""Cosmos 2 and 2.5, and Anima, which is built on it.

Anima's adapter of the language model is a component of its own in diffusers.
"""

FAMILIES: Final = (COSMOS, COSMOS2)
