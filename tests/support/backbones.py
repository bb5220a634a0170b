"""The backbones of pipelines as diffusers builds them, at the depth of the real models.

Built on the meta device they cost nothing but their modules. Where the releases of a family have
different modules, several models show all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

__all__ = ["BACKBONES", "Build"]

Build = Callable[[], "torch.nn.Module | tuple[torch.nn.Module, ...]"]


def built(name: str, **options: Any) -> torch.nn.Module:
    """Return a model of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(**options)  # type: ignore[no-any-return]


def unet_of_xl(**options: Any) -> torch.nn.Module:
    """Return a U-Net of Stable Diffusion XL's kind."""
    return built(
        "UNet2DConditionModel",
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        **options,
    )


def refiner() -> torch.nn.Module:
    return unet_of_xl(
        down_block_types=(
            *("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(384, 768, 1536, 1536),
        attention_head_dim=(6, 12, 24, 24),
        cross_attention_dim=1280,
        transformer_layers_per_block=4,
        projection_class_embeddings_input_dim=2560,
    )


def kolors() -> torch.nn.Module:
    return unet_of_xl(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        projection_class_embeddings_input_dim=5632,
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
    )


def stable_video() -> torch.nn.Module:
    block, crossed = "BlockSpatioTemporal", "CrossAttn"
    return built(
        "UNetSpatioTemporalConditionModel",
        down_block_types=(*(f"{crossed}Down{block}",) * 3, f"Down{block}"),
        up_block_types=(f"Up{block}", *(f"{crossed}Up{block}",) * 3),
    )


def stable_cascade() -> torch.nn.Module:
    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return built(
        "StableCascadeUNet",
        in_channels=16,
        out_channels=16,
        timestep_ratio_embedding_dim=64,
        patch_size=1,
        conditioning_dim=2048,
        block_out_channels=(2048, 2048),
        num_attention_heads=(32, 32),
        down_num_layers_per_block=(8, 24),
        up_num_layers_per_block=(24, 8),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(block, block),
        clip_text_in_channels=1280,
        clip_text_pooled_in_channels=1280,
        clip_image_in_channels=768,
        clip_seq=4,
        kernel_size=3,
        dropout=(0.1, 0.1),
        self_attn=True,
        timestep_conditioning_type=("sca", "crp"),
        switch_level=(False,),
    )


def wan() -> Iterator[torch.nn.Module]:
    yield built("WanTransformer3DModel", image_dim=1280, added_kv_proj_dim=5120)
    for width, depth, every in ((5120, 40, 5), (1536, 30, 2)):
        yield built(
            "WanVACETransformer3DModel",
            num_attention_heads=width // 128,
            num_layers=depth,
            vace_layers=list(range(0, depth, every)),
        )


def wan_animate() -> torch.nn.Module:
    return built("WanAnimateTransformer3DModel", added_kv_proj_dim=5120)


def ltx2() -> Iterator[torch.nn.Module]:
    yield built("LTX2VideoTransformer3DModel")
    later = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod")
    yield built("LTX2VideoTransformer3DModel", **dict.fromkeys(later, True))


def cosmos2() -> Iterator[torch.nn.Module]:
    yield built("CosmosTransformer3DModel", num_layers=36, extra_pos_embed_type=None)
    yield built(
        "CosmosTransformer3DModel",
        num_attention_heads=16,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=100352,
        img_context_dim_in=1152,
    )


def cogvideox() -> Iterator[torch.nn.Module]:
    yield built("CogVideoXTransformer3DModel")
    yield built(
        "CogVideoXTransformer3DModel", num_attention_heads=48, num_layers=42, ofs_embed_dim=512
    )


def hunyuan_dit() -> torch.nn.Module:
    return built(
        "HunyuanDiT2DModel",
        num_layers=40,
        in_channels=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        sample_size=128,
        cross_attention_dim=1024,
        learn_sigma=True,
    )


BACKBONES: dict[str, Build] = {
    "animatediff": lambda: built("MotionAdapter"),
    "cogvideox": lambda: tuple(cogvideox()),
    "cosmos": lambda: built("CosmosTransformer3DModel", num_layers=36),
    "cosmos2": lambda: tuple(cosmos2()),
    "hunyuan-dit": hunyuan_dit,
    "kolors": kolors,
    "ltx-2": lambda: tuple(ltx2()),
    "ltx-video": lambda: built("LTXVideoTransformer3DModel", num_layers=48),
    "mochi": lambda: built("MochiTransformer3DModel"),
    "pixart": lambda: built(
        "PixArtTransformer2DModel", caption_channels=4096, use_additional_conditions=True
    ),
    "sana": lambda: built("SanaTransformer2DModel", num_layers=60, qk_norm="rms_norm_across_heads"),
    "sana-sprint": lambda: built(
        "SanaTransformer2DModel",
        num_layers=60,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    ),
    "sdxl-refiner": refiner,
    "stable-cascade": stable_cascade,
    "svd": stable_video,
    "wan": lambda: tuple(wan()),
    "wan-animate": wan_animate,
}
"""By the name of the family."""
