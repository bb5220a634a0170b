"""Wan: the original names, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Fusion, Row, single
from loratool.names.templates import expand
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["wan", "wan-animate"],
    "segments": [
        "audio_injector",
        "audio_proj",
        "blocks",
        "casual_audio_encoder",
        "cond_encoder",
        "condition_embedder",
        "control_adapter",
        "face_adapter",
        "face_encoder",
        "frame_packer",
        "head",
        "img_emb",
        "motion_encoder",
        "patch_embedding",
        "pose_patch_embedding",
        "proj_out",
        "ref_conv",
        "text_embedding",
        "time_embedding",
        "time_projection",
        "vace_blocks",
        "vace_patch_embedding",
    ],
}
"""How paths begin, in either naming."""

BLOCKS: Final = 40
VACE_BLOCKS: Final = 15

ENDS: Final = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
"""Those of images are in the models that begin from one."""

ATTENTIONS: Final = {"self_attn": "attn1", "cross_attn": "attn2"}

ATTENTION: Final = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

OF_IMAGES: Final = {
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}

BLOCK: Final = {
    "norm3": "norm2",  # numbered by place in the one naming, by what they precede in the other
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def blocks(name: str, count: int) -> Iterator[Row]:
    """Yield the rows of ``count`` blocks called ``name`` in either naming."""
    for attention, hub_attention in ATTENTIONS.items():
        for native, hub in ATTENTION.items():
            yield single(f"{name}.*.{attention}.{native}", f"{name}.*.{hub_attention}.{hub}", count)
    for native, hub in BLOCK.items():
        yield single(f"{name}.*.{native}", f"{name}.*.{hub}", count)


def rows() -> Iterator[Row]:
    """Yield the table that all of its models share."""
    for native, hub in ENDS.items():
        yield single(native, hub)
    yield from blocks("blocks", BLOCKS)
    for native, hub in OF_IMAGES.items():
        yield single(f"blocks.*.{native}", f"blocks.*.{hub}", BLOCKS)


def vace_rows() -> Iterator[Row]:
    """Yield the rows of VACE's second stack of blocks, the first of which has a layer more."""
    yield single("vace_patch_embedding", "vace_patch_embedding")
    yield single("vace_blocks.0.before_proj", "vace_blocks.0.proj_in")
    yield single("vace_blocks.*.after_proj", "vace_blocks.*.proj_out", VACE_BLOCKS)
    yield from blocks("vace_blocks", VACE_BLOCKS)


ROWS: Final = tuple(rows())
WAN_ROWS: Final = (*ROWS, *vace_rows())

NATIVE_NAMES: Final = Vocabulary(
    (
        *(row.native for row in WAN_ROWS),
        *expand(
            "ref_conv",
            "control_adapter.conv",
            "control_adapter.residual_blocks.*.{conv1,conv2}",
            "cond_encoder",
            "frame_packer.{proj,proj_2x,proj_4x}",
            "casual_audio_encoder.encoder.{conv1_local,conv1_global,conv2,conv3}.conv",
            "casual_audio_encoder.encoder.final_linear",
            "audio_injector.injector.*.{q,k,v,o,norm_q,norm_k}",
            "audio_injector.injector_adain_layers.*.linear",
            "audio_injector.injector_adain_output_layers.*",
            "audio_proj.{audio_proj_glob_1,audio_proj_glob_2,audio_proj_glob_3}.layer",
            "audio_proj.audio_proj_glob_norm.layer",
            "blocks.*.audio_cross_attn_wrapper.norm1_audio",
            "blocks.*.audio_cross_attn_wrapper.audio_cross_attn.{q,k,v,o,norm_q,norm_k}",
        ),
    )
)
"""With names of what diffusers has not: Fun's control, and models that speak."""

WAN: Final = Family(
    "wan",
    "transformer",
    WAN_ROWS,
    native_names=NATIVE_NAMES,
    depths=(30,),
    encoders={"text_encoder": "umt5xxl"},
)
"""Wan 2.1 and 2.2, from text, from images, and VACE; smaller models have fewer of the blocks."""

FACE_BLOCKS: Final = 8
MOTION_BLOCKS: Final = 7
MOTION_LAYERS: Final = 5
CONVOLUTIONS: Final = "motion_encoder.enc.net_app.convs"

ANIMATE_ENDS: Final = {
    "pose_patch_embedding": "pose_patch_embedding",
    "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
    "face_encoder.conv2.conv": "face_encoder.conv2",
    "face_encoder.conv3.conv": "face_encoder.conv3",
    "face_encoder.out_proj": "face_encoder.out_proj",
    f"{CONVOLUTIONS}.0.0": "motion_encoder.conv_in",
    f"{CONVOLUTIONS}.{MOTION_BLOCKS + 1}": "motion_encoder.conv_out",
}
MOTION_BLOCK: Final = {"conv1.0": "conv1", "conv2.1": "conv2", "skip.1": "conv_skip"}

FACE, HUB_FACE = "face_adapter.fuser_blocks.*", "face_adapter.*"
FACE_BLOCK: Final = {
    "linear1_q": "to_q",
    "linear2": "to_out",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}


def animate_rows() -> Iterator[Row]:
    """Yield the rows of what Animate has besides, for the pose and the face."""
    for native, hub in ANIMATE_ENDS.items():
        yield single(native, hub)
    for number in range(MOTION_BLOCKS):
        for native, hub in MOTION_BLOCK.items():
            yield single(
                f"{CONVOLUTIONS}.{number + 1}.{native}", f"motion_encoder.res_blocks.{number}.{hub}"
            )
    yield single("motion_encoder.enc.fc.*", "motion_encoder.motion_network.*", MOTION_LAYERS)
    for native, hub in FACE_BLOCK.items():
        yield single(f"{FACE}.{native}", f"{HUB_FACE}.{hub}", FACE_BLOCKS)
    halves = Fusion((f"{HUB_FACE}.to_k", f"{HUB_FACE}.to_v"))
    yield Row(f"{FACE}.linear1_kv", halves, FACE_BLOCKS)


WAN_ANIMATE: Final = Family(
    "wan-animate",
    "transformer",
    (*ROWS, *animate_rows()),
    refines="wan",
    encoders={"text_encoder": "umt5xxl"},
)
"""Wan 2.2 Animate, which fuses keys and values for the face."""

FAMILIES: Final = (WAN, WAN_ANIMATE)
