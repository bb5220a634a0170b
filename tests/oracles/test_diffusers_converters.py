"""Names of backbones against diffusers' converters of whole checkpoints, row by row.

Its converters of adapters are not asked: several of them are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.names.families import family_named
from loratool.names.family import Family, Fusion
from loratool.names.vocabulary import NUMBER, flatten

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]


def table(family: Family) -> Iterator[tuple[str, Fusion]]:
    """Every native module of a family, with what it is."""
    for row in family.rows:
        for number in range(row.count):
            native = row.native.replace(NUMBER, str(number))
            fusion = family.from_native(native)
            assert fusion is not None
            yield native, fusion


def checkpoint_of(family: Family, *, start: int = 0) -> Tensors:
    """A native checkpoint in which no two numbers are alike; each module has a weight and a bias.

    Weights have two rows for each module of diffusers, four where halves are exchanged.
    """
    found: Tensors = {}
    for native, fusion in table(family):
        size = 2 * len(fusion.modules) * (2 if fusion.swapped else 1)
        for suffix in ("weight", "bias"):
            values = torch.arange(start, start + size, dtype=torch.float64)
            found[f"{native}.{suffix}"] = values if suffix == "bias" else values[:, None]
            start += size
    return found


def parts_of(family: Family, checkpoint: Mapping[str, torch.Tensor]) -> Tensors:
    """What the table says that diffusers' modules hold."""
    found: Tensors = {}
    for key, tensor in checkpoint.items():
        native, _, suffix = key.rpartition(".")
        fusion = family.from_native(native)
        assert fusion is not None
        if fusion.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        parts = tensor.chunk(len(fusion.modules))
        found |= {
            f"{module}.{suffix}": part for module, part in zip(fusion.modules, parts, strict=True)
        }
    return found


