"""The UNets of Stable Diffusion: LDM's (SGM's) numbering, and that of diffusers.

The native lists count every resnet and every sampler in one sequence; the hub's are nested by
level. Which number is which follows from the levels alone, so the tables are computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from loratool.names.family import CLIP_G, CLIP_L, Family, Release, Row, single
from loratool.names.templates import expand
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["kolors", "sd1", "sdxl", "sdxl-refiner", "svd"],
    "segments": [
        "add_embedding",
        "class_embedding",
        "conv_in",
        "conv_norm_out",
        "conv_out",
        "down_blocks",
        "encoder_hid_proj",
        "input_blocks",
        "label_emb",
        "mid_block",
        "middle_block",
        "out",
        "output_blocks",
        "time_embed",
        "time_embedding",
        "up_blocks",
    ],
}
"""How paths begin, in either naming."""

RESNETS: Final = 2
"""Resnets of each level on the way down; on the way up there is one more."""

RESNET: Final = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
SHORTCUT: Final = ("skip_connection", "conv_shortcut")

ATTENTION: Final = expand("{norm,proj_in,proj_out}")
ATTENTION_BLOCK: Final = expand(
    "transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}",
    "transformer_blocks.*.{norm1,norm2,norm3,ff.net.0.proj,ff.net.2}",
)
"""Both namings have the same modules within an attention."""
TIME_BLOCK: Final = (
    *(each.partition(".*.")[2] for each in ATTENTION_BLOCK),
    *expand("{norm_in,ff_in.net.0.proj,ff_in.net.2}"),
)
"""So they have within a block that looks along the frames of a video."""
TIME: Final = "time_stack"
"""What LDM calls the layers along the frames, of resnets and of attentions alike."""
TIME_EMBEDDING: Final = {
    "time_pos_embed.0": "time_pos_embed.linear_1",
    "time_pos_embed.2": "time_pos_embed.linear_2",
}

ENDS: Final = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
LABELS: Final = ("label_emb.0.0", "label_emb.0.2")


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a UNet.

    Attributes:
        depth: Transformer blocks in each of its attentions; 0 if it has none.
        widens: Whether it has more channels than the level above it.
    """

    depth: int
    widens: bool


def rows(
    levels: tuple[Level, ...], middle: int, label: str, *, sees_time: bool = False
) -> Iterator[Row]:
    """Yield the table of a UNet.

    Args:
        levels: From the finest to the coarsest.
        middle: Transformer blocks of the attention between the two halves.
        label: The hub's name of the embedding of what the model is conditioned on besides.
        sees_time: Whether each resnet and each attention has a part along the frames of a video.
    """
    resnet = video_resnet if sees_time else image_resnet
    attention = video_attention if sees_time else image_attention
    for native, hub in ENDS.items():
        yield single(native, hub)
    for number, native in enumerate(LABELS, 1):
        yield single(native, f"{label}.linear_{number}")
    for number in (0, 1):
        yield from resnet(f"middle_block.{2 * number}", f"mid_block.resnets.{number}", False)
    yield from attention("middle_block.1", "mid_block.attentions.0", middle)
    last = len(levels) - 1
    for i, level in enumerate(levels):
        first = (RESNETS + 1) * i
        for j in range(RESNETS):
            native, block = f"input_blocks.{first + j + 1}", f"down_blocks.{i}"
            yield from resnet(f"{native}.0", f"{block}.resnets.{j}", level.widens and j == 0)
            yield from attention(f"{native}.1", f"{block}.attentions.{j}", level.depth)
        if i < last:
            native = f"input_blocks.{first + RESNETS + 1}.0.op"
            yield single(native, f"down_blocks.{i}.downsamplers.0.conv")
    for i, level in enumerate(reversed(levels)):
        first = (RESNETS + 1) * i
        for j in range(RESNETS + 1):
            native, block = f"output_blocks.{first + j}", f"up_blocks.{i}"
            yield from resnet(f"{native}.0", f"{block}.resnets.{j}", True)
            yield from attention(f"{native}.1", f"{block}.attentions.{j}", level.depth)
        if i < last:
            native = f"output_blocks.{first + RESNETS}.{2 if level.depth else 1}.conv"
            yield single(native, f"up_blocks.{i}.upsamplers.0.conv")


def image_resnet(native: str, hub: str, has_shortcut: bool) -> Iterator[Row]:
    """Yield the rows of one resnet; a shortcut is a module only where the channels change."""
    for inner, name in RESNET.items():
        yield single(f"{native}.{inner}", f"{hub}.{name}")
    if has_shortcut:
        yield single(f"{native}.{SHORTCUT[0]}", f"{hub}.{SHORTCUT[1]}")


def video_resnet(native: str, hub: str, has_shortcut: bool) -> Iterator[Row]:
    """Yield the rows of one resnet and of that along the frames, which has no shortcut."""
    yield from image_resnet(native, f"{hub}.spatial_res_block", has_shortcut)
    yield from image_resnet(f"{native}.{TIME}", f"{hub}.temporal_res_block", False)


def image_attention(native: str, hub: str, depth: int) -> Iterator[Row]:
    """Yield the rows of one attention of ``depth`` transformer blocks; none if it has none."""
    if depth:
        for inner in ATTENTION:
            yield single(f"{native}.{inner}", f"{hub}.{inner}")
        for inner in ATTENTION_BLOCK:
            yield single(f"{native}.{inner}", f"{hub}.{inner}", depth)


