"""Names of diffusion models: against the real models and against diffusers' own converters."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import backbones
import pytest
import torch
from backbones import Build
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratool.errors import OptionError
from loratool.names.families import claiming, families, family_named, unrefined
from loratool.names.family import Family, Fusion, Row, single, stretches
from loratool.names.flattening import BACKBONE, ENCODER_KINDS, KINDS, unflatten, vocabulary
from loratool.names.templates import expand
from loratool.names.vocabulary import NUMBER, Vocabulary, filled, flatten
from loratool.schemes.opening import open_adapter

pytestmark = pytest.mark.slow

FAMILIES = [family for family in families() if family.rows]
TEMPLATES = {
    BACKBONE: tuple(
        dict.fromkeys(
            name
            for family in families()
            for name in (*family.hub_names.templates, *family.native_names.templates)
        )
    ),
    **{kind: vocabulary(kind).templates for kind in ENCODER_KINDS},
}

OPTIONAL = {"sd1": {"class_embedding.linear_1", "class_embedding.linear_2"}}
"""Modules that only some models of a family have."""


def sd1() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(cross_attention_dim=768)  # type: ignore[no-any-return]


def sdxl() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(  # type: ignore[no-any-return]
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def flux() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)  # type: ignore[no-any-return]


def flux2() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.Flux2Transformer2DModel()  # type: ignore[no-any-return]


def stable_diffusion_3(depth: int, dual: int) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.SD3Transformer2DModel(  # type: ignore[no-any-return]
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=depth,
        caption_projection_dim=64 * depth,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )


def of_diffusers(name: str, **options: Any) -> Callable[[], torch.nn.Module]:
    """Return what builds a model of diffusers; its own defaults are those of the real one."""

    def build() -> torch.nn.Module:
        diffusers = pytest.importorskip("diffusers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(diffusers, name)(**options)  # type: ignore[no-any-return]

    return build


HIDREAM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": [*range(32), *[31] * 16],
}

BACKBONES: dict[str, Build] = {
    **backbones.BACKBONES,
    "auraflow": of_diffusers("AuraFlowTransformer2DModel"),
    "chroma": of_diffusers("ChromaTransformer2DModel"),
    "hidream": of_diffusers("HiDreamImageTransformer2DModel", **HIDREAM),
    "hunyuan-video": of_diffusers("HunyuanVideoTransformer3DModel"),
    "hunyuan-video-1.5": of_diffusers("HunyuanVideo15Transformer3DModel"),
    "lumina2": of_diffusers("Lumina2Transformer2DModel"),
    "qwen-image": of_diffusers("QwenImageTransformer2DModel", use_additional_t_cond=True),
    "z-image": of_diffusers("ZImageTransformer2DModel"),
    "sd1": sd1,
    "sdxl": sdxl,
    "flux": flux,
    "flux2": flux2,
    "sd3": lambda: stable_diffusion_3(24, 13),
    "sd3-large": lambda: stable_diffusion_3(38, 0),
}


def weights(model: torch.nn.Module) -> dict[str, int]:
    """The modules that hold a weight, and its dimensions."""
    held = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: weight.ndim for name, weight in held.items() if weight is not None}


@cache
def modules(name: str) -> dict[str, int]:
    with torch.device("meta"):
        built = BACKBONES[name]()
        models = built if isinstance(built, tuple) else (built,)
        return {module: ndim for model in models for module, ndim in weights(model).items()}


def transformers_modules(name: str, **options: Any) -> dict[str, int]:
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, name)
    with torch.device("meta"):
        return weights(model(model.config_class(**options)))


def table(family: Family) -> Iterator[tuple[str, Fusion]]:
    """Every native module of a family, with what it is."""
    for row in family.rows:
        for number in range(row.count):
            native = row.native.replace(NUMBER, str(number))
            fusion = family.from_native(native)
            assert fusion is not None
            yield native, fusion


each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


# The tables


@each_family
def test_the_tables_are_bijective(family: Family) -> None:
    natives: set[str] = set()
    hubs: set[str] = set()
    for native, fusion in table(family):
        assert native not in natives
        natives.add(native)
        for module in fusion.modules:
            assert module not in hubs
            hubs.add(module)
            assert family.to_native(module) == (native, fusion)


@each_family
def test_the_tables_are_those_of_the_real_models(family: Family) -> None:
    hubs = {module for _, fusion in table(family) for module in fusion.modules}
    assert hubs - OPTIONAL.get(family.name, set()) == set(modules(family.name))


@each_family
def test_what_a_family_does_not_have(family: Family) -> None:
    for module in (
        "",
        ".",
        "*",
        "transformer_blocks",
        "transformer_blocks.",
        "transformer_blocks.*.attn.to_q",
        "double_blocks.*.img_attn.qkv",
        "joint_blocks.99.x_block.attn.qkv",
        "double_blocks.-1.img_attn.qkv",
        "double_blocks.00.img_attn.qkv",
        "double_blocks.1.img_attn.qkv.x",
        "input_blocks.4.1.transformer_blocks.99.attn1.to_q",
        "input_blocks.40.1.norm",
        "transformer_blocks." * 1000 + "0.attn.to_q",
        "transformer_blocks." + "9" * 10_000 + ".attn.to_q",
        "transformer_blocks.٣.attn.to_q",
    ):
        assert family.from_native(module) is None
        assert family.to_native(module) is None
        assert not family.has(module)


def test_a_table_with_a_module_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        Family("x", "unet", (single("a", "b"), single("a", "c")))
    with pytest.raises(ValueError, match="twice"):
        Family("x", "unet", (single("a", "b"), Row("c", Fusion(("b", "d")))))


@pytest.mark.parametrize(
    ("name", "native", "fusion"),
    [
        ("sd1", "input_blocks.3.0.op", Fusion(("down_blocks.0.downsamplers.0.conv",))),
        ("sd1", "output_blocks.2.1.conv", Fusion(("up_blocks.0.upsamplers.0.conv",))),
        ("sd1", "output_blocks.5.2.conv", Fusion(("up_blocks.1.upsamplers.0.conv",))),
        ("sdxl", "output_blocks.2.2.conv", Fusion(("up_blocks.0.upsamplers.0.conv",))),
        (
            "sdxl",
            "output_blocks.0.1.transformer_blocks.9.attn2.to_k",
            Fusion(("up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_k",)),
        ),
        (
            "flux",
            "single_blocks.37.linear1",
            Fusion(
                expand("single_transformer_blocks.37.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}"),
                "input",
                shares=(1, 1, 1, 4),
            ),
        ),
        (
            "flux",
            "double_blocks.0.txt_attn.qkv",
            Fusion(expand("transformer_blocks.0.attn.{add_q_proj,add_k_proj,add_v_proj}")),
        ),
        (
            "sd3",
            "joint_blocks.12.x_block.attn2.qkv",
            Fusion(expand("transformer_blocks.12.attn2.{to_q,to_k,to_v}")),
        ),
        ("sd3", "joint_blocks.13.x_block.attn2.qkv", None),
        ("sdxl-refiner", "output_blocks.2.1.conv", Fusion(("up_blocks.0.upsamplers.0.conv",))),
        (
            "svd",
            "input_blocks.4.1.time_stack.0.ff_in.net.2",
            Fusion(("down_blocks.1.attentions.0.temporal_transformer_blocks.0.ff_in.net.2",)),
        ),
        (
            "svd",
            "middle_block.2.time_stack.in_layers.2",
            Fusion(("mid_block.resnets.1.temporal_res_block.conv1",)),
        ),
        (
            "pixart",
            "blocks.27.cross_attn.kv_linear",
            Fusion(expand("transformer_blocks.27.attn2.{to_k,to_v}")),
        ),
        ("pixart", "blocks.28.attn.qkv", None),
        ("hunyuan-dit", "blocks.0.attn1.Wqkv", Fusion(expand("blocks.0.attn1.{to_q,to_k,to_v}"))),
        ("hunyuan-dit", "blocks.0.attn2.kv_proj", Fusion(expand("blocks.0.attn2.{to_k,to_v}"))),
        ("hunyuan-dit", "blocks.20.skip_linear", None),
        ("hunyuan-dit", "blocks.21.skip_linear", Fusion(("blocks.21.skip_linear",))),
        (
            "hunyuan-dit",
            "final_layer.adaLN_modulation.1",
            Fusion(("norm_out.linear",), swapped=True),
        ),
        (
            "mochi",
            "blocks.0.mlp_x.w1",
            Fusion(("transformer_blocks.0.ff.net.0.proj",), swapped=True),
        ),
        ("mochi", "blocks.47.mlp_y.w1", None),
        ("mochi", "blocks.47.mod_y", Fusion(("transformer_blocks.47.norm1_context.linear_1",))),
        ("wan", "vace_blocks.0.before_proj", Fusion(("vace_blocks.0.proj_in",))),
        ("wan", "vace_blocks.1.before_proj", None),
        ("sd3", "joint_blocks.23.context_block.mlp.fc1", None),
        (
            "sd3",
            "joint_blocks.23.context_block.adaLN_modulation.1",
            Fusion(("transformer_blocks.23.norm1_context.linear",), swapped=True),
        ),
        (
            "sd3-large",
            "joint_blocks.23.context_block.adaLN_modulation.1",
            Fusion(("transformer_blocks.23.norm1_context.linear",)),
        ),
    ],
)
def test_modules_known_by_heart(name: str, native: str, fusion: Fusion | None) -> None:
    assert family_named(name).from_native(native) == fusion


# Against diffusers' converters

SCALES = (".query_norm", ".key_norm", *(f".norms.{number}" for number in range(5)))
"""Modules whose weight is called ``scale`` in native checkpoints."""


def checkpoint_of(family: Family, rows: Callable[[Fusion], int]) -> dict[str, torch.Tensor]:
    """A native checkpoint in which no two numbers are alike."""
    start = 0.0
    checkpoint = {}
    for native, fusion in table(family):
        size = rows(fusion)
        suffixes = ("scale",) if native.endswith(SCALES) else ("weight", "bias")
        for suffix in suffixes:
            values = torch.arange(start, start + size, dtype=torch.float64)
            checkpoint[f"{native}.{suffix}"] = values if suffix == "bias" else values[:, None]
            start += size
    return checkpoint


def parts(fusion: Fusion, weight: torch.Tensor, inputs: int) -> dict[str, torch.Tensor]:
    """What a fusion says that the hub's modules hold."""
    heights = fusion.heights(inputs, len(weight))
    assert heights is not None
    found = stretches(heights, swapped=fusion.swapped)
    assert found is not None
    held = {
        name: weight.new_empty((n, *weight.shape[1:]))
        for name, n in zip(fusion.modules, heights, strict=True)
    }
    for each in found:
        rows = weight[each.native : each.native + each.count]
        held[fusion.modules[each.part]][each.first : each.first + each.count] = rows
    return held


