"""HunyuanVideo 1.0 and 1.5: the original names, ComfyUI's, and those of diffusers.

The checkpoints of 1.5 have queries, keys and values apart as diffusers does; those for ComfyUI
fuse them like 1.0, and are what loaders of native names know. ComfyUI's own modules go by the
names of Flux.1, whatever the file was; it reads adapters in both namings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from loratool.names.family import CLIP_L, Family, Fusion, Row, single
from loratool.names.templates import expand

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["hunyuan-video", "hunyuan-video-1.5"],
    "segments": [
        "byt5_in",
        "cond_type_embed",
        "cond_type_embedding",
        "context_embedder",
        "context_embedder_2",
        "double_blocks",
        "final_layer",
        "guidance_in",
        "image_embedder",
        "img_in",
        "norm_out",
        "proj_out",
        "single_blocks",
        "single_transformer_blocks",
        "time_embed",
        "time_in",
        "time_text_embed",
        "transformer_blocks",
        "txt_in",
        "vector_in",
        "vision_in",
        "x_embedder",
    ],
}
"""How paths begin, in either naming."""

DOUBLE_BLOCKS: Final = 20
SINGLE_BLOCKS: Final = 40
NEW_BLOCKS: Final = 54
"""Of 1.5, whose blocks all have two streams."""
REFINER_BLOCKS: Final = 2

TEXT: Final = {
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
}

REFINER: Final = "txt_in.individual_token_refiner.blocks.*"
HUB_REFINER: Final = "context_embedder.token_refiner.refiner_blocks.*"
REFINED: Final = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}

STREAMS: Final = {
    "img_mod.linear": "norm1.linear",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "img_attn_proj": "attn.to_out.0",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mod.linear": "norm1_context.linear",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
ATTENTIONS: Final = {"img": "attn.to_{}", "txt": "attn.add_{}_proj"}

MERGED: Final = {
    "modulation.linear": "norm.linear",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "linear2": "proj_out",
}

OLD_ENDS: Final = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}

NEW_ENDS: Final = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "cond_type_embedding": "cond_type_embed",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "final_layer.linear": "proj_out",
}

RENAMED: Final = (
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_mod.linear", "_mod.lin"),
    (".modulation.linear", ".modulation.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
)
"""What ComfyUI makes of the names of a checkpoint when it loads one."""


def common_rows(blocks: int) -> Iterator[Row]:
    """Yield the rows of what both models have."""
    yield single("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for native, hub in TEXT.items():
        yield single(native, hub)
    parts = tuple(f"{HUB_REFINER}.attn.to_{each}" for each in "qkv")
    yield Row(f"{REFINER}.self_attn_qkv", Fusion(parts), REFINER_BLOCKS)
    for native, hub in REFINED.items():
        yield single(f"{REFINER}.{native}", f"{HUB_REFINER}.{hub}", REFINER_BLOCKS)
    for native, hub in STREAMS.items():
        yield single(f"double_blocks.*.{native}", f"transformer_blocks.*.{hub}", blocks)
    for stream, pattern in ATTENTIONS.items():
        parts = tuple(f"transformer_blocks.*.{pattern.format(each)}" for each in "qkv")
        yield Row(f"double_blocks.*.{stream}_attn_qkv", Fusion(parts), blocks)


def rows() -> Iterator[Row]:
    """Yield the table of 1.0."""
    for native, hub in OLD_ENDS.items():
        yield single(native, hub)
    yield from common_rows(DOUBLE_BLOCKS)
    block, hub_block = "single_blocks.*", "single_transformer_blocks.*"
    for native, hub in MERGED.items():
        yield single(f"{block}.{native}", f"{hub_block}.{hub}", SINGLE_BLOCKS)
    merged = expand(f"{hub_block}.{{attn.to_q,attn.to_k,attn.to_v,proj_mlp}}")
    fusion = Fusion(merged, sizes="input", shares=(1, 1, 1, 4))
    yield Row(f"{block}.linear1", fusion, SINGLE_BLOCKS)


def new_rows() -> Iterator[Row]:
    """Yield the table of 1.5."""
    for native, hub in NEW_ENDS.items():
        yield single(native, hub)
    yield from common_rows(NEW_BLOCKS)


def apart_rows() -> Iterator[Row]:
    """Yield the rows of 1.5 in which the original has apart what ComfyUI's files fuse."""
    for stream, pattern in ATTENTIONS.items():
        for each in "qkv":
            yield single(
                f"double_blocks.*.{stream}_attn_{each}",
                f"transformer_blocks.*.{pattern.format(each)}",
                NEW_BLOCKS,
            )


def renamed(table: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows that go by another name in ComfyUI."""
    for row in table:
        native = row.native
        for old, new in RENAMED:
            native = native.replace(old, new)
        if native != row.native:
            yield replace(row, native=native)


ROWS: Final = tuple(rows())
NEW_ROWS: Final = tuple(new_rows())

HUNYUAN_VIDEO: Final = Family(
    "hunyuan-video",
    "transformer",
    ROWS,
    others=tuple(renamed(ROWS)),
    refines="flux",
    encoders={"text_encoder": "llama", "text_encoder_2": CLIP_L},
)
"""HunyuanVideo from text and from images, and what is built on it (SkyReels V1, FramePack).

What an adapter has of the first blocks alone is the same in Flux.1, and taken for it: under names
that ComfyUI reads for both.
"""

HUNYUAN_VIDEO_15: Final = Family(
    "hunyuan-video-1.5",
    "transformer",
    NEW_ROWS,
    others=(*apart_rows(), *renamed(NEW_ROWS)),
    refines="flux",
    encoders={"text_encoder": "qwen25_7b", "text_encoder_2": "byt5_small"},
    widths={".attn.to_q": (2048,), ".img_attn_qkv": (2048,), ".img_attn.qkv": (2048,)},
)
"""HunyuanVideo 1.5, from text and from images."""

FAMILIES: Final = (HUNYUAN_VIDEO, HUNYUAN_VIDEO_15)