def video_attention(native: str, hub: str, depth: int) -> Iterator[Row]:
    """Yield the rows of one attention and of that along the frames."""
    yield from image_attention(native, hub, depth)
    if depth:
        for inner in TIME_BLOCK:
            name = f"{hub}.temporal_transformer_blocks.*.{inner}"
            yield single(f"{native}.{TIME}.*.{inner}", name, depth)
        for inner, name in TIME_EMBEDDING.items():
            yield single(f"{native}.{inner}", f"{hub}.{name}")


HUB_NAMES: Final = Vocabulary(
    (
        *ENDS.values(),
        *expand(
            "time_embedding.cond_proj",
            "class_embedding",
            "{class_embedding,add_embedding}.linear_{1,2}",
            "encoder_hid_proj",
            "down_blocks.*.downsamplers.*.conv",
            "up_blocks.*.upsamplers.*.conv",
        ),
        *(
            f"{block}.resnets.*.{part}{inner}"
            for block in ("down_blocks.*", "mid_block", "up_blocks.*")
            for part in ("", "spatial_res_block.", "temporal_res_block.")
            for inner in (*RESNET.values(), SHORTCUT[1])
        ),
        *(
            f"{block}.attentions.*.{inner}"
            for block in ("down_blocks.*", "mid_block", "up_blocks.*")
            for inner in (
                *(f"temporal_transformer_blocks.*.{each}" for each in TIME_BLOCK),
                *TIME_EMBEDDING.values(),
            )
        ),
        *(
            f"{block}.{kind}.*.{inner}"
            for block in ("down_blocks.*", "mid_block", "up_blocks.*")
            for kind in ("attentions", "motion_modules")
            for inner in (*ATTENTION, *ATTENTION_BLOCK)
        ),
    )
)
"""Names of diffusers' UNets of any number of levels and blocks."""

NATIVE_NAMES: Final = Vocabulary(
    (
        *ENDS,
        *LABELS,
        "encoder_hid_proj",
        "input_blocks.*.*.op",
        "output_blocks.*.*.conv",
        *(
            f"{block}.{inner}"
            for block in ("input_blocks.*.*", "middle_block.*", "output_blocks.*.*")
            for inner in (
                *(*RESNET, SHORTCUT[0], *ATTENTION, *ATTENTION_BLOCK, *TIME_EMBEDDING),
                *(f"{TIME}.{each}" for each in RESNET),
                *(f"{TIME}.*.{each}" for each in TIME_BLOCK),
            )
        ),
    )
)
"""Names of LDM's UNets of any number of levels and blocks."""

SD1: Final = Family(
    "sd1",
    "unet",
    tuple(
        rows(
            (Level(1, False), Level(1, True), Level(1, True), Level(0, False)),
            middle=1,
            label="class_embedding",  # of the variants of SD 2 that take one
        )
    ),
    HUB_NAMES,
    NATIVE_NAMES,
    encoders={"text_encoder": CLIP_L},
    is_trained_native=False,
    releases=(
        Release("sd_v1", "stable-diffusion-v1"),
        Release("sd_v2", "stable-diffusion-v2", is_v2=True, width=1024),
    ),
    told_by=("attn2.to_k", "attn2.to_v"),
)
"""Stable Diffusion 1 and 2, whose modules have the same names.

The first has 768 inputs of the cross-attention.
"""

ENCODED: Final = single("encoder_hid_proj", "encoder_hid_proj")
"""What makes the encoder's states as wide as the model takes them, called alike."""

SDXL_ROWS: Final = tuple(
    rows(
        (Level(0, False), Level(2, True), Level(10, True)),
        middle=10,
        label="add_embedding",
    )
)

SDXL: Final = Family(
    "sdxl",
    "unet",
    SDXL_ROWS,
    HUB_NAMES,
    NATIVE_NAMES,
    encoders={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    releases=(
        Release(
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base",
            "https://github.com/Stability-AI/generative-models",
        ),
    ),
)
"""Stable Diffusion XL's base model, and that for inpainting."""

REFINER: Final = Family(
    "sdxl-refiner",
    "unet",
    tuple(
        rows(
            (Level(0, False), Level(4, True), Level(4, True), Level(0, False)),
            middle=4,
            label="add_embedding",
        )
    ),
    HUB_NAMES,
    NATIVE_NAMES,
    encoders={"text_encoder_2": CLIP_G},
    refines="sdxl",
    widths={".attn2.to_k": (1280,)},
)
"""Stable Diffusion XL's refiner, which has a level more and the second text encoder alone."""

KOLORS: Final = Family(
    "kolors",
    "unet",
    (*SDXL_ROWS, ENCODED),
    HUB_NAMES,
    NATIVE_NAMES,
    refines="sdxl",
)
"""Kolors, which is built as Stable Diffusion XL is, for the states of a language model."""

SVD: Final = Family(
    "svd",
    "unet",
    tuple(
        rows(
            (Level(1, False), Level(1, True), Level(1, True), Level(0, False)),
            middle=1,
            label="add_embedding",
            sees_time=True,
        )
    ),
    HUB_NAMES,
    NATIVE_NAMES,
    refines="sd1",
)
"""Stable Video Diffusion, which looks along the frames beside each layer within one."""

FAMILIES: Final = (SD1, SDXL, REFINER, KOLORS, SVD)