def expected_parts(
    family: Family, checkpoint: dict[str, torch.Tensor], inputs: int
) -> dict[str, torch.Tensor]:
    expected = {}
    for key, tensor in checkpoint.items():
        native, _, suffix = key.rpartition(".")
        fusion = family.from_native(native)
        assert fusion is not None
        suffix = "weight" if suffix == "scale" else suffix
        for module, part in parts(fusion, tensor, inputs).items():
            expected[f"{module}.{suffix}"] = part
    return expected


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def test_flux_is_split_as_diffusers_splits_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family, inputs = family_named("flux"), 3072
    checkpoint = checkpoint_of(
        family, lambda fusion: 7 * inputs if fusion.sizes == "input" else 2 * len(fusion.modules)
    )
    expected = expected_parts(family, checkpoint, inputs)
    assert_same(utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint), expected)


def without_biases(
    checkpoint: dict[str, torch.Tensor], endings: tuple[str, ...] = ("",)
) -> dict[str, torch.Tensor]:
    """A checkpoint without the biases of modules that end so, as the model has none there."""
    left_out = tuple(f"{ending}.bias" for ending in endings)
    return {key: value for key, value in checkpoint.items() if not key.endswith(left_out)}


def test_chroma_is_split_as_diffusers_splits_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family, inputs = family_named("chroma"), 3072
    checkpoint = checkpoint_of(
        family, lambda fusion: 7 * inputs if fusion.sizes == "input" else 2 * len(fusion.modules)
    )
    expected = expected_parts(family, checkpoint, inputs)
    assert_same(utils.convert_chroma_transformer_checkpoint_to_diffusers(checkpoint), expected)


