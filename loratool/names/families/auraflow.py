"""AuraFlow: the original names, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Row, single

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["auraflow"],
    "segments": [
        "cond_seq_linear",
        "context_embedder",
        "double_layers",
        "final_linear",
        "init_x_linear",
        "joint_transformer_blocks",
        "modF",
        "norm_out",
        "pos_embed",
        "proj_out",
        "single_layers",
        "single_transformer_blocks",
        "t_embedder",
        "time_step_proj",
    ],
}
"""How paths begin, in either naming."""

DOUBLE_LAYERS: Final = 4
SINGLE_LAYERS: Final = 32

ENDS: Final = {
    "init_x_linear": "pos_embed.proj",
    "cond_seq_linear": "context_embedder",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "final_linear": "proj_out",
}

FEED_FORWARD: Final = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}

JOINT: Final = {
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
    "attn.w2q": "attn.to_q",
    "attn.w2k": "attn.to_k",
    "attn.w2v": "attn.to_v",
    "attn.w2o": "attn.to_out.0",
    "attn.w1q": "attn.add_q_proj",
    "attn.w1k": "attn.add_k_proj",
    "attn.w1v": "attn.add_v_proj",
    "attn.w1o": "attn.to_add_out",
    **{f"mlpX.{native}": f"ff.{hub}" for native, hub in FEED_FORWARD.items()},
    **{f"mlpC.{native}": f"ff_context.{hub}" for native, hub in FEED_FORWARD.items()},
}

SINGLE: Final = {
    "modCX.1": "norm1.linear",
    "attn.w1q": "attn.to_q",
    "attn.w1k": "attn.to_k",
    "attn.w1v": "attn.to_v",
    "attn.w1o": "attn.to_out.0",
    **{f"mlp.{native}": f"ff.{hub}" for native, hub in FEED_FORWARD.items()},
}


def rows() -> Iterator[Row]:
    """Yield the table."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    yield single("modF.1", "norm_out.linear", swapped=True)
    for native, hub in JOINT.items():
        yield single(
            f"double_layers.*.{native}", f"joint_transformer_blocks.*.{hub}", DOUBLE_LAYERS
        )
    for native, hub in SINGLE.items():
        yield single(
            f"single_layers.*.{native}", f"single_transformer_blocks.*.{hub}", SINGLE_LAYERS
        )


AURAFLOW: Final = Family(
    "auraflow", "transformer", tuple(rows()), encoders={"text_encoder": "pile_t5xl"}
)
"""AuraFlow 0.1 to 0.3, and what is built on it (Pony 7)."""

FAMILIES: Final = (AURAFLOW,)
