"""LTX-Video and LTX-2: Lightricks' names, and those of diffusers.

Within the blocks both namings have the same projections; only what surrounds them, and the norms
of queries and keys, are called otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from loratool.names.family import T5, Family, Row, single
from loratool.names.templates import expand
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["ltx-2", "ltx-video"],
    "segments": [
        "adaln_single",
        "audio_adaln_single",
        "audio_caption_projection",
        "audio_embeddings_connector",
        "audio_patchify_proj",
        "audio_proj_in",
        "audio_proj_out",
        "audio_prompt_adaln",
        "audio_prompt_adaln_single",
        "audio_time_embed",
        "av_ca_a2v_gate_adaln_single",
        "av_ca_audio_scale_shift_adaln_single",
        "av_ca_v2a_gate_adaln_single",
        "av_ca_video_scale_shift_adaln_single",
        "av_cross_attn_audio_scale_shift",
        "av_cross_attn_audio_v2a_gate",
        "av_cross_attn_video_a2v_gate",
        "av_cross_attn_video_scale_shift",
        "caption_projection",
        "patchify_proj",
        "proj_in",
        "proj_out",
        "prompt_adaln",
        "prompt_adaln_single",
        "text_embedding_projection",
        "time_embed",
        "transformer_blocks",
        "video_embeddings_connector",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 48

PROJECTIONS: Final = {"patchify_proj": "proj_in", "proj_out": "proj_out"}
AUDIO_PROJECTIONS: Final = {
    "audio_patchify_proj": "audio_proj_in",
    "audio_proj_out": "audio_proj_out",
}

MODULATION: Final = {"adaln_single": "time_embed"}
MODULATIONS: Final = {
    **MODULATION,
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
"""Those of the prompt are in LTX-2.3 alone."""

MODULATED: Final = expand("emb.timestep_embedder.linear_{1,2}", "linear")

ATTENTION: Final = {
    **{name: name for name in expand("{to_q,to_k,to_v,to_out.0}")},
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
GATED: Final = {**ATTENTION, "to_gate_logits": "to_gate_logits"}
"""Attention may have gates from LTX-2.3 on."""

FEED_FORWARD: Final = expand("{net.0.proj,net.2}")


def rows(
    ends: Mapping[str, str],
    modulations: Mapping[str, str],
    captions: Iterable[str],
    attention: Mapping[str, str],
    attentions: Iterable[str],
    feed_forwards: Iterable[str],
) -> Iterator[Row]:
    """Yield the table of a model.

    Args:
        ends: Its first and last layers.
        modulations: What its modulations are called in either naming.
        captions: What the projections of its captions are called in both.
        attention: The layers of an attention in either naming.
        attentions: The attentions of a block.
        feed_forwards: The feed-forward networks of a block.
    """
    for native, hub in ends.items():
        yield single(native, hub)
    for native, hub in modulations.items():
        for inner in MODULATED:
            yield single(f"{native}.{inner}", f"{hub}.{inner}")
    for name in captions:
        for number in (1, 2):
            yield single(f"{name}.linear_{number}", f"{name}.linear_{number}")
    for name in attentions:
        for native, hub in attention.items():
            block = f"transformer_blocks.*.{name}"
            yield single(f"{block}.{native}", f"{block}.{hub}", BLOCKS)
    for name in feed_forwards:
        for inner in FEED_FORWARD:
            layer = f"transformer_blocks.*.{name}.{inner}"
            yield single(layer, layer, BLOCKS)


LTX: Final = Family(
    "ltx-video",
    "transformer",
    tuple(
        rows(
            PROJECTIONS,
            MODULATION,
            ["caption_projection"],
            ATTENTION,
            ["attn1", "attn2"],
            ["ff"],
        )
    ),
    encoders={"text_encoder": T5},
    depths=(28,),
    widths={".attn1.to_q": (2048, 4096), ".attn2.to_k": (2048, 4096)},
)
"""LTX-Video of 13 billion parameters, and the smaller one, which has fewer of the same blocks."""

ROWS: Final = tuple(
    rows(
        PROJECTIONS | AUDIO_PROJECTIONS,
        MODULATIONS,
        ["caption_projection", "audio_caption_projection"],
        GATED,
        expand("{,audio_}{attn1,attn2}", "{audio_to_video_attn,video_to_audio_attn}"),
        ["ff", "audio_ff"],
    )
)

CONNECTORS: Final = expand("{video,audio}_embeddings_connector.transformer_1d_blocks.*")

LTX2: Final = Family(
    "ltx-2",
    "transformer",
    ROWS,
    native_names=Vocabulary(
        (
            *(row.native for row in ROWS),
            *(f"{block}.attn1.{inner}" for block in CONNECTORS for inner in GATED),
            *(f"{block}.ff.{inner}" for block in CONNECTORS for inner in FEED_FORWARD),
            *expand("text_embedding_projection.{,video_,audio_}aggregate_embed"),
        )
    ),
    refines="ltx-video",
    encoders={"text_encoder": "gemma3_12b"},
)
"""LTX-2, which has a second stream for sound, and its later releases.

What it shares with LTX-Video is called alike in both, in either naming. What connects it with its
text encoder is a component of its own in diffusers.
"""

FAMILIES: Final = (LTX, LTX2)
