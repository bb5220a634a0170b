"""Tiny pipelines, apart as libraries have them and in one file as they are published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loratool.names.families import family_named
from loratool.names.family import Family, Fusion
from loratool.names.open_clip import OPEN_CLIP, PARAMETERS

State = dict[str, torch.Tensor]
SCALED = re.compile(r"(\.(?:query|key)_norm)\.weight$")


def native(state: Mapping[str, torch.Tensor], family: Family) -> State:
    """Return a backbone's tensors under the names of the original checkpoint, fused there."""
    found: State = {}
    groups: dict[str, tuple[Fusion, dict[str, torch.Tensor]]] = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        row = family.to_native(module)
        if row is None:
            found[name] = value
            continue
        groups.setdefault(f"{row[0]}.{leaf}", (row[1], {}))[1][module] = value
    for name, (fusion, members) in groups.items():
        parts = [members[module] for module in fusion.modules]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        found[name] = torch.cat(joined.chunk(2)[::-1]) if fusion.swapped else joined
    return found


def open_clip(state: Mapping[str, torch.Tensor]) -> State:
    """Return a text model of transformers as OpenCLIP stores it."""
    named = {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": value
        for name, value in state.items()
    }
    parameters = {f"{hub}.weight": native for native, hub in PARAMETERS.items()}
    found: State = {}
    for name, value in native(named, OPEN_CLIP).items():
        if name in parameters:
            is_projection = parameters[name] == "text_projection"
            found[parameters[name]] = value.T.contiguous() if is_projection else value
        else:
            for leaf in ("weight", "bias"):
                if name.endswith(f".attn.{leaf}"):
                    name = f"{name.removesuffix(leaf)}in_proj_{leaf}"
            found[name] = value
    return found


@dataclass
class Pipeline:
    """A pipeline.

    Attributes:
        family: Of its backbone.
        models: Its models by component.
        prefixes: What stands before the names of each component in the file.
        open_clip: Which of them are in OpenCLIP's names.
    """

    family: str
    models: dict[str, torch.nn.Module]
    prefixes: dict[str, str]
    open_clip: tuple[str, ...] = ()
    config: Any = None

    def states(self) -> dict[str, State]:
        return {
            component: {k: v.detach().clone() for k, v in model.state_dict().items()}
            for component, model in self.models.items()
        }

    def file(self, states: Mapping[str, State]) -> State:
        """Return what the single file holds."""
        found: State = {}
        for component, state in states.items():
            if component in self.open_clip:
                state = open_clip(state)
            elif component.startswith("text_encoder"):
                inside = ("embeddings.", "encoder.layers.", "final_layer_norm")
                state = {
                    f"text_model.{k}" if k.startswith(inside) else k: v for k, v in state.items()
                }
            else:
                state = native(state, family_named(self.family))
                if self.family == "flux":  # whose norms have scales in its own code
                    state = {SCALED.sub(r"\1.scale", k): v for k, v in state.items()}
            found |= {f"{self.prefixes[component]}{k}": v for k, v in state.items()}
        return {k: v.contiguous().clone() for k, v in found.items()}


def clip(width: int, *, projects: bool, layers: int = 2) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=12,
        projection_dim=width,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def t5(width: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            vocab_size=40,
            feed_forward_proj="gated-gelu",
        )
    )


def stable_diffusion_1(encoder: str = "clip") -> Pipeline:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=encoder == "open-clip",
    )
    is_open = encoder == "open-clip"
    return Pipeline(
        "sd1",
        {"unet": unet, "text_encoder": clip(12, projects=False)},
        {
            "unet": "model.diffusion_model.",
            "text_encoder": f"cond_stage_model.{'model' if is_open else 'transformer'}.",
        },
        ("text_encoder",) if is_open else (),
        unet.config,
    )


def stable_diffusion_xl() -> Pipeline:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 32),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=20,
        transformer_layers_per_block=(1, 1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    )
    return Pipeline(
        "sdxl",
        {
            "unet": unet,
            "text_encoder": clip(8, projects=False),
            "text_encoder_2": clip(12, projects=True),
        },
        {
            "unet": "model.diffusion_model.",
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        ("text_encoder_2",),
        unet.config,
    )


def flux(prefix: str = "model.diffusion_model.", *, alone: bool = False) -> Pipeline:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    encoders = {} if alone else {"text_encoder": clip(8, projects=False), "text_encoder_2": t5(12)}
    return Pipeline(
        "flux",
        {"transformer": transformer, **encoders},
        {
            "transformer": prefix,
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.t5xxl.transformer.",
        },
        (),
        transformer.config,
    )


def stable_diffusion_3() -> Pipeline:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=24,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=20,
        out_channels=4,
    )
    return Pipeline(
        "sd3",
        {
            "transformer": transformer,
            "text_encoder": clip(8, projects=True),
            "text_encoder_2": clip(12, projects=True),
            "text_encoder_3": t5(12),
        },
        {
            "transformer": "model.diffusion_model.",
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer.",
        },
        (),
        transformer.config,
    )


PIPELINES = {
    "sd1": stable_diffusion_1,
    "sd2": lambda: stable_diffusion_1("open-clip"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "flux-alone": lambda: flux("", alone=True),
    "flux-wrapped": lambda: flux("diffusion_model.", alone=True),
}
