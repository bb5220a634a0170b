"""OneTrainer's files of 2025 and 2026: every part of a fused projection is one of its own.

Names and exchanged halves are those of the key sets in its source (``modules/util/convert/lora``,
until June 2026); what they mean is written out here by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import LoratoolError, UnsupportedError

Tensors = dict[str, torch.Tensor]
WIDTH = 8

NAMES: dict[str, dict[str, str]] = {
    "flux": {
        "transformer.img_in.proj": "transformer.x_embedder",
        "transformer.txt_in": "transformer.context_embedder",
        "transformer.time_in.in_layer": "transformer.time_text_embed.timestep_embedder.linear_1",
        "transformer.double_blocks.0.img_attn.qkv.0": "transformer.transformer_blocks.0.attn.to_q",
        "transformer.double_blocks.0.img_attn.qkv.2": "transformer.transformer_blocks.0.attn.to_v",
        "transformer.double_blocks.18.txt_attn.qkv.1": (
            "transformer.transformer_blocks.18.attn.add_k_proj"
        ),
        "transformer.double_blocks.0.img_mod.lin": "transformer.transformer_blocks.0.norm1.linear",
        "transformer.single_blocks.3.linear1.1": (
            "transformer.single_transformer_blocks.3.attn.to_k"
        ),
        "transformer.single_blocks.3.linear1.3": "transformer.single_transformer_blocks.3.proj_mlp",
        "transformer.final_layer.adaLN_modulation.1": "transformer.norm_out.linear",
        "clip_l.text_model.encoder.layers.0.mlp.fc1": (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        ),
        "t5.encoder.block.0.layer.0.SelfAttention.q": (
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
        ),
    },
    "sd3": {
        "transformer.x_embedder.proj": "transformer.pos_embed.proj",
        "transformer.joint_blocks.22.context_block.adaLN_modulation.1": (
            "transformer.transformer_blocks.22.norm1_context.linear"
        ),
        "transformer.joint_blocks.23.context_block.adaLN_modulation.1": (
            "transformer.transformer_blocks.23.norm1_context.linear"
        ),
        "transformer.joint_blocks.0.x_block.attn2.qkv.2": (
            "transformer.transformer_blocks.0.attn2.to_v"
        ),
        "clip_g.text_model.encoder.layers.31.mlp.fc1": (
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc1"
        ),
        "t5.encoder.block.0.layer.0.SelfAttention.q": (
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
        ),
    },
    "hunyuan-video": {
        "transformer.double_blocks.19.img_attn_qkv.1": (
            "transformer.transformer_blocks.19.attn.to_k"
        ),
        "transformer.double_blocks.0.txt_mlp.fc0": (
            "transformer.transformer_blocks.0.ff_context.net.0.proj"
        ),
        "transformer.txt_in.t_embedder.linear_1": (
            "transformer.context_embedder.time_text_embed.timestep_embedder.linear_1"
        ),
        "transformer.txt_in.individual_token_refiner.blocks.1.self_attn_qkv.2": (
            "transformer.context_embedder.token_refiner.refiner_blocks.1.attn.to_v"
        ),
        "transformer.txt_in.individual_token_refiner.blocks.0.mlp.fc0": (
            "transformer.context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj"
        ),
        "llama.model.layers.0.mlp.down_proj": "text_encoder.model.layers.0.mlp.down_proj",
        "clip_l.text_model.encoder.layers.0.mlp.fc1": (
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
        ),
    },
    "pixart": {
        "transformer.blocks.27.attn.qkv.1": "transformer.transformer_blocks.27.attn1.to_k",
        "transformer.blocks.0.cross_attn.kv_linear.1": (
            "transformer.transformer_blocks.0.attn2.to_v"
        ),
        "transformer.t_block.1": "transformer.adaln_single.linear",
        "t5.encoder.block.0.layer.0.SelfAttention.q": (
            "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
        ),
    },
    "sdxl": {
        "unet.input_blocks.4.1.transformer_blocks.1.attn1.to_q": (
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
        ),
        "unet.output_blocks.2.1.proj_in": "unet.up_blocks.0.attentions.2.proj_in",
        "unet.label_emb.0.2": "unet.add_embedding.linear_2",
        "clip_g.text_projection": "text_encoder_2.text_projection",
    },
    "stable-cascade": {
        "unet.down_blocks.0.2.attention.attn.in_proj.1": "prior.down_blocks.0.2.attention.to_k",
        "unet.down_blocks.0.2.attention.attn.out_proj": "prior.down_blocks.0.2.attention.to_out.0",
        "unet.down_blocks.0.2.kv_mapper.1": "prior.down_blocks.0.2.kv_mapper.1",
        "clip_g.text_model.encoder.layers.0.mlp.fc1": (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        ),
    },
}
EXCHANGED = ("final_layer.adaLN_modulation.1", "joint_blocks.23.context_block.adaLN_modulation.1")


def omi_file(path: Path, names: dict[str, str]) -> Tensors:
    """Write an adapter; return the delta of each of diffusers' modules, in float64."""
    torch.manual_seed(0)
    tensors, truth = {}, {}
    for number, (name, hub) in enumerate(names.items()):
        out = 4 * WIDTH if hub.endswith(("proj_mlp", "net.0.proj")) else WIDTH
        down, up = torch.randn(3, WIDTH), torch.randn(out, 3)
        alpha = torch.tensor(1.0 + number)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = alpha
        if name.endswith(EXCHANGED):
            up = torch.cat([up[out // 2 :], up[: out // 2]])
        truth[hub] = alpha.double() / 3 * up.double() @ down.double()
    save_file(tensors, path)
    return truth


def deltas(path: Path) -> Tensors:
    """The deltas of a file of diffusers."""
    tensors = load_file(path)
    return {
        key.removesuffix(".lora_A.weight"): (
            tensors[key.replace("lora_A", "lora_B")].double() @ value.double()
        )
        for key, value in tensors.items()
        if ".lora_A." in key
    }


def assert_close(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("family", NAMES)
def test_names_and_halves_are_those_of_its_key_sets(family: str, tmp_path: Path) -> None:
    source = tmp_path / "omi.safetensors"
    truth = omi_file(source, NAMES[family])
    adapter = loratool.open_adapter(source)
    assert (adapter.scheme, adapter.family) == ("onetrainer", family)
    for to in ("kohya", "comfy", "onetrainer"):
        loratool.convert(source, to, tmp_path / f"{to}.safetensors")
        hub = tmp_path / f"{to}-hub.safetensors"
        loratool.convert(tmp_path / f"{to}.safetensors", "diffusers", hub, family=family)
        assert_close({n: d for n, d in deltas(hub).items() if n in truth}, truth)
    assert load_file(tmp_path / "onetrainer.safetensors").keys() == load_file(source).keys()
    loratool.convert(source, "diffusers", tmp_path / "d.safetensors")
    assert_close(deltas(tmp_path / "d.safetensors"), truth)
    back = tmp_path / "back.safetensors"
    loratool.convert(tmp_path / "d.safetensors", "onetrainer", back, family=family)
    assert load_file(back).keys() == load_file(source).keys()
    loratool.convert(back, "diffusers", tmp_path / "again.safetensors", family=family)
    assert_close(deltas(tmp_path / "again.safetensors"), truth)


def test_a_merge_changes_the_rows_of_each_part(tmp_path: Path) -> None:
    names = {
        f"transformer.{name}": hub
        for name, hub in {
            "double_blocks.0.img_attn.qkv.0": "transformer_blocks.0.attn.to_q",
            "double_blocks.0.img_attn.qkv.2": "transformer_blocks.0.attn.to_v",
            "single_blocks.0.linear1.1": "single_transformer_blocks.0.attn.to_k",
            "single_blocks.0.linear1.3": "single_transformer_blocks.0.proj_mlp",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            "img_in.proj": "x_embedder",
        }.items()
    }
    truth = omi_file(tmp_path / "omi.safetensors", names)
    shapes = {
        "double_blocks.0.img_attn.qkv": 3 * WIDTH,
        "single_blocks.0.linear1": 7 * WIDTH,
        "final_layer.adaLN_modulation.1": WIDTH,
        "img_in": WIDTH,
    }
    base = {f"{name}.weight": torch.randn(rows, WIDTH) for name, rows in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    out = tmp_path / "merged.safetensors"
    loratool.merge(tmp_path / "base.safetensors", [tmp_path / "omi.safetensors"], out)
    expected = {name: value.double() for name, value in base.items()}
    expected["double_blocks.0.img_attn.qkv.weight"][:WIDTH] += truth[
        "transformer_blocks.0.attn.to_q"
    ]
    expected["double_blocks.0.img_attn.qkv.weight"][2 * WIDTH :] += truth[
        "transformer_blocks.0.attn.to_v"
    ]
    single = expected["single_blocks.0.linear1.weight"]
    single[WIDTH : 2 * WIDTH] += truth["single_transformer_blocks.0.attn.to_k"]
    single[3 * WIDTH :] += truth["single_transformer_blocks.0.proj_mlp"]
    expected["final_layer.adaLN_modulation.1.weight"] += torch.cat(
        truth["norm_out.linear"].chunk(2)[::-1]
    )
    expected["img_in.weight"] += truth["x_embedder"]
    assert_close({name: value.double() for name, value in load_file(out).items()}, expected)


def test_what_it_exchanges_in_the_wrong_block_is_refused(tmp_path: Path) -> None:
    """It takes the last block of a file for the last one of the model."""
    name = "transformer.joint_blocks.{}.context_block.adaLN_modulation.1"
    names = {name.format(5): "transformer.transformer_blocks.5.norm1_context.linear"}
    names["clip_g.text_projection"] = "text_encoder_2.text_projection"
    names["transformer.joint_blocks.5.x_block.attn.qkv.0"] = (
        "transformer.transformer_blocks.5.attn.to_q"
    )
    omi_file(tmp_path / "a.safetensors", names)
    with pytest.raises(UnsupportedError, match="halves of its B exchanged") as error:
        loratool.inspect(tmp_path / "a.safetensors")
    assert error.value.hint is not None
    save_file(
        {
            f"{names[name.format(5)]}.lora_A.weight": torch.randn(2, WIDTH),
            f"{names[name.format(5)]}.lora_B.weight": torch.randn(WIDTH, 2),
        },
        tmp_path / "d.safetensors",
    )
    arguments = tmp_path / "d.safetensors", "onetrainer", tmp_path / "o.safetensors"
    with pytest.raises(UnsupportedError, match="exchange its halves"):
        loratool.convert(*arguments, family="sd3")


@pytest.mark.parametrize("is_of_outputs", [True, False])
def test_magnitudes_beside_an_exchanged_b(is_of_outputs: bool, tmp_path: Path) -> None:
    """OneTrainer exchanges the halves of B alone; magnitudes of the inputs have none."""
    name = "transformer.final_layer.adaLN_modulation.1"
    names = {name: "transformer.norm_out.linear"}
    names["transformer.double_blocks.0.img_attn.qkv.0"] = (
        "transformer.transformer_blocks.0.attn.to_q"
    )
    source = tmp_path / "a.safetensors"
    omi_file(source, names)
    shape = (WIDTH, 1) if is_of_outputs else (1, WIDTH)
    save_file(load_file(source) | {f"{name}.dora_scale": torch.rand(shape)}, source)
    if is_of_outputs:
        with pytest.raises(LoratoolError, match="its magnitudes not"):
            loratool.inspect(source)
        return
    loratool.convert(source, "kohya", tmp_path / "k.safetensors", drop=["img_attn"])
    found = load_file(tmp_path / "k.safetensors")
    key = "lora_unet_final_layer_adaLN_modulation_1"
    assert torch.equal(found[f"{key}.lora_up.weight"], load_file(source)[f"{name}.lora_up.weight"])
    assert torch.equal(found[f"{key}.dora_scale"], load_file(source)[f"{name}.dora_scale"])


def test_other_variants_of_an_exchanged_modulation_are_as_diffusers_has_them(
    tmp_path: Path,
) -> None:
    one, other = torch.randn(4, 4), torch.randn(2, 2)
    tensors = {
        "transformer.final_layer.adaLN_modulation.1.lokr_w1": one,
        "transformer.final_layer.adaLN_modulation.1.lokr_w2": other,
        "transformer.double_blocks.0.img_attn.qkv.0.lokr_w1": one.clone(),
        "transformer.double_blocks.0.img_attn.qkv.0.lokr_w2": other.clone(),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(
        tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors", to_lora=True
    )
    delta = torch.kron(one.double(), other.double())
    names = ("transformer.norm_out.linear", "transformer.transformer_blocks.0.attn.to_q")
    assert_close(deltas(tmp_path / "d.safetensors"), dict.fromkeys(names, delta))


def test_bundled_embeddings_travel(tmp_path: Path) -> None:
    names = {"clip_l.text_model.encoder.layers.0.mlp.fc1": "text_encoder"}
    names["transformer.double_blocks.0.img_attn.qkv.0"] = "transformer"
    omi_file(tmp_path / "a.safetensors", names)
    token = {"bundle_emb.dog.clip_l": torch.randn(2, WIDTH)}
    save_file(load_file(tmp_path / "a.safetensors") | token, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "kohya", tmp_path / "k.safetensors")
    loratool.convert(tmp_path / "k.safetensors", "onetrainer", tmp_path / "b.safetensors")
    for name in "kb":
        found = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(found["bundle_emb.dog.clip_l"], token["bundle_emb.dog.clip_l"])


def test_the_older_flat_names_are_kohyas(tmp_path: Path) -> None:
    """Flux's T5 is its second text encoder there."""
    names = {
        "lora_transformer_transformer_blocks_0_attn_to_q": (
            "transformer.transformer_blocks.0.attn.to_q"
        ),
        "lora_transformer_norm_out_linear": "transformer.norm_out.linear",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        ),
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q": (
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
        ),
    }
    truth = omi_file(tmp_path / "a.safetensors", names)
    assert loratool.open_adapter(tmp_path / "a.safetensors").scheme == "kohya"
    loratool.convert(
        tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors", family="flux"
    )
    assert_close(deltas(tmp_path / "d.safetensors"), truth)


def test_its_parts_are_those_of_diffusers_to_other_verbs(tmp_path: Path) -> None:
    """All but a modulation, whose halves lie in the other order: that is said."""
    names = {
        "transformer.double_blocks.0.img_attn.qkv.0": "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_blocks.0.linear1.3": "transformer.single_transformer_blocks.0.proj_mlp",
    }
    truth = omi_file(tmp_path / "a.safetensors", names)
    loratool.convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors")
    pair = [tmp_path / "a.safetensors", tmp_path / "d.safetensors"]
    assert loratool.compare(pair).as_json()["relative_distance"] == pytest.approx(0, abs=1e-6)
    loratool.compose(pair, tmp_path / "s.safetensors", to="diffusers")
    assert_close(deltas(tmp_path / "s.safetensors"), {n: 2 * delta for n, delta in truth.items()})
    names["transformer.final_layer.adaLN_modulation.1"] = "transformer.norm_out.linear"
    omi_file(tmp_path / "a.safetensors", names)
    loratool.convert(
        tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors", force=True
    )
    with pytest.raises(UnsupportedError) as error:
        loratool.compare(pair)
    assert "--to diffusers" in str(error.value.hint)