def without(tensors: Tensors, *endings: str) -> Tensors:
    """The tensors whose names end in none of these."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


class Kept(dict[str, torch.Tensor]):
    """A checkpoint from which nothing can be taken out."""

    def pop(self, key: str, *_: Any) -> torch.Tensor:  # type: ignore[override]
        """Return a tensor."""
        return self[key]


def assert_same(found: Mapping[str, Any], expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def converters() -> Any:
    return pytest.importorskip("diffusers.loaders.single_file_utils")


def test_ltx_video_is_renamed_as_diffusers_renames_it() -> None:
    family = family_named("ltx-video")
    checkpoint = checkpoint_of(family)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in checkpoint.items()}
    found = converters().convert_ltx_transformer_checkpoint_to_diffusers(prefixed)
    assert_same(found, parts_of(family, checkpoint))


def test_ltx2_is_renamed_as_diffusers_renames_it() -> None:
    """Its converter of checkpoints knows the first release; that of adapters the later one."""
    family = family_named("ltx-2")
    checkpoint = checkpoint_of(family)
    first = {k: v for k, v in checkpoint.items() if "prompt" not in k and "gate_logits" not in k}
    found = converters().convert_ltx2_transformer_to_diffusers(dict(first))
    assert_same(found, parts_of(family, first))
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    names = {
        f"diffusion_model.{native}.lora_A.weight": fusion.modules[0]
        for native, fusion in table(family)
    }
    assert utils._convert_non_diffusers_ltx2_lora_to_diffusers(names) == {
        f"transformer.{module}.lora_A.weight": module for module in names.values()
    }


def test_mochi_is_split_as_diffusers_splits_it() -> None:
    """Also the halves of its gated layers, and those of its last modulation, are exchanged."""
    family = family_named("mochi")
    checkpoint = without(
        checkpoint_of(family),
        *(f"{name}.bias" for name in ("qkv_x", "qkv_y", "w1", "w2")),
        *(f"{name}_norm_{stream}.bias" for name in "qk" for stream in "xy"),
    )
    positions = torch.zeros(1)
    found = converters().convert_mochi_transformer_checkpoint_to_diffusers(
        checkpoint | {"pos_frequencies": positions}
    )
    assert found.pop("pos_frequencies") is positions
    assert_same(found, parts_of(family, checkpoint))


def test_sana_is_split_as_diffusers_splits_it() -> None:
    """Its converter does not know the norms of queries and keys of the later releases."""
    family = family_named("sana")
    checkpoint = {
        name: value for name, value in checkpoint_of(family).items() if "_norm." not in name
    } | {"attention_y_norm.weight": torch.full((2, 1), -1.0, dtype=torch.float64)}
    checkpoint = without(checkpoint, "attn.qkv.bias", "point_conv.conv.bias")
    tables = [f"blocks.{number}.scale_shift_table" for number in range(60)]
    others = ("pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table", *tables)
    found = converters().convert_sana_transformer_to_diffusers(
        checkpoint | {name: torch.zeros(1) for name in others}
    )
    found = {k: v for k, v in found.items() if not k.endswith("scale_shift_table")}
    assert_same(found, parts_of(family, checkpoint))


@pytest.mark.parametrize("name", ["cosmos", "cosmos2"])
def test_cosmos_is_renamed_as_diffusers_renames_it(name: str) -> None:
    """Its converter tells the generations by a name that it has taken out of the checkpoint."""
    family = family_named(name)
    checkpoint = checkpoint_of(family)
    prefixed = Kept({f"net.{native}": value for native, value in checkpoint.items()})
    found = converters().convert_cosmos_transformer_checkpoint_to_diffusers(prefixed)
    assert_same(found, parts_of(family, checkpoint))


def test_wan_with_vace_is_renamed_as_diffusers_renames_it() -> None:
    family = family_named("wan")
    checkpoint = checkpoint_of(family)
    found = converters().convert_wan_transformer_to_diffusers(dict(checkpoint))
    assert_same(found, parts_of(family, checkpoint))


def test_wan_animate_is_split_as_diffusers_splits_it() -> None:
    family = family_named("wan-animate")
    checkpoint = {
        name: value
        for name, value in checkpoint_of(family).items()
        if not (".net_app." in name and name.endswith(".bias"))
    }
    found = converters().convert_wan_transformer_to_diffusers(dict(checkpoint))
    assert_same(found, parts_of(family, checkpoint))


def test_stable_cascade_is_named_as_diffusers_names_it() -> None:
    """The checkpoint has the projections of queries, keys and values in one parameter."""
    family = family_named("stable-cascade")
    checkpoint = checkpoint_of(family)
    fused: Tensors = {}
    for name, value in checkpoint.items():
        module, _, suffix = name.rpartition(".")
        if module.endswith(".to_q"):
            before = module.removesuffix("to_q")
            parts = [checkpoint[f"{before}to_{part}.{suffix}"] for part in "qkv"]
            fused[f"{before}in_proj_{suffix}"] = torch.cat(parts)
        elif not module.endswith((".to_k", ".to_v")):
            fused[name] = value
    found = converters().convert_stable_cascade_unet_single_file_to_diffusers(fused)
    assert_same(found, parts_of(family, checkpoint))


@pytest.mark.parametrize("name", ["sdxl-refiner", "kolors"])
def test_other_unets_are_renamed_as_diffusers_renames_them(name: str) -> None:
    family = family_named(name)
    expected, checkpoint = {}, {}
    for native, fusion in table(family):
        if native == "encoder_hid_proj":  # which no original checkpoint has
            continue
        for suffix in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{native}.{suffix}"] = native
            expected[f"{fusion.modules[0]}.{suffix}"] = native
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    assert converters().convert_ldm_unet_checkpoint(checkpoint, config) == expected


# Adapters in original names, converted and applied by diffusers

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "ltx-video": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
        },
    ),
    "ltx-2": (
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
        },
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
            "sample_size": 8,
        },
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
        },
    ),
    "wan": (
        "WanVACETransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "vace_layers": [0, 2],
            "vace_in_channels": 8,
        },
    ),
}
TINY["cosmos2"] = TINY["cosmos"]


@pytest.mark.parametrize("scheme", ["comfy", "kohya"])
@pytest.mark.parametrize("name", TINY)
def test_converted_adapters_are_what_diffusers_applies(
    name: str, scheme: str, tmp_path: Path
) -> None:
    """Every linear layer is adapted in its original name; diffusers adds each delta."""
    diffusers = pytest.importorskip("diffusers")
    family = family_named(name)
    kind, options = TINY[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**options)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    tensors, truth = {}, {}
    for native, fusion in table(family):
        layers = [linear[module] for module in fusion.modules if module in linear]
        if len(layers) < len(fusion.modules):
            continue
        down = torch.randn(2, layers[0].in_features)
        ups = [torch.randn(layer.out_features, 2) for layer in layers]
        truth |= {
            module: layer.weight.detach() + up @ down
            for module, layer, up in zip(fusion.modules, layers, ups, strict=True)
        }
        up = torch.cat(ups)
        up = torch.cat(up.chunk(2)[::-1]) if fusion.swapped else up
        prefix, leaves = f"diffusion_model.{native}", ("lora_A", "lora_B")
        if scheme == "kohya":
            prefix, leaves = f"lora_unet_{flatten(native)}", ("lora_down", "lora_up")
        tensors |= {f"{prefix}.{leaves[0]}.weight": down, f"{prefix}.{leaves[1]}.weight": up}
    # Mochi's last block has a layer of its own, and these models end elsewhere.
    assert all(module.endswith("context.linear_1") for module in linear.keys() - truth.keys())
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "o.safetensors"
    loratool.convert(tmp_path / "a.safetensors", "diffusers", out, family=name)
    model.load_lora_adapter(load_file(out), prefix="transformer", adapter_name="default")
    model.fuse_lora(adapter_names=["default"])
    model.unload_lora()
    for module, weight in truth.items():
        torch.testing.assert_close(model.get_submodule(module).weight.detach(), weight)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_files_of_xlabs_are_read_as_diffusers_reads_them(prefix: str, tmp_path: Path) -> None:
    """And what is written of the result is read as the same."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    kinds = {
        *(f"double_blocks.18.processor.{kind}_lora{n}" for kind in ("qkv", "proj") for n in "12"),
        *(f"single_blocks.37.processor.{kind}_lora" for kind in ("qkv", "proj")),
    }
    tensors: Tensors = {}
    for name in sorted(kinds):
        inputs = 40 if name.startswith("single") and "proj" in name else 8
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(2, inputs)
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(24 if "qkv" in name else 8, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    truth = utils._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    loratool.convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors")
    assert_same(load_file(tmp_path / "d.safetensors"), truth)
    loratool.convert(tmp_path / "d.safetensors", "xlabs", tmp_path / "x.safetensors", family="flux")
    written = load_file(tmp_path / "x.safetensors")
    assert_same(utils._convert_xlabs_flux_lora_to_diffusers(dict(written)), truth)
