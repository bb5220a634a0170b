"""What trainers of diffusion models write that is nearly what others write: prefixes and names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import AdapterError
from loratool.names.families import family_named

Tensors = dict[str, torch.Tensor]
WIDTH = 8
RANK = 2


def factors(name: str, rows: int, inputs: int = WIDTH, kind: str = "default") -> Tensors:
    down, up = {
        "default": ("lora_A.default.weight", "lora_B.default.weight"),
        "peft": ("lora_A.weight", "lora_B.weight"),
        "kohya": ("lora_down.weight", "lora_up.weight"),
    }[kind]
    return {f"{name}.{down}": torch.randn(RANK, inputs), f"{name}.{up}": torch.randn(rows, RANK)}


def product(tensors: Tensors, name: str) -> torch.Tensor:
    """B @ A of a module, in float64."""
    down, up = (tensors[key].double() for key in tensors if key.startswith(f"{name}.lora_"))
    return up @ down


def of_diffusers(path: Path) -> Tensors:
    tensors = load_file(path)
    names = {key.rsplit(".lora_", 1)[0] for key in tensors}
    return {name: product(tensors, name) for name in names}


def assert_close(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name


WAN = {
    "blocks.0.self_attn.q": "transformer.blocks.0.attn1.to_q",
    "blocks.0.cross_attn.o": "transformer.blocks.0.attn2.to_out.0",
}


@pytest.mark.parametrize("prefix", ["", "pipe.dit."])
@pytest.mark.parametrize("alpha", [None, "6"])
def test_diffsynths_files_of_wan(prefix: str, alpha: str | None, tmp_path: Path) -> None:
    """PEFT's name of the adapter in the keys; the alpha, if any, is in the metadata."""
    tensors: Tensors = {}
    for name in WAN:
        tensors |= factors(f"{prefix}{name}", WIDTH)
    source = tmp_path / "a.safetensors"
    save_file(tensors, source, metadata=None if alpha is None else {"alpha": alpha})
    scale = 1.0 if alpha is None else float(alpha) / RANK
    assert {module.scale for module in loratool.inspect(source).modules} == {scale}
    loratool.convert(source, "diffusers", tmp_path / "d.safetensors")
    expected = {hub: scale * product(tensors, f"{prefix}{name}") for name, hub in WAN.items()}
    assert_close(of_diffusers(tmp_path / "d.safetensors"), expected)
    base = {f"{name}.weight": torch.randn(WIDTH, WIDTH) for name in WAN}
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", [source], tmp_path / "m.safetensors")
    merged = load_file(tmp_path / "m.safetensors")
    for name, hub in WAN.items():
        wanted = base[f"{name}.weight"].double() + expected[hub]
        assert (merged[f"{name}.weight"] - wanted).norm() <= 1e-6 * wanted.norm()