@pytest.mark.parametrize("naming", ["native", "comfy"])
def test_hunyuan_video_is_split_as_diffusers_splits_it(naming: str) -> None:
    """ComfyUI's names are brought back as it makes them; the converter knows the original ones."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family, inputs = family_named("hunyuan-video"), 3072
    checkpoint = checkpoint_of(
        family, lambda fusion: 7 * inputs if fusion.sizes == "input" else 2 * len(fusion.modules)
    )
    known = dict(checkpoint)
    if naming == "comfy":
        checkpoint = {in_comfyui(key): value for key, value in checkpoint.items()}
        assert {key.rpartition(".")[0] for key in checkpoint} - {
            native for native, _ in table(family)
        }
    expected = expected_parts(family, checkpoint, inputs)
    assert_same(utils.convert_hunyuan_video_transformer_to_diffusers(known), expected)


def in_comfyui(key: str) -> str:
    """What ComfyUI calls a tensor of HunyuanVideo once it is loaded."""
    for old, new in (
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("_mod.linear.", "_mod.lin."),
        ("_attn_qkv.", "_attn.qkv."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
        ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
        (".q_norm.weight", ".norm.query_norm.scale"),
        (".k_norm.weight", ".norm.key_norm.scale"),
        ("_q_norm.bias", "_q_norm.bias"),
        ("_attn_proj.", "_attn.proj."),
        (".modulation.linear.", ".modulation.lin."),
        ("_in.mlp.2.", "_in.out_layer."),
        ("_in.mlp.0.", "_in.in_layer."),
    ):
        key = key.replace(old, new)
    return key


def test_lumina2_is_split_as_diffusers_splits_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family, inputs = family_named("lumina2"), 2304
    checkpoint = checkpoint_of(
        family, lambda fusion: 3840 if fusion.sizes == "grouped" else 2 * len(fusion.modules)
    )
    expected = expected_parts(family, checkpoint, inputs)
    assert_same(utils.convert_lumina2_to_diffusers(checkpoint), expected)


def test_z_image_is_split_as_diffusers_splits_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family = family_named("z-image")
    checkpoint = checkpoint_of(family, lambda fusion: 2 * len(fusion.modules))
    checkpoint = without_biases(checkpoint, (".qkv", ".q_norm", ".k_norm"))
    expected = expected_parts(family, checkpoint, 2)
    assert_same(utils.convert_z_image_transformer_checkpoint_to_diffusers(checkpoint), expected)


def test_auraflow_is_renamed_as_diffusers_renames_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family = family_named("auraflow")
    checkpoint = checkpoint_of(family, lambda _: 4)
    biased = {key for key in checkpoint if key.startswith(("t_embedder", "init_x_linear"))}
    checkpoint = {k: v for k, v in checkpoint.items() if k in biased or k.endswith("weight")}
    expected = expected_parts(family, checkpoint, 4)
    more = {"register_tokens": torch.zeros(1), "positional_encoding": torch.zeros(1)}
    found = utils.convert_auraflow_transformer_checkpoint_to_diffusers(checkpoint | more)
    assert set(found) - set(expected) == {"register_tokens", "pos_embed.pos_embed"}
    assert_same({key: found[key] for key in expected}, expected)


def test_hidream_is_as_diffusers_has_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family = family_named("hidream")
    checkpoint = checkpoint_of(family, lambda _: 2)
    expected = expected_parts(family, checkpoint, 2)
    assert_same(utils.convert_hidream_transformer_to_diffusers(checkpoint), expected)


def test_flux2_is_split_as_diffusers_splits_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family = family_named("flux2")
    checkpoint = checkpoint_of(family, lambda fusion: 2 * len(fusion.modules))
    checkpoint = without_biases(checkpoint)
    expected = expected_parts(family, checkpoint, 2)
    assert_same(utils.convert_flux2_transformer_checkpoint_to_diffusers(checkpoint), expected)


def test_wan_is_renamed_as_diffusers_renames_it() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family = family_named("wan")
    checkpoint = {f"{native}.weight": native for native, _ in table(family)}
    assert utils.convert_wan_transformer_to_diffusers(checkpoint) == {
        f"{fusion.modules[0]}.weight": native for native, fusion in table(family)
    }


@pytest.mark.parametrize("name", ["sd3", "sd3-large"])
def test_sd3_is_split_as_diffusers_splits_it(name: str) -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family = family_named(name)
    checkpoint = checkpoint_of(family, lambda fusion: 4 * len(fusion.modules))
    checkpoint = without_biases(checkpoint, ("ln_q", "ln_k"))
    expected = expected_parts(family, checkpoint, 4)
    positions = torch.zeros(1)
    found = utils.convert_sd3_transformer_checkpoint_to_diffusers(
        checkpoint | {"pos_embed": positions}
    )
    assert found.pop("pos_embed.pos_embed") is positions
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd1", {"class_embed_type": "projection"}),
        ("sdxl", {"addition_embed_type": "text_time"}),
    ],
)
def test_unets_are_renamed_as_diffusers_renames_them(name: str, options: dict[str, str]) -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family = family_named(name)
    expected = {}
    checkpoint = {}
    for native, fusion in table(family):
        for suffix in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{native}.{suffix}"] = native
            expected[f"{fusion.modules[0]}.{suffix}"] = native
    config = {"layers_per_block": 2, **options}
    assert utils.convert_ldm_unet_checkpoint(checkpoint, config) == expected


def test_flattened_sdxl_names_are_read_as_diffusers_reads_them() -> None:
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    family = family_named("sdxl")
    state = {
        f"lora_unet_{flatten(native)}.lora_{factor}.weight": native
        for native, fusion in table(family)
        if modules("sdxl")[fusion.modules[0]] > 1
        for factor in ("down", "up")
    }
    state = utils._maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2))
    found, alphas = utils._convert_non_diffusers_lora_to_diffusers(state)
    assert not alphas
    names = {}
    for key, native in found.items():
        module = key.removeprefix("unet.").replace(".processor", "")
        for ending in ("_lora.down.weight", "_lora.up.weight", ".lora_down.weight"):
            module = module.removesuffix(ending)
        for ending in (".lora.down.weight", ".lora.up.weight", ".lora_up.weight"):
            module = module.removesuffix(ending)
        names[module + ".0" if module.endswith("to_out") else module] = native
    assert names == {
        module: native
        for native, fusion in table(family)
        for module in fusion.modules
        if modules("sdxl")[module] > 1
    }


# Which family


def family_of(names: Collection[str]) -> Family | None:
    """The only family that has every one of the modules."""
    fitting = [f for f in claiming(names) if names and all(map(f.has, names))]
    found = unrefined(fitting, names)
    return found[0] if len(found) == 1 else None


@each_family
def test_a_family_is_known_by_all_of_its_modules(family: Family) -> None:
    assert family_of([native for native, _ in table(family)]) is family
    hubs = {module for _, fusion in table(family) for module in fusion.modules}
    # In diffusers' names, the first generation of Cosmos has nothing that the second lacks.
    assert family_of(hubs) is (None if family.name == "cosmos" else family)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        ("{down_blocks.0,up_blocks.3}.attentions.0.transformer_blocks.0.attn1.to_q", "sd1"),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "sd1"),
        ("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "sdxl"),
        ("input_blocks.4.1.transformer_blocks.1.attn1.to_q", "sdxl"),
        ("up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "sdxl"),
        ("label_emb.0.0", None),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", None),
        ("down_blocks.{0,1}.attentions.0.transformer_blocks.1.attn1.to_q", None),
        ("{single_transformer_blocks,transformer_blocks}.3.attn.to_q", "flux"),
        ("single_blocks.7.modulation.lin", "flux"),
        ("double_blocks.8.img_attn.qkv", "flux"),  # deeper than Flux.2
        ("single_blocks.47.linear2", "flux2"),  # deeper than the others
        ("single_blocks.39.linear2", "hunyuan-video"),  # as deep as it
        ("single_blocks.7.linear2", None),
        ("{double_blocks.7.txt_mlp.0,single_blocks.37.linear1}", None),
        ("single_transformer_blocks.7.attn.to_qkv_mlp_proj", "flux2"),
        ("blocks.0.self_attn.q", "wan"),
        ("blocks.0.attn1.to_q", "wan"),
        ("transformer_blocks.17.attn.to_q", None),  # Flux, SD 3 or Qwen-Image
        ("transformer_blocks.{0,18}.attn.to_q", "flux"),  # as deep as it
        ("transformer_blocks.{0,23}.attn.to_q", "sd3"),
        ("transformer_blocks.{0,23}.{attn.to_q,ff.net.2}", "sd3"),
        ("transformer_blocks.{0,37}.attn.to_q", "sd3-large"),
        ("transformer_blocks.{0,59}.attn.to_q", "qwen-image"),
        ("transformer_blocks.{0,1}.{attn.to_q,img_mlp.net.2}", "qwen-image"),
        ("transformer_blocks.{0,53}.{attn.to_q,ff.net.2}", "hunyuan-video-1.5"),
        ("joint_blocks.0.x_block.attn.qkv", "sd3"),
        ("joint_blocks.23.context_block.mlp.fc1", "sd3-large"),
        ("single_transformer_blocks.39.attn.to_q", "hunyuan-video"),
        ("double_blocks.0.img_attn_q", "hunyuan-video-1.5"),
        ("{double_blocks.0.img_attn.qkv,distilled_guidance_layer.in_proj}", "chroma"),
        ("layers.0.attention.to_q", "z-image"),
        ("layers.0.attn.to_q", "lumina2"),
        ("layers.0.{attention.qkv,adaLN_modulation.0}", "z-image"),
        ("layers.0.{attention.qkv,adaLN_modulation.1}", "lumina2"),
        ("layers.0.attention.qkv", None),  # Z-Image or Lumina 2
        ("joint_transformer_blocks.0.attn.to_q", "auraflow"),
        ("single_layers.0.attn.w1q", "auraflow"),
        ("double_stream_blocks.0.block.attn1.to_q", "hidream"),
        ("model.layers.0.self_attn.q_proj", None),
        ("{double_blocks.0.img_attn.qkv,model.layers.0.self_attn.q_proj}", None),
    ],
)
def test_which_family(names: str, family: str | None) -> None:
    found = family_of(expand(names))
    assert (found.name if found else None) == family


TOLD: dict[str, dict[str, str]] = {
    "auraflow": {},
    "chroma": {"attention": "flux"},  # whose modules these are too, under the same names
    "flux": {},
    "flux2": {},
    "hidream": {},
    "hunyuan-video": {},
    "hunyuan-video-1.5": {},
    "lumina2": {},
    "qwen-image": {},
    "sd3": {},
    "sd3-large": {},
    "z-image": {},
}
"""Families that adapters of the real size tell, but for some that are another's as well."""


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("which", ["attention", "blocks"])
@pytest.mark.parametrize("name", TOLD)
def test_an_adapter_of_the_real_size_tells_its_family(
    name: str, which: str, native: bool, tmp_path: Path
) -> None:
    family = family_named(name)
    with torch.device("meta"):
        built = BACKBONES[name]()
    assert isinstance(built, torch.nn.Module)
    shapes = {
        module: tuple(layer.weight.shape)
        for module, layer in built.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    tensors = {}
    for path, fusion in table(family):
        parts = [part for part in fusion.modules if part in shapes]
        is_meant = re.search("attn|attention" if which == "attention" else r"\.\d+\.", path)
        if not parts or not is_meant:
            continue
        layers = {path: parts} if native else {part: [part] for part in parts}
        for layer, held in layers.items():
            key = f"diffusion_model.{layer}" if native else f"transformer.{layer}"
            rows = sum(shapes[part][0] for part in held)
            tensors[f"{key}.lora_A.weight"] = torch.zeros(1, shapes[held[0]][1]).half()
            tensors[f"{key}.lora_B.weight"] = torch.zeros(rows, 1).half()
    save_file(tensors, tmp_path / "adapter.safetensors")
    assert open_adapter(tmp_path / "adapter.safetensors").family == TOLD[name].get(which, name)


@pytest.mark.parametrize(
    ("width", "family"),
    [(1536, "sd3"), (2432, "sd3-large"), (2048, "hunyuan-video-1.5"), (3072, None)],
)
def test_widths_tell_what_the_first_blocks_leave_open(
    width: int, family: str | None, tmp_path: Path
) -> None:
    tensors = {}
    for number in range(12):
        key = f"transformer.transformer_blocks.{number}.attn.to_q"
        tensors[f"{key}.lora_A.weight"] = torch.zeros(1, width)
        tensors[f"{key}.lora_B.weight"] = torch.zeros(width, 1)
    save_file(tensors, tmp_path / "adapter.safetensors")
    assert open_adapter(tmp_path / "adapter.safetensors").family == family


def test_no_modules_are_of_no_family() -> None:
    assert family_of([]) is None


@each_family
def test_families_have_names(family: Family) -> None:
    assert family_named(family.name) is family
    assert family.backbone in ("unet", "transformer", "prior")


def test_there_is_no_such_family() -> None:
    with pytest.raises(OptionError, match="is none of"):
        family_named("sd9")


# Flattened names


def assert_restored(names: list[str], *kinds: str) -> None:
    for name in names:
        for kind in (*kinds, "any"):
            assert unflatten(flatten(name), kind) == (name,)


@each_family
def test_flattened_names_of_backbones_are_restored(family: Family) -> None:
    for written, names in (
        (family.hub_names, list(modules(family.name))),
        (family.native_names, [name for name, _ in table(family)]),
    ):
        for name in names:
            assert written.parse(flatten(name)) == family.parse(flatten(name)) == (name,)
            assert name in unflatten(flatten(name), BACKBONE)


def test_flattened_names_of_clip_are_restored() -> None:
    names = list(transformers_modules("CLIPTextModelWithProjection"))
    assert any(name.startswith("text_model.") for name in names)
    bare = [name.removeprefix("text_model.") for name in names]
    assert_restored([*names, *bare], "clip", "language-model")


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_flattened_names_of_t5_are_restored(feed_forward: str) -> None:
    names = transformers_modules("T5EncoderModel", feed_forward_proj=feed_forward, num_layers=2)
    assert_restored(list(names), "t5", "language-model")


@pytest.mark.parametrize(
    ("model", "body"),
    [
        ("LlamaForCausalLM", "model."),
        ("MistralForCausalLM", "model."),
        ("Qwen2ForCausalLM", "model."),
        ("Qwen3ForCausalLM", "model."),
        ("Qwen2MoeForCausalLM", "model."),
        ("MixtralForCausalLM", "model."),
        ("Gemma2ForCausalLM", "model."),
        ("Gemma3ForCausalLM", "model."),
        ("PhiForCausalLM", "model."),
        ("Phi3ForCausalLM", "model."),
        ("DeepseekV3ForCausalLM", "model."),
        ("Starcoder2ForCausalLM", "model."),
        ("GPT2LMHeadModel", "transformer."),
        ("GPTNeoXForCausalLM", "gpt_neox."),
        ("GPTNeoForCausalLM", "transformer."),
        ("GPTJForCausalLM", "transformer."),
        ("OPTForCausalLM", "model."),
        ("BloomForCausalLM", "transformer."),
        ("FalconForCausalLM", "transformer."),
        ("MptForCausalLM", "transformer."),
        ("BertForMaskedLM", "bert."),
        ("RobertaForSequenceClassification", "roberta."),
        ("DistilBertForSequenceClassification", "distilbert."),
        ("DebertaV2ForSequenceClassification", "deberta."),
        ("ElectraForSequenceClassification", "electra."),
        ("MT5ForConditionalGeneration", ""),
        ("BartForConditionalGeneration", "model."),
        ("WhisperForConditionalGeneration", "model."),
        ("ViTForImageClassification", "vit."),
    ],
)
def test_flattened_names_of_language_models_are_restored(model: str, body: str) -> None:
    transformers = pytest.importorskip("transformers")
    known = vars(getattr(transformers, model).config_class())
    depths = (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
        *("encoder_layers", "decoder_layers"),
    )
    options: dict[str, Any] = {name: 2 for name in depths if name in known}
    if model == "GPTNeoForCausalLM":
        options["attention_types"] = [[["global", "local"], 1]]
    names = list(transformers_modules(model, **options))
    assert_restored(names, "language-model")
    assert_restored([name.removeprefix(body) for name in names], "language-model")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.experts.12.gate_proj",
        "model.layers.3.block_sparse_moe.experts.7.w1",
        "model.layers.3.block_sparse_moe.gate",
        "model.language_model.layers.31.self_attn.q_proj",
        "language_model.model.layers.31.mlp.gate_up_proj",
        "language_model.lm_head",
        "vit.encoder.layer.11.attention.attention.query",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",
        "model.visual.blocks.0.attn.qkv",
    ],
)
def test_flattened_names_of_other_versions_are_restored(name: str) -> None:
    assert_restored([name], "language-model")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_no_name_of_a_vocabulary_is_ambiguous(kind: str) -> None:
    """Numbers are chosen so that a literal one may be taken for the number of a block.

    Two families may have modules that flatten alike; one has not, and they are few.
    """
    doubtful = set()
    for template in TEMPLATES[kind]:
        for numbers in product(("0", "1", "2", "10"), repeat=template.split(".").count(NUMBER)):
            name = filled(template, numbers)
            found = unflatten(flatten(name), kind)
            assert name in found
            assert unflatten(flatten(name), "any") == found
            if len(found) > 1:
                assert kind == BACKBONE
                doubtful.add(template)
                assert all(len(family.parse(flatten(name))) < 2 for family in FAMILIES)
    assert doubtful <= set(expand("double_blocks.*.{img,txt}_attn{_,.}{qkv,proj}"))


