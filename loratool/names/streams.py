"""The blocks of Flux.1, which other families have too: two streams, then both of them as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Fusion, Row, single
from loratool.names.templates import expand

__all__ = ["merged_rows", "stream_rows"]

STREAMS: Final = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}

STREAM_MODULATION: Final = {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}

STREAM_FUSIONS: Final = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}

MERGED: Final = {
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}

MERGED_MODULATION: Final = {"modulation.lin": "norm.linear"}


def stream_rows(count: int, *, is_modulated: bool = True) -> Iterator[Row]:
    """Yield the rows of the blocks with a stream for each of image and text.

    Args:
        count: How many blocks there are.
        is_modulated: Whether each of them makes its own modulation.
    """
    block, hub_block = "double_blocks.*", "transformer_blocks.*"
    names = STREAMS | STREAM_MODULATION if is_modulated else STREAMS
    for native, hub in names.items():
        yield single(f"{block}.{native}", f"{hub_block}.{hub}", count)
    for native, parts in STREAM_FUSIONS.items():
        fusion = Fusion(tuple(f"{hub_block}.{part}" for part in parts))
        yield Row(f"{block}.{native}", fusion, count)


def merged_rows(count: int, *, is_modulated: bool = True) -> Iterator[Row]:
    """Yield the rows of the blocks with one stream; the arguments are those of the others."""
    block, hub_block = "single_blocks.*", "single_transformer_blocks.*"
    names = MERGED | MERGED_MODULATION if is_modulated else MERGED
    for native, hub in names.items():
        yield single(f"{block}.{native}", f"{hub_block}.{hub}", count)
    merged = expand(f"{hub_block}.{{attn.to_q,attn.to_k,attn.to_v,proj_mlp}}")
    yield Row(f"{block}.linear1", Fusion(merged, sizes="input", shares=(1, 1, 1, 4)), count)