def test_an_alpha_in_the_metadata_is_a_number(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(factors("blocks.0.self_attn.q", WIDTH), source, metadata={"alpha": "many"})
    with pytest.raises(AdapterError, match="expected a number") as error:
        loratool.inspect(source)
    assert error.value.hint is not None and "--remove alpha" in error.value.hint
    plain = factors("blocks.0.self_attn.q", WIDTH, kind="peft")
    save_file(plain, source, metadata={"alpha": "6"})
    assert loratool.inspect(source).modules[0].scale == 1


DIFFSYNTH = {
    "blocks.0.attn.a_to_qkv": "double_blocks.0.img_attn.qkv",
    "blocks.0.attn.b_to_qkv": "double_blocks.0.txt_attn.qkv",
    "blocks.0.attn.a_to_out": "double_blocks.0.img_attn.proj",
    "blocks.0.attn.b_to_out": "double_blocks.0.txt_attn.proj",
    "blocks.0.ff_a.0": "double_blocks.0.img_mlp.0",
    "blocks.0.ff_b.2": "double_blocks.0.txt_mlp.2",
    "blocks.0.norm1_a.linear": "double_blocks.0.img_mod.lin",
    "single_blocks.0.to_qkv_mlp": "single_blocks.0.linear1",
    "single_blocks.0.proj_out": "single_blocks.0.linear2",
    "single_blocks.0.norm.linear": "single_blocks.0.modulation.lin",
}
"""Its own names of Flux.1, and what its converter makes of them for others."""


def rows_of(name: str) -> int:
    return {"qkv": 3, "mlp": 7}.get(name.rpartition("_")[2], 1) * WIDTH


def test_diffsynths_own_names_of_flux(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for name in DIFFSYNTH:
        tensors |= factors(name, rows_of(name))
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "kohya", tmp_path / "k.safetensors")
    found = load_file(tmp_path / "k.safetensors")
    for name, native in DIFFSYNTH.items():
        key = f"lora_unet_{native.replace('.', '_')}"
        for side, other in (("A", "down"), ("B", "up")):
            mine = tensors[f"{name}.lora_{side}.default.weight"]
            assert torch.equal(found[f"{key}.lora_{other}.weight"], mine)
    base = {f"{native}.weight": torch.randn(rows_of(n), WIDTH) for n, native in DIFFSYNTH.items()}
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(
        tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "m.safetensors"
    )
    merged = load_file(tmp_path / "m.safetensors")
    for name, native in DIFFSYNTH.items():
        wanted = base[f"{native}.weight"].double() + product(tensors, name)
        assert (merged[f"{native}.weight"] - wanted).norm() <= 1e-6 * wanted.norm()


ALIASES: dict[str, tuple[str, dict[str, str]]] = {
    "wan-fun": (
        "kohya",
        {
            "lora_unet__blocks_0_self_attn_q": "transformer.blocks.0.attn1.to_q",
            "lora_unet__blocks_0_cross_attn_k": "transformer.blocks.0.attn2.to_k",
        },
    ),
    "cascade": (
        "kohya",
        {
            "lora_prior_unet_down_blocks_0_2_attention_attn_to_q": (
                "prior.down_blocks.0.2.attention.to_q"
            ),
            "lora_prior_te_text_model_encoder_layers_0_self_attn_q_proj": (
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
            ),
        },
    ),
    "simpletuner": (
        "kohya",
        {
            "lycoris_transformer_blocks_0_attn_to_q": "transformer.transformer_blocks.0.attn.to_q",
            "lycoris_single_transformer_blocks_0_attn_to_k": (
                "transformer.single_transformer_blocks.0.attn.to_k"
            ),
        },
    ),
    "ai-toolkit": (
        "peft",
        {
            "diffusion_model.transformer_blocks.0.attn.to_q": (
                "transformer.transformer_blocks.0.attn.to_q"
            ),
            "diffusion_model.single_transformer_blocks.0.attn.to_v": (
                "transformer.single_transformer_blocks.0.attn.to_v"
            ),
        },
    ),
    "musubi": (
        "kohya",
        {
            "lora_unet_double_blocks_19_img_attn_proj": (
                "transformer.transformer_blocks.19.attn.to_out.0"
            ),
            "lora_unet_single_blocks_39_linear2": (
                "transformer.single_transformer_blocks.39.proj_out"
            ),
        },
    ),
    "cosmos": (
        "default",
        {
            "net.blocks.0.self_attn.q_proj": "transformer.transformer_blocks.0.attn1.to_q",
            "net.blocks.0.mlp.layer1": "transformer.transformer_blocks.0.ff.net.0.proj",
        },
    ),
}


@pytest.mark.parametrize("tool", ALIASES)
def test_aliases(tool: str, tmp_path: Path) -> None:
    kind, names = ALIASES[tool]
    tensors: Tensors = {}
    for name in names:
        tensors |= factors(name, WIDTH, kind=kind)
    if kind == "kohya":
        tensors |= {f"{name}.alpha": torch.tensor(3.0) for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors")
    scale = 3.0 / RANK if kind == "kohya" else 1.0
    expected = {hub: scale * product(tensors, name) for name, hub in names.items()}
    assert_close(of_diffusers(tmp_path / "d.safetensors"), expected)


CONTROL = {
    "img_in": (WIDTH, 2 * WIDTH),
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}
NORMS = ("double_blocks.0.img_attn.norm.query_norm", "single_blocks.0.norm.key_norm")


def as_comfy(tensors: Tensors) -> Tensors:
    """What ComfyUI makes of a control adapter before it applies it."""
    found = {}
    for key, value in tensors.items():
        name = key.replace(".lora_B.bias", ".diff_b").replace(
            "_norm.scale", "_norm.scale.set_weight"
        )
        found[f"diffusion_model.{name}"] = value
    return found | {"diffusion_model.img_in.reshape_weight": torch.tensor([WIDTH, 2 * WIDTH])}


def in_hub_names(tensors: Tensors) -> Tensors:
    """The tensors of a Flux.1 as diffusers has them."""
    found = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        fusion = family_named("flux").from_native(module)
        assert fusion is not None
        if fusion.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        sizes = fusion.heights(WIDTH, len(value)) if len(fusion.modules) > 1 else (len(value),)
        assert sizes is not None
        for part, rows in zip(fusion.modules, value.split(sizes), strict=True):
            found[f"{part}.{'weight' if leaf == 'scale' else leaf}"] = rows.clone()
    return found


@pytest.mark.parametrize("naming", ["native", "hub"])
@pytest.mark.parametrize("form", [dict, as_comfy])
def test_a_control_adapter_of_flux(
    form: Callable[[Tensors], Tensors], naming: str, tmp_path: Path
) -> None:
    """Biases are added, norms replaced, and the layer that sees the control gets its inputs."""
    torch.manual_seed(0)
    tensors: Tensors = {}
    base: Tensors = {}
    expected: Tensors = {}
    for name, (rows, inputs) in CONTROL.items():
        tensors |= factors(name, rows, inputs, kind="peft")
        base[f"{name}.weight"] = torch.randn(rows, WIDTH)
        base[f"{name}.bias"] = torch.randn(rows)
        expected[f"{name}.weight"] = product(tensors, name)
        expected[f"{name}.weight"][:, :WIDTH] += base[f"{name}.weight"].double()
        tensors[f"{name}.lora_B.bias"] = torch.randn(rows)
        expected[f"{name}.bias"] = base[f"{name}.bias"] + tensors[f"{name}.lora_B.bias"].double()
    for name in NORMS:
        tensors[f"{name}.scale"], base[f"{name}.scale"] = torch.randn(2, 4).unbind()
        expected[f"{name}.scale"] = tensors[f"{name}.scale"].double()
    tensors = {key: value.clone() for key, value in tensors.items()}
    base = {key: value.clone() for key, value in base.items()}
    save_file(form(tensors), tmp_path / "a.safetensors")
    folder = tmp_path / "base"
    folder.mkdir()
    file = "diffusion_pytorch_model.safetensors"
    save_file(in_hub_names(base) if naming == "hub" else base, folder / file)
    loratool.merge(folder, [tmp_path / "a.safetensors"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / file)
    expected = in_hub_names(expected) if naming == "hub" else expected
    assert_close({key: value.double() for key, value in merged.items()}, expected)