def test_an_ambiguous_name_has_every_reading() -> None:
    vocabulary = Vocabulary(("a.b_c", "a_b.c", "x.*.y_1", "x.*.y.*", "x.0.y.1"))
    assert vocabulary.parse("a_b_c") == ("a.b_c", "a_b.c")
    assert vocabulary.parse("x_0_y_1") == ("x.0.y.1", "x.0.y_1")
    assert vocabulary.parse("x_3_y_1") == ("x.3.y.1", "x.3.y_1")
    assert vocabulary.parse("x_3_y_2") == ("x.3.y.2",)


def test_there_is_no_such_kind() -> None:
    with pytest.raises(KeyError):
        unflatten("x", "y")


@given(
    case=st.sampled_from([(kind, each) for kind in TEMPLATES for each in TEMPLATES[kind]]),
    numbers=st.lists(st.integers(0, 999_999).map(str), min_size=4, max_size=4),
)
def test_what_is_flattened_comes_back(case: tuple[str, str], numbers: list[str]) -> None:
    kind, template = case
    name = filled(template, tuple(numbers))
    assert name in unflatten(flatten(name), kind)
    for path in unflatten(flatten(name), "any"):
        assert flatten(path) == flatten(name)


WORDS = sorted({word for each in TEMPLATES.values() for name in each for word in name.split("_")})


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("_".join))
def test_readings_flatten_to_the_name(flat: str) -> None:
    for kind in KINDS:
        for path in unflatten(flat, kind):
            assert flatten(path) == flat
            assert NUMBER not in path


