"""Every layout through one suite, and the door that they come in by."""

from __future__ import annotations

import pytest
from fakes.finding import find_fakes

import loratool.base.layouts as package
from loratool.base.config import ModelConfig
from loratool.base.layout import Fused, Headers, Layout
from loratool.base.layouts import layout_of, layouts
from loratool.errors import BaseModelError

PLAIN = ("model.layers.0.self_attn.q_proj", "lm_head")
UNET = (
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "model.diffusion_model.out.2",
)
ORIGINAL = (
    *UNET,
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
    "first_stage_model.decoder.conv_in",
)
XL = (
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    "model.diffusion_model.out.2",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
    "conditioner.embedders.1.model.transformer.resblocks.0.attn",
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc",
)
FLUX = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "img_in")
ALL_IN_ONE = (
    *(f"model.diffusion_model.{name}" for name in FLUX),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    "vae.decoder.conv_in",
)
SAMPLES = {
    "transformers": Headers(PLAIN, ModelConfig()),
    "stable-diffusion": Headers(ORIGINAL, ModelConfig()),
    "stable-diffusion-xl": Headers(XL, ModelConfig()),
    "comfy": Headers(ALL_IN_ONE, ModelConfig()),
    "backbone": Headers(FLUX, ModelConfig()),
    "diffusers": Headers(("unet.conv_in",), ModelConfig(), ("unet",)),
    "gguf": Headers(
        ("token_embd", "blk.0.attn_q", "blk.0.ffn_up", "blk.0.ffn_up_exps", "output"),
        ModelConfig({"general.architecture": "llama"}),
    ),
    "trifold": Headers(("blk.0.self_attn.wqkv",), ModelConfig({"model_type": "trifold"})),
}


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


def test_every_file_is_a_layout_and_has_a_sample() -> None:
    assert {layout.name for layout in layouts()} == set(SAMPLES)


@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_layout_claims_its_own_most_specifically(name: str) -> None:
    assert layout_of(SAMPLES[name], name).name == name


@pytest.mark.parametrize("name", list(SAMPLES))
def test_paths_are_unique_and_of_modules_that_are_there(name: str) -> None:
    layout, headers = layout_of(SAMPLES[name], name), SAMPLES[name]
    paths = layout.paths(headers)
    assert set(paths) <= set(headers.modules)
    assert len(set(paths.values())) == len(paths)
    assert not set(paths.values()) & (set(headers.modules) - set(paths))


@pytest.mark.parametrize("name", list(SAMPLES))
def test_parts_and_whole_tell_the_same_fusion(name: str) -> None:
    layout, headers = layout_of(SAMPLES[name], name), SAMPLES[name]
    for module in {*headers.modules, *layout.paths(headers).values()}:
        fused = layout.fused(module, headers.config)
        if fused is not None:
            assert module in (fused.whole, *fused.parts)
            for other in (fused.whole, *fused.parts):
                assert layout.fused(other, headers.config) == fused


def test_original_namings_become_those_of_libraries() -> None:
    for name, component, local in (
        ("stable-diffusion", "unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("stable-diffusion", "text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("stable-diffusion", "vae", "decoder.conv_in"),
        ("stable-diffusion-xl", "unet", "conv_out"),
        ("stable-diffusion-xl", "text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("stable-diffusion-xl", "text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"),
        ("stable-diffusion-xl", "text_encoder_2", "text_model.encoder.layers.0.self_attn"),
        ("comfy", "transformer", "double_blocks.0.img_attn.qkv"),
        ("comfy", "text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("comfy", "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q"),
        ("backbone", "transformer", "single_blocks.0.linear1"),
    ):
        headers = SAMPLES[name]
        layout = layout_of(headers, "x")
        assert f"{component}.{local}" in layout.paths(headers).values(), (name, component, local)
        assert component in layout.components(headers)


@pytest.mark.parametrize(
    ("name", "family"),
    [("stable-diffusion", "sd1"), ("stable-diffusion-xl", "sdxl"), ("comfy", "flux")],
)
def test_a_single_file_tells_its_family(name: str, family: str) -> None:
    assert layout_of(SAMPLES[name], "x").family(SAMPLES[name]) == family


def test_two_claims_alike_are_an_error_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twin(Layout):
        def __init__(self, name: str) -> None:
            self.name = name

        def claims(self, headers: Headers) -> int:
            return 9

    for pair in (("one", "two"), ("two", "one")):
        monkeypatch.setattr(package, "layouts", lambda pair=pair: tuple(map(Twin, pair)))
        with pytest.raises(BaseModelError, match="claimed by"):
            layout_of(SAMPLES["transformers"], "x")


@pytest.mark.parametrize(
    ("rows", "total", "expected"),
    [
        ((), 9, (3, 3, 3)),
        ((), 10, None),
        ((5, 2, 2), 9, (5, 2, 2)),
        ((5, 2, 2), 10, None),
        ((9, 0, 0), 9, None),
    ],
)
def test_the_sizes_of_parts(
    rows: tuple[int, ...], total: int, expected: tuple[int, ...] | None
) -> None:
    assert Fused("w", ("a", "b", "c"), rows).sizes(total) == expected