@pytest.mark.parametrize(
    "flat",
    [
        "",
        "_",
        "*",
        "down_blocks_*_resnets_0_conv1",
        "down_blocks_٣_resnets_0_conv1",
        "down_blocks_00_resnets_0_conv1",
        "down_blocks_1234567_resnets_0_conv1",
        "down_blocks_0_resnets_0_conv1_",
        "_down_blocks_0_resnets_0_conv1",
        "down_blocks__0_resnets_0_conv1",
        "DOWN_BLOCKS_0_RESNETS_0_CONV1",
        "down_blocks_0_resnets_0_conv1\n",
    ],
)
def test_what_is_no_name(flat: str) -> None:
    assert unflatten(flat, "any") == ()


def test_long_names_cost_nothing() -> None:
    start = time.perf_counter()
    for flat in ("0_" * 1_000_000, "down_blocks_" * 1_000_000, "1" * 10_000_000, "0_" * 256):
        assert unflatten(flat, "any") == ()
    assert time.perf_counter() - start < 1


def test_expand_names_every_alternative_once() -> None:
    assert expand("x.{a,b.}{c,d}", "x.ac", "y") == ("x.ac", "x.ad", "x.b.c", "x.b.d", "y")
    assert expand("{a.,}b") == ("a.b", "b")
