"""Conversions beside the real PEFT, diffusers and LyCORIS: what is written loads, with one delta.

Every truth is the formula, in float64, of the file that was converted; every finding is what the
library makes of the file that was written. Where the reference says that a library is wrong, the
formula is compared with the tensors themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from samples import ROOT
from torch import nn

from loratool import convert, merge
from loratool.errors import AdapterError, LoratoolError, UnsupportedError

pytestmark = pytest.mark.slow

DATA = ROOT.parent / "shared" / "data"
Deltas = dict[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]

ROUNDING = 1e-6
"""The libraries compute in float32."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries, whose warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def diffusers() -> Any:
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with quiet():
        found = pytest.importorskip("diffusers")
        _ = found.StableDiffusionPipeline, found.FluxPipeline
    return found


@pytest.fixture(scope="module")
def lycoris() -> Any:
    with quiet():
        return pytest.importorskip("lycoris.modules")


# Models, tiny but with the module tree of the real ones ---------------------------------------


def sd1(diffusers: Any) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(  # type: ignore[no-any-return]
        block_out_channels=(8, 16, 16, 16),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        sample_size=8,
    )


def sdxl(diffusers: Any) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(  # type: ignore[no-any-return]
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=28,
        sample_size=8,
    )


def flux(diffusers: Any) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(  # type: ignore[no-any-return]
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def sd3(diffusers: Any, dual: tuple[int, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(  # type: ignore[no-any-return]
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )


def clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
    )
    return CLIPTextModel(config)


def llama(*, bias: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        attention_bias=bias,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
    )


# Files, and what they mean --------------------------------------------------------------------


def weights_of(model: nn.Module) -> Deltas:
    """Return the weight of every linear and convolutional layer, in float64."""
    return {
        name: module.weight.detach().double().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def factors(shape: torch.Size | tuple[int, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random A and B for a weight of ``shape``."""
    ones = (1,) * (len(shape) - 2)
    return torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *ones)


def product(up: torch.Tensor, down: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * (up.double().flatten(1) @ down.double().flatten(1))


def hub_adapter(
    model: nn.Module, component: str, path: Path, ranks: tuple[int, ...] = (4, 2)
) -> Deltas:
    """Write an adapter of every layer of ``model`` as diffusers does; return its deltas."""
    tensors, truth = {}, {}
    for index, (name, weight) in enumerate(weights_of(model).items()):
        down, up = factors(weight.shape, ranks[index % len(ranks)])
        tensors[f"{component}.{name}.lora_A.weight"] = down
        tensors[f"{component}.{name}.lora_B.weight"] = up
        truth[name] = product(up, down)
    save_file(tensors, path)
    return truth


def stored_deltas(path: Path, prefix: str) -> Deltas:
    """Return ``B @ A`` of a file in diffusers' scheme, whose factors hold the scale."""
    tensors = load_file(path)
    assert not [key for key in tensors if ".lora_A." not in key and ".lora_B." not in key]
    return {
        key.removeprefix(prefix).removesuffix(".lora_A.weight"): product(
            tensors[key.replace(".lora_A.", ".lora_B.")], down
        )
        for key, down in tensors.items()
        if ".lora_A." in key
    }


def fused_deltas(model: nn.Module, before: Mapping[str, torch.Tensor]) -> Deltas:
    """Fuse what is loaded into ``model``; return what that added, kernels flattened."""
    with quiet():
        model.fuse_lora()  # type: ignore[operator]
    return {
        name: (module.base_layer.weight.detach().double() - before[name]).flatten(1)
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
    }


def assert_same(found: Deltas, truth: Deltas, tolerance: float = ROUNDING) -> None:
    """Check that the modules are the same ones, and the delta of each."""
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        error = (found[name] - expected).norm()
        assert error <= tolerance * expected.norm(), (name, float(error / expected.norm()))


def load_unet(diffusers: Any, model: nn.Module, path: Path, pipeline: str) -> None:
    kind = getattr(diffusers, pipeline)
    with quiet():
        tensors, alphas = kind.lora_state_dict(str(path), unet_config=model.config)
        kind.load_lora_into_unet(tensors, alphas, model)


def load_transformer(diffusers: Any, model: nn.Module, path: Path, pipeline: str) -> None:
    kind = getattr(diffusers, pipeline)
    with quiet():
        read = kind.lora_state_dict(str(path))
        settings = {"network_alphas": None} if pipeline == "FluxPipeline" else {}
        kind.load_lora_into_transformer(read, transformer=model, **settings)


def load_peft(model: nn.Module, folder: Path) -> Any:
    """Load ``folder`` with PEFT; a key that is missing or superfluous is an error."""
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, str(folder)).eval()
        expected = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    texts = [str(item.message) for item in caught]
    assert not [text for text in texts if "missing" in text or "did not match" in text]
    written = load_file(folder / "adapter_model.safetensors")
    assert {key for key in written if "lora_" in key} == {key for key in expected if "lora_" in key}
    return loaded


def peft_deltas(model: nn.Module) -> Deltas:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        .detach()
        .double()
        .flatten(1)
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


def merged_weights(model: Any) -> Deltas:
    """Return the weights of a PEFT model once its adapter is merged."""
    with quiet():
        merged = model.merge_and_unload()
    return {name: value.detach().double() for name, value in merged.named_parameters()}


def place(folder: Path, scheme: str, name: str) -> Path:
    if scheme in ("peft", "mlx"):
        return folder / name
    return folder / f"{name}{'.bin' if scheme == 'prefixed' else '.safetensors'}"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


# Stable Diffusion -----------------------------------------------------------------------------


ALPHAS: tuple[Callable[[float], torch.Tensor], ...] = (
    torch.tensor,
    lambda number: torch.tensor(int(number)),
    lambda number: torch.tensor([number]),
    lambda number: torch.tensor(number).half(),
)
"""How alphas are stored in files that people have."""


def kohya_unet(model: nn.Module, path: Path) -> Deltas:
    """Write every layer in kohya's scheme: mixed ranks; alphas of all kinds, or missing."""
    tensors, truth = {}, {}
    for index, (name, weight) in enumerate(weights_of(model).items()):
        rank = (4, 2, 3)[index % 3]
        number = (1.0, 3.0, None, 8.0)[index % 4]
        down, up = factors(weight.shape, rank)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if number is not None:
            tensors[f"{key}.alpha"] = ALPHAS[index % 5 % 4](number)
        truth[name] = product(up, down, 1.0 if number is None else number / rank)
    save_file(tensors, path)
    return truth


class TestStableDiffusion:
    """U-Nets: linear layers and convolutions, both namings, all older layouts."""

    def test_kohya_with_any_alpha(self, diffusers: Any, tmp_path: Path) -> None:
        model = sd1(diffusers)
        before = weights_of(model)
        truth = kohya_unet(model, tmp_path / "k.safetensors")
        convert(tmp_path / "k.safetensors", "diffusers", tmp_path / "d.safetensors")
        load_unet(diffusers, model, tmp_path / "d.safetensors", "StableDiffusionPipeline")
        assert_same(fused_deltas(model, before), truth)
        convert(tmp_path / "k.safetensors", "peft", tmp_path / "p")
        assert_same(peft_deltas(load_peft(sd1(diffusers), tmp_path / "p")), truth)

    def test_sdxl_under_either_naming(self, diffusers: Any, tmp_path: Path) -> None:
        model = sdxl(diffusers)
        before = weights_of(model)
        # One rank: diffusers takes one alpha for all attention layers of a kohya file.
        truth = hub_adapter(model, "unet", tmp_path / "a.safetensors", ranks=(3,))
        tensors = load_file(tmp_path / "a.safetensors")
        for naming in ("native", "diffusers"):
            output = tmp_path / f"{naming}.safetensors"
            convert(tmp_path / "a.safetensors", "kohya", output, naming=naming)
            model = sdxl(diffusers)
            load_unet(diffusers, model, output, "StableDiffusionXLPipeline")
            known = dict(truth)
            if naming == "diffusers":  # diffusers reads no such name
                for number in (1, 2):
                    del known[f"add_embedding.linear_{number}"]
            assert_same(fused_deltas(model, before), known)
            convert(output, "diffusers", tmp_path / "b.safetensors", force=True)
            back = load_file(tmp_path / "b.safetensors")
            assert back.keys() == tensors.keys()
            assert all(torch.equal(back[key], tensors[key]) for key in back)

    @pytest.mark.parametrize("form", ["unet.processor", "processor", "lora"])
    def test_layouts_of_old_diffusers(self, form: str, diffusers: Any, tmp_path: Path) -> None:
        model = sd1(diffusers)
        before = weights_of(model)
        tensors, truth = {}, {}
        for name, weight in before.items():
            match = re.fullmatch(r"(.+\.attn\d)\.(to_q|to_k|to_v|to_out)(?:\.0)?", name)
            if match is None and ".ff." not in name:
                continue
            key = f"{name}.lora"
            if match is not None and form != "lora":
                key = f"{match[1]}.processor.{match[2]}_lora"
            key = key if form == "processor" else f"unet.{key}"
            down, up = factors(weight.shape, 3)
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
            truth[name] = product(up, down)
        save_file(tensors, tmp_path / "a.safetensors")
        for to in ("diffusers", "kohya", "diffusers-legacy"):
            output = tmp_path / f"{to}.safetensors"
            assert convert(tmp_path / "a.safetensors", to, output).source == "diffusers-legacy"
            model = sd1(diffusers)
            load_unet(diffusers, model, output, "StableDiffusionPipeline")
            assert_same(fused_deltas(model, before), truth)

    @pytest.mark.parametrize("kind", ["plain", "dora", "rslora"])
    def test_peft_with_convolutions(
        self, kind: str, diffusers: Any, lycoris: Any, tmp_path: Path
    ) -> None:
        settings: dict[str, Any] = {
            "plain": {},
            "dora": {"use_dora": True},
            "rslora": {
                "use_rslora": True,
                "rank_pattern": {"conv1": 2},
                "alpha_pattern": {"to_q": 1, "conv_in": 9},
            },
        }[kind]
        leaves = ["to_q", "to_out.0", "conv1", "conv_in", "proj_in", "ff.net.0.proj"]
        truth = trained(lambda: sd1(diffusers), tmp_path / "a", target_modules=leaves, **settings)
        for to in ("kohya", "comfy", "diffusers"):
            output = tmp_path / f"{to}.safetensors"
            convert(tmp_path / "a", to, output)
            convert(output, "peft", tmp_path / f"{to}-back")
            loaded = load_peft(sd1(diffusers), tmp_path / f"{to}-back")
            assert_same(merged_weights(loaded), truth)
        model = sd1(diffusers)
        load_unet(diffusers, model, tmp_path / "diffusers.safetensors", "StableDiffusionPipeline")
        with quiet():
            model.fuse_lora()
        found = {
            name.replace(".base_layer", ""): value.detach().double()
            for name, value in model.named_parameters()
            if "lora_" not in name
        }
        assert_same(found, truth)
        self._check_lycoris(lycoris, dict(sd1(diffusers).named_modules()), tmp_path, truth)

    @staticmethod
    def _check_lycoris(
        lycoris: Any, modules: dict[str, nn.Module], folder: Path, truth: Deltas
    ) -> None:
        from lycoris.modules.locon import LoConModule

        tensors = load_file(folder / "kohya.safetensors")
        flat = {f"lora_unet_{name.replace('.', '_')}": name for name in modules}
        for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
            prefix = key.removesuffix(".lora_down.weight")
            with torch.no_grad(), quiet():
                made = LoConModule.make_module_from_state_dict(
                    prefix,
                    modules[flat[prefix]],
                    tensors[f"{prefix}.lora_up.weight"],
                    tensors[key],
                    None,
                    tensors[f"{prefix}.alpha"],
                    tensors.get(f"{prefix}.dora_scale"),
                )
                merged = made.get_merged_weight()[0].double()
            name = f"{flat[prefix]}.weight"
            assert_same({name: merged}, {name: truth[name]})

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("unet.", ".lora_{}.default.weight"),
            ("unet.base_model.model.", ".lora_{}.weight"),
            ("base_model.model.unet.", ".lora_{}.weight"),
            ("base_model.model.", ".lora_{}.weight"),
            ("", ".lora_{}.default.weight"),
            ("", ".lora_{}"),
            ("unet.", ".lora_{}"),
        ],
    )
    def test_prefixes_and_infixes(
        self, before: str, after: str, diffusers: Any, tmp_path: Path
    ) -> None:
        model = sd1(diffusers)
        weights = weights_of(model)
        tensors, truth = {}, {}
        for name in [name for name in weights if name.endswith("attn1.to_q")]:
            down, up = factors(weights[name].shape, 3)
            tensors |= {before + name + after.format("A"): down}
            tensors |= {before + name + after.format("B"): up}
            truth[name] = product(up, down)
        save_file(tensors, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        load_unet(diffusers, model, tmp_path / "b.safetensors", "StableDiffusionPipeline")
        assert_same(fused_deltas(model, weights), truth)

    def test_metadata_means_what_diffusers_takes_it_for(
        self, diffusers: Any, tmp_path: Path
    ) -> None:
        model = sd1(diffusers)
        before = weights_of(model)
        hub_adapter(model, "unet", tmp_path / "plain.safetensors", ranks=(4,))
        names = [name for name in before if name.endswith(("to_q", "conv1"))]
        tensors = {
            key: value
            for key, value in load_file(tmp_path / "plain.safetensors").items()
            if key.removeprefix("unet.").rpartition(".lora_")[0] in names
        }
        fields = {
            "unet.r": 4,
            "unet.lora_alpha": 6,
            "unet.rank_pattern": {},
            "unet.alpha_pattern": {f"^{names[0]}": 1},
            "unet.target_modules": names,
        }
        save_file(
            tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(fields)}
        )
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        found = []
        kind = diffusers.StableDiffusionPipeline
        for name in ("a", "b"):
            model = sd1(diffusers)
            with quiet():
                read = kind.lora_state_dict(
                    str(tmp_path / f"{name}.safetensors"), return_lora_metadata=True
                )
                kind.load_lora_into_unet(*read[:2], model, metadata=read[2])
            found.append(fused_deltas(model, before))
        assert_same(found[1], found[0])
        assert "lora_adapter_metadata" not in metadata_of(tmp_path / "b.safetensors")


# Flux -----------------------------------------------------------------------------------------


WIDTH = 16


def native_flux() -> dict[str, tuple[tuple[int, int], list[str]]]:
    """Return the modules of the original Flux: their shapes, and what they are in diffusers."""
    h = WIDTH
    found: dict[str, tuple[tuple[int, int], list[str]]] = {}
    streams = {
        "img": (["to_q", "to_k", "to_v"], "to_out.0", "ff", "norm1"),
        "txt": (
            ["add_q_proj", "add_k_proj", "add_v_proj"],
            "to_add_out",
            "ff_context",
            "norm1_context",
        ),
    }
    for i in range(2):
        block = f"transformer_blocks.{i}"
        for stream, (parts, out, mlp, norm) in streams.items():
            native = f"double_blocks.{i}.{stream}"
            found |= {
                f"{native}_attn.qkv": ((3 * h, h), [f"{block}.attn.{part}" for part in parts]),
                f"{native}_attn.proj": ((h, h), [f"{block}.attn.{out}"]),
                f"{native}_mlp.0": ((4 * h, h), [f"{block}.{mlp}.net.0.proj"]),
                f"{native}_mlp.2": ((h, 4 * h), [f"{block}.{mlp}.net.2"]),
                f"{native}_mod.lin": ((6 * h, h), [f"{block}.{norm}.linear"]),
            }
        block = f"single_transformer_blocks.{i}"
        parts = [f"{block}.attn.to_{x}" for x in "qkv"] + [f"{block}.proj_mlp"]
        found |= {
            f"single_blocks.{i}.linear1": ((7 * h, h), parts),
            f"single_blocks.{i}.linear2": ((h, 5 * h), [f"{block}.proj_out"]),
            f"single_blocks.{i}.modulation.lin": ((3 * h, h), [f"{block}.norm.linear"]),
        }
    embedder = "time_text_embed"
    for native, name, into in (
        ("time_in", "timestep_embedder", 256),
        ("guidance_in", "guidance_embedder", 256),
        ("vector_in", "text_embedder", 10),
    ):
        found |= {
            f"{native}.in_layer": ((h, into), [f"{embedder}.{name}.linear_1"]),
            f"{native}.out_layer": ((h, h), [f"{embedder}.{name}.linear_2"]),
        }
    return found | {
        "img_in": ((h, 4), ["x_embedder"]),
        "txt_in": ((h, 12), ["context_embedder"]),
        "final_layer.linear": ((4, h), ["proj_out"]),
        "final_layer.adaLN_modulation.1": ((2 * h, h), ["norm_out.linear"]),
    }


def offsets(parts: int, rows: int) -> list[tuple[int, int]]:
    """Return which rows of a fused module each of its parts has."""
    if parts == 1:
        return [(0, rows)]
    return [(i * WIDTH, (i + 1) * WIDTH if i < 3 else rows) for i in range(parts)]


def write_native_flux(path: Path, scheme: str, *, diagonal: bool) -> Deltas:
    """Write every module under its original name; return the deltas of diffusers' modules."""
    tensors, truth = {}, {}
    for index, (native, ((out, into), parts)) in enumerate(native_flux().items()):
        rank, alpha = (12, 24)[index % 2], (1.0, 5.0, None)[index % 3]
        down, up = torch.randn(rank, into), torch.randn(out, rank)
        rows = offsets(len(parts), out)
        if diagonal and len(parts) > 1:
            step = rank // len(parts)
            mask = torch.zeros(out, rank)
            for number, (first, last) in enumerate(rows):
                mask[first:last, number * step : (number + 1) * step] = 1
            up = up * mask
        key = f"diffusion_model.{native}"
        if scheme == "kohya":
            key = f"lora_unet_{native.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        delta = product(up, down, 1.0 if alpha is None else alpha / rank)
        if native == "final_layer.adaLN_modulation.1":  # (shift, scale) is (scale, shift) there
            delta = torch.cat([delta[WIDTH:], delta[:WIDTH]])
        for name, (first, last) in zip(parts, rows, strict=True):
            truth[name] = delta[first:last]
    save_file(tensors, path)
    return truth


class TestFlux:
    """Projections that the original checkpoint fuses."""

    @pytest.mark.parametrize("scheme", ["kohya", "comfy"])
    @pytest.mark.parametrize("diagonal", [False, True])
    def test_native_names(
        self, scheme: str, diagonal: bool, diffusers: Any, tmp_path: Path
    ) -> None:
        truth = write_native_flux(tmp_path / "a.safetensors", scheme, diagonal=diagonal)
        assert truth.keys() == weights_of(flux(diffusers)).keys()
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        self._check(diffusers, tmp_path / "b.safetensors", truth)
        first = load_file(tmp_path / "b.safetensors")
        ranks = {first[key].shape[0] for key in first if ".attn.to_q.lora_A" in key}
        assert ranks == ({4, 8, 3, 6} if diagonal else {12, 24}) & ranks
        for to in ("kohya", "comfy"):
            convert(tmp_path / "b.safetensors", to, tmp_path / "c.safetensors", force=True)
            convert(tmp_path / "c.safetensors", "diffusers", tmp_path / "d.safetensors", force=True)
            again = load_file(tmp_path / "d.safetensors")
            assert again.keys() == first.keys()
            assert all(torch.equal(again[key], first[key]) for key in first)

    @staticmethod
    def _check(diffusers: Any, path: Path, truth: Deltas) -> None:
        model = flux(diffusers)
        before = weights_of(model)
        load_transformer(diffusers, model, path, "FluxPipeline")
        assert_same(fused_deltas(model, before), truth)

    @pytest.mark.parametrize(
        "to",
        [
            "kohya",
            "comfy",
            "peft",
            "module-path",
            "loralib",
            "mlx",
            "prefixed",
            "transposed",
            "diffusers-legacy",
        ],
    )
    def test_there_and_back(self, to: str, diffusers: Any, tmp_path: Path) -> None:
        truth = hub_adapter(flux(diffusers), "transformer", tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", to, place(tmp_path, to, "middle"))
        convert(place(tmp_path, to, "middle"), "diffusers", tmp_path / "b.safetensors")
        self._check(diffusers, tmp_path / "b.safetensors", truth)

    @pytest.mark.parametrize("diagonal", [False, True])
    def test_beside_the_converter_of_diffusers(
        self, diagonal: bool, diffusers: Any, tmp_path: Path
    ) -> None:
        """It knows the real width only, and nothing but the blocks is right there."""
        from diffusers.loaders import lora_conversion_utils

        h, tensors = 3072, {}
        shapes = {
            **{f"double_blocks_0_{s}_attn_qkv": (3 * h, h) for s in ("img", "txt")},
            **{f"double_blocks_0_{s}_attn_proj": (h, h) for s in ("img", "txt")},
            **{f"double_blocks_0_{s}_mlp_0": (4 * h, h) for s in ("img", "txt")},
            **{f"double_blocks_0_{s}_mlp_2": (h, 4 * h) for s in ("img", "txt")},
            "single_blocks_0_linear1": (7 * h, h),
            "single_blocks_0_linear2": (h, 5 * h),
        }
        for name, (out, into) in shapes.items():
            rank = 6 if name.endswith("qkv") else 4
            down, up = torch.randn(rank, into), torch.randn(out, rank)
            if diagonal and name.endswith("qkv"):
                up *= torch.block_diag(*[torch.ones(h, 2)] * 3)
            tensors |= {
                f"lora_unet_{name}.lora_down.weight": down,
                f"lora_unet_{name}.lora_up.weight": up,
                f"lora_unet_{name}.alpha": torch.tensor(3.0),
            }
        save_file(tensors, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        convert(tmp_path / "b.safetensors", "kohya", tmp_path / "c.safetensors")
        ours = load_file(tmp_path / "b.safetensors")
        for source in (tensors, load_file(tmp_path / "c.safetensors")):
            theirs = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(source))
            assert theirs.keys() == ours.keys()
            for key in [key for key in ours if ".lora_A." in key]:
                other = key.replace(".lora_A.", ".lora_B.")
                assert ours[key].shape == theirs[key].shape
                probe = torch.randn(ours[key].shape[1], 2)
                expected = theirs[other] @ (theirs[key] @ probe)
                found = ours[other] @ (ours[key] @ probe)
                assert (found - expected).norm() < 1e-5 * expected.norm()

    @pytest.mark.parametrize("to", ["kohya", "comfy"])
    @pytest.mark.parametrize(
        ("parts", "ranks", "alphas"),
        [
            (("transformer_blocks.0.attn.to_q",), (4,), (None,)),
            (("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"), (4, 2), (1, 5)),
            (tuple(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"), (4, 2, 3), (4, 2, 3)),
            (("single_transformer_blocks.1.attn.to_q",), (4,), (None,)),
            (("single_transformer_blocks.1.proj_mlp",), (4,), (3,)),
            (
                ("single_transformer_blocks.1.attn.to_q", "single_transformer_blocks.1.proj_mlp"),
                (4, 2),
                (1, 3),
            ),
            (("norm_out.linear", "x_embedder"), (4, 1), (3, None)),
        ],
    )
    def test_part_of_a_fused_projection(
        self,
        parts: tuple[str, ...],
        ranks: tuple[int, ...],
        alphas: tuple[float | None, ...],
        to: str,
        diffusers: Any,
        tmp_path: Path,
    ) -> None:
        """The same modules come back, and no others: those that have no rows are not adapted."""
        weights = weights_of(flux(diffusers))
        tensors, truth = {}, {}
        for name, rank, alpha in zip(parts, ranks, alphas, strict=True):
            down, up = factors(weights[name].shape, rank)
            tensors[f"transformer.{name}.lora_A.weight"] = down
            tensors[f"transformer.{name}.lora_B.weight"] = up
            if alpha is not None:
                tensors[f"transformer.{name}.alpha"] = torch.tensor(float(alpha))
            truth[name] = product(up, down, 1.0 if alpha is None else alpha / rank)
        save_file(tensors, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", to, tmp_path / "b.safetensors", family="flux")
        names = {key.partition(".lora_")[0] for key in load_file(tmp_path / "b.safetensors")}
        assert not [name for name in names if "transformer_blocks" in name or "norm_out" in name]
        convert(tmp_path / "b.safetensors", "diffusers", tmp_path / "c.safetensors", family="flux")
        assert_same(stored_deltas(tmp_path / "c.safetensors", "transformer."), truth)
        self._check(diffusers, tmp_path / "c.safetensors", truth)

    @pytest.mark.parametrize(
        "name",
        [
            "lora_unet_double_blocks_0_img_attn_qkv",
            "lora_unet_single_blocks_0_linear2",
            "lora_unet_joint_blocks_0_x_block_attn_proj",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        ],
    )
    def test_kohya_to_kohya_keeps_a_name_that_several_families_have(
        self, name: str, tmp_path: Path
    ) -> None:
        """A file that was read under these names is read under them again."""
        down, up = factors((3 * WIDTH, WIDTH), 4)
        save_file(
            {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up},
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "kohya", tmp_path / "b.safetensors")
        assert f"{name}.lora_up.weight" in load_file(tmp_path / "b.safetensors")

    @pytest.mark.parametrize("scheme", ["kohya", "comfy"])
    def test_native_names_stay_native_where_families_share_them(
        self, scheme: str, tmp_path: Path
    ) -> None:
        """Flux and Flux 2 both have ``double_blocks.0.img_attn.qkv``; kohya's name is that."""
        dotted, flat = "double_blocks.0.img_attn.qkv", "double_blocks_0_img_attn_qkv"
        key = f"lora_unet_{flat}" if scheme == "kohya" else f"diffusion_model.{dotted}"
        down, up = factors((3 * WIDTH, WIDTH), 4)
        save_file(
            {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up},
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "kohya", tmp_path / "b.safetensors")
        made = load_file(tmp_path / "b.safetensors")
        assert torch.equal(made[f"lora_unet_{flat}.lora_up.weight"], up)

    def test_kohya_never_gets_names_that_no_reader_of_it_has(self, tmp_path: Path) -> None:
        """Only the family says whether these are fused, and how; comfy refuses, so must kohya."""
        tensors = {}
        for leaf in ("to_q", "to_k", "to_v"):
            down, up = factors((WIDTH, WIDTH), 4)
            key = f"transformer.transformer_blocks.0.attn.{leaf}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        save_file(tensors, tmp_path / "a.safetensors")
        for to in ("comfy", "kohya"):
            with pytest.raises(UnsupportedError) as caught:
                convert(tmp_path / "a.safetensors", to, tmp_path / "b.safetensors")
            assert "--family" in str(caught.value.hint)
        convert(tmp_path / "a.safetensors", "kohya", tmp_path / "b.safetensors", family="flux")
        assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in load_file(
            tmp_path / "b.safetensors"
        )

    @pytest.mark.parametrize("prefix", ["lycoris_", "lora_transformer_"])
    def test_flattened_names_of_diffusers(self, prefix: str, tmp_path: Path) -> None:
        """SimpleTuner's ``lycoris_`` has no component behind it, OneTrainer's ``lora_`` has."""
        tensors, truth = {}, {}
        for block in ("transformer_blocks.0", "single_transformer_blocks.0"):
            name = f"{block}.attn.to_q"
            down, up = factors((WIDTH, WIDTH), 4)
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            truth[name] = product(up, down)
        save_file(tensors, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        assert_same(stored_deltas(tmp_path / "b.safetensors", "transformer."), truth)

    def test_magnitudes_of_the_outputs_are_split_with_them(self, tmp_path: Path) -> None:
        key = "lora_unet_double_blocks_0_img_attn_qkv"
        down, up = factors((3 * WIDTH, WIDTH), 4)
        scale = torch.rand(3 * WIDTH, 1)
        save_file(
            {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.dora_scale": scale,
            },
            tmp_path / "a.safetensors",
        )
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
        made = load_file(tmp_path / "b.safetensors")
        found = [
            made[f"transformer.transformer_blocks.0.attn.to_{x}.lora_magnitude_vector"]
            for x in "qkv"
        ]
        assert torch.equal(torch.cat(found), scale[:, 0])

    @pytest.mark.parametrize("to", ["diffusers", "kohya"])
    def test_magnitudes_of_the_inputs_cannot_be_split(self, to: str, tmp_path: Path) -> None:
        """They are relative to columns of the fused weight, which no part of it has."""
        key = "lora_unet_double_blocks_0_img_attn_qkv"
        down, up = factors((3 * WIDTH, WIDTH), 4)
        tensors = {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.dora_scale": torch.rand(1, WIDTH),
            # Something behind the magnitudes, that a view of the wrong shape would reach into.
            "lora_unet_txt_in.lora_down.weight": torch.randn(64, WIDTH),
            "lora_unet_txt_in.lora_up.weight": torch.randn(WIDTH, 64),
        }
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UnsupportedError, match="magnitudes"):
            convert(
                tmp_path / "a.safetensors",
                to,
                tmp_path / "b.safetensors",
                naming="diffusers" if to == "kohya" else None,
            )

    def test_magnitudes_of_the_inputs_cannot_be_fused(self, tmp_path: Path) -> None:
        tensors = {}
        for leaf in "qkv":
            key = f"lora_unet_transformer_blocks_0_attn_to_{leaf}"
            down, up = factors((WIDTH, WIDTH), 4)
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.dora_scale": torch.rand(1, WIDTH),
            }
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UnsupportedError, match="magnitudes"):
            convert(tmp_path / "a.safetensors", "comfy", tmp_path / "b.safetensors", family="flux")

    def test_magnitudes_of_the_inputs_outlive_an_exchange_of_outputs(self, tmp_path: Path) -> None:
        key = "lora_unet_final_layer_adaLN_modulation_1"
        down, up = factors((2 * WIDTH, WIDTH), 4)
        scale = torch.rand(1, WIDTH)
        save_file(
            {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.dora_scale": scale,
            },
            tmp_path / "a.safetensors",
        )
        output = tmp_path / "b.safetensors"
        convert(tmp_path / "a.safetensors", "kohya", output, naming="diffusers", family="flux")
        made = load_file(output)
        assert torch.equal(made["lora_unet_norm_out_linear.dora_scale"], scale)
        exchanged = torch.cat([up[WIDTH:], up[:WIDTH]])
        assert torch.equal(made["lora_unet_norm_out_linear.lora_up.weight"], exchanged)


class TestStableDiffusion3:
    @pytest.mark.parametrize("dual", [(), (0, 1)])
    @pytest.mark.parametrize("to", ["kohya", "comfy", "peft"])
    def test_there_and_back(
        self, to: str, dual: tuple[int, ...], diffusers: Any, tmp_path: Path
    ) -> None:
        model = sd3(diffusers, dual)
        before = weights_of(model)
        truth = hub_adapter(model, "transformer", tmp_path / "a.safetensors")
        middle = place(tmp_path, to, "middle")
        convert(tmp_path / "a.safetensors", to, middle)
        if to == "kohya":
            names = load_file(middle)
            assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight" in names
            assert not [name for name in names if "transformer_blocks" in name]
        convert(middle, "diffusers", tmp_path / "b.safetensors")
        load_transformer(diffusers, model, tmp_path / "b.safetensors", "StableDiffusion3Pipeline")
        assert_same(fused_deltas(model, before), truth)


# Text encoders --------------------------------------------------------------------------------


CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
BACKBONES = {
    "sdxl": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "flux": "lora_unet_double_blocks_0_img_mod_lin",
    "sd3": "lora_unet_joint_blocks_0_x_block_attn_proj",
}


def kohya_clip(path: Path) -> Deltas:
    """Write a kohya adapter of the tiny text encoder; return deltas by the names it has now."""
    tensors, truth = {}, {}
    for index, (name, weight) in enumerate(weights_of(clip_text()).items()):
        rank, alpha = (4, 2)[index % 2], (1.0, 3.0, None)[index % 3]
        local = name.removeprefix("text_model.")
        key = f"lora_te_text_model_{local.replace('.', '_')}"
        down, up = factors(weight.shape, rank)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        truth[name] = product(up, down, 1.0 if alpha is None else alpha / rank)
    save_file(tensors, path)
    return truth


class TestTextEncoders:
    def test_diffusers_loads_old_and_new_names(self, diffusers: Any, tmp_path: Path) -> None:
        truth = kohya_clip(tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "old.safetensors")
        renamed = {
            key.replace("text_model.", ""): value
            for key, value in load_file(tmp_path / "old.safetensors").items()
        }
        save_file(renamed, tmp_path / "renamed.safetensors")
        convert(tmp_path / "renamed.safetensors", "diffusers", tmp_path / "new.safetensors")
        convert(tmp_path / "renamed.safetensors", "kohya", tmp_path / "k.safetensors")
        names = {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")}
        assert {key.partition(".")[0] for key in load_file(tmp_path / "k.safetensors")} == names
        for name in ("old", "new"):
            model = clip_text()
            kind = diffusers.StableDiffusionPipeline
            with quiet():
                tensors, alphas = kind.lora_state_dict(str(tmp_path / f"{name}.safetensors"))
                kind.load_lora_into_text_encoder(tensors, alphas, model, prefix="text_encoder")
            found = {
                module: layer.get_delta_weight("default_0").detach().double()
                for module, layer in model.named_modules()
                if hasattr(layer, "get_delta_weight")
            }
            assert_same(found, truth)

    def test_peft_gets_the_names_that_its_base_has(self, tmp_path: Path) -> None:
        """transformers 5 has no ``text_model.`` any more; the base says which one it is."""
        truth = kohya_clip(tmp_path / "a.safetensors")
        with quiet():
            clip_text().save_pretrained(tmp_path / "base")  # type: ignore[operator]
        saved = load_file(tmp_path / "base" / "model.safetensors")
        assert any(key.startswith("encoder.") for key in saved)
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", base=tmp_path / "base")
        assert_same(peft_deltas(load_peft(clip_text(), tmp_path / "p")), truth)

    @pytest.mark.parametrize(
        ("family", "encoders"),
        [
            ("sdxl", {"te1": (CLIP, "text_encoder", "clip_l")}),
            ("sdxl", {"te2": (CLIP, "text_encoder_2", "clip_g")}),
            ("flux", {"te1": (CLIP, "text_encoder", "clip_l")}),
            ("flux", {"te3": (T5, "text_encoder_2", "t5xxl")}),
            ("sd3", {"te2": (CLIP, "text_encoder_2", "clip_g")}),
            ("sd3", {"te3": (T5, "text_encoder_3", "t5xxl")}),
        ],
    )
    def test_numbers_of_each_family(
        self, family: str, encoders: dict[str, tuple[str, str, str]], tmp_path: Path
    ) -> None:
        tensors = {}
        keys = [f"lora_{part}_{path.replace('.', '_')}" for part, (path, _, _) in encoders.items()]
        for key in (BACKBONES[family], *keys):
            down, up = factors((WIDTH, WIDTH), 4)
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(4.0),
            }
        save_file(tensors, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "d.safetensors")
        convert(tmp_path / "d.safetensors", "comfy", tmp_path / "c.safetensors", family=family)
        convert(tmp_path / "c.safetensors", "kohya", tmp_path / "k.safetensors", family=family)
        hub, comfy = load_file(tmp_path / "d.safetensors"), load_file(tmp_path / "c.safetensors")
        for path, component, encoder in encoders.values():
            assert f"{component}.{path}.lora_A.weight" in hub
            assert f"text_encoders.{encoder}.transformer.{path}.lora_down.weight" in comfy
        back = load_file(tmp_path / "k.safetensors")
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[key], tensors[key]) for key in back)

    def test_two_of_clip_are_those_of_sdxl(self, tmp_path: Path) -> None:
        """``lora_te_`` is the only encoder of Stable Diffusion 1; beside another it is ``te1``."""
        tensors = {}
        for component in ("text_encoder", "text_encoder_2"):
            down, up = factors((WIDTH, WIDTH), 4)
            tensors |= {f"{component}.{CLIP}.lora_A.weight": down}
            tensors |= {f"{component}.{CLIP}.lora_B.weight": up}
        save_file(tensors, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", "kohya", tmp_path / "k.safetensors")
        parts = {key.split("_")[1] for key in load_file(tmp_path / "k.safetensors")}
        assert parts == {"te1", "te2"}


# Language models ------------------------------------------------------------------------------


def trained(build: Callable[[], nn.Module], folder: Path, **settings: Any) -> Deltas:
    """Write an adapter of random values with PEFT; return the weights of the merged model."""
    from peft import LoraConfig, get_peft_model

    with quiet():
        model = get_peft_model(build(), LoraConfig(r=4, lora_alpha=6, **settings))
        torch.manual_seed(1)
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.data *= 1 + 0.3 * torch.rand_like(value)
            elif "lora_" in name:
                nn.init.normal_(value, std=0.3)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                value.data += 0.1 * torch.randn_like(value)
        model.eval().save_pretrained(str(folder))
    return merged_weights(model)


LANGUAGE_CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9},
        },
    ),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": (llama, {"target_modules": ["model.embed_tokens", "q_proj"]}),
    "bias": (partial(llama, bias=True), {"target_modules": ["q_proj"], "lora_bias": True}),
    "head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-wte": (gpt2, {"target_modules": ["transformer.wte"]}),
}
LANGUAGE_SCHEMES = {  # by the cases that they may refuse
    "peft": (),
    "module-path": ("tokens",),
    "loralib": ("dora", "bias", "tokens"),
    "transposed": ("dora", "bias", "tokens"),
    "prefixed": ("dora", "bias", "head", "tokens"),
    "mlx": ("bias", "head", "tokens"),
    "kohya": ("head", "tokens"),
    "comfy": ("head", "tokens"),
    "diffusers": ("head", "tokens"),
    "diffusers-legacy": ("dora", "embedding", "bias", "head", "tokens", "gpt2-wte"),
}


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_language_models(case: str, tmp_path: Path) -> None:
    """PEFT loads what comes back with the same merged weights, or the scheme says why not."""
    build, settings = LANGUAGE_CASES[case]
    truth = trained(build, tmp_path / "a", **settings)
    for to, refused in LANGUAGE_SCHEMES.items():
        middle, back = place(tmp_path, to, f"m-{to}"), tmp_path / f"b-{to}"
        if case in refused:
            with pytest.raises(LoratoolError):
                convert(tmp_path / "a", to, middle)
            assert not middle.exists()
            continue
        convert(tmp_path / "a", to, middle)
        source = to if to in ("loralib", "transposed") else None
        convert(middle, "peft", back, source=source)
        loaded = load_peft(build(), back)
        assert_same(merged_weights(loaded), truth)


# LyCORIS --------------------------------------------------------------------------------------


HUB = {
    "linear": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "conv": "mid_block.resnets.0.conv1",
    "conv1x1": "mid_block.attentions.0.proj_in",
}


def layer(kind: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(24, 16, bias=False)
    size = 3 if kind == "conv" else 1
    return nn.Conv2d(8, 16, size, padding=size // 2, bias=False)


def forward_delta(module: nn.Module, base: nn.Module) -> torch.Tensor:
    """Return what a module adds to its base's weight, from what both answer to impulses."""
    weight = base.weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad(), quiet():
        if weight.ndim == 2:
            unit = torch.eye(weight.shape[1])
            return (module(unit) - base(unit)).T.double()
        out, into, height, width = weight.shape
        found = torch.zeros(out, into, height, width, dtype=torch.float64)
        edge = base.padding[0]  # type: ignore[index]
        for channel in range(into):
            impulse = torch.zeros(1, into, 2 * height + 1, 2 * width + 1)
            impulse[0, channel, height, width] = 1
            answer = (module(impulse) - base(impulse))[0].double()
            for row in range(height):
                for column in range(width):
                    found[:, channel, row, column] = answer[
                        :, height + edge - row, width + edge - column
                    ]
        return found.flatten(1)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "locon": ("locon.LoConModule", {}),
    "locon-cp": ("locon.LoConModule", {"use_tucker": True}),
    "locon-rs": ("locon.LoConModule", {"rs_lora": True}),
    "loha": ("loha.LohaModule", {}),
    "loha-cp": ("loha.LohaModule", {"use_tucker": True}),
    "lokr": ("lokr.LokrModule", {"lora_dim": 1, "factor": 4}),
    "lokr-both": ("lokr.LokrModule", {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "lokr-full": ("lokr.LokrModule", {"lora_dim": 10000, "factor": 4, "full_matrix": True}),
    "lokr-cp": ("lokr.LokrModule", {"lora_dim": 1, "factor": 4, "use_tucker": True}),
}
WITH_BASE: dict[str, tuple[str, dict[str, Any]]] = {
    "dora-out": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "dora-in": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "oft": ("diag_oft.DiagOFTModule", {}),
    "oft-constraint": ("diag_oft.DiagOFTModule", {"alpha": 0.01, "constraint": 0.01}),
    "oft-rescaled": ("diag_oft.DiagOFTModule", {"rescaled": True}),
    "boft": ("boft.ButterflyOFTModule", {}),
    "ia3-out": ("ia3.IA3Module", {}),
    "ia3-in": ("ia3.IA3Module", {"train_on_input": True}),
    "glora": ("glora.GLoRAModule", {}),
}


def lycoris_module(
    what: str, settings: dict[str, Any], kind: str, folder: Path
) -> tuple[Path, torch.Tensor, nn.Module]:
    """Write a random module of LyCORIS; return the file, its delta, and its base."""
    import importlib

    torch.manual_seed(3)
    file, _, name = what.partition(".")
    base = layer(kind)
    key = f"lora_unet_{HUB[kind].replace('.', '_')}"
    options = {"multiplier": 1.0, "lora_dim": 4, "alpha": 3.0} | settings
    with quiet():
        module = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)(
            key, base, **options
        )
    for parameter, value in module.named_parameters():
        if "dora" in parameter:
            value.data *= 0.5 + torch.rand_like(value)
        elif "org" not in parameter:
            nn.init.normal_(value, std=0.3)
    tensors = {
        f"{key}.{part}": value.detach().clone().contiguous()
        for part, value in module.state_dict().items()
        if "org_module" not in part
    }
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors", forward_delta(module, base), base


class TestLycoris:
    """Variants written as plain LoRA, against what LyCORIS' own modules compute."""

    @pytest.mark.parametrize("kind", HUB)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_exact(self, variant: str, kind: str, lycoris: Any, tmp_path: Path) -> None:
        first, truth, _ = lycoris_module(*VARIANTS[variant], kind, tmp_path)
        report = convert(first, "diffusers", tmp_path / "b.safetensors", to_lora=True)
        found = stored_deltas(tmp_path / "b.safetensors", "unet.")
        assert_same(found, {HUB[kind]: truth}, 5e-6)
        assert report.relative_error < 1e-6
        made = load_file(tmp_path / "b.safetensors")
        if kind == "conv":
            assert made[f"unet.{HUB[kind]}.lora_A.weight"].shape[1:] == (8, 3, 3)
        # Other schemes that have the variant keep its tensors.
        before = load_file(first)
        convert(first, "comfy", tmp_path / "c.safetensors")
        convert(tmp_path / "c.safetensors", "kohya", tmp_path / "d.safetensors", family="sd1")
        after = load_file(tmp_path / "d.safetensors")
        assert {key for key in before if before[key].ndim} <= after.keys()

    @pytest.mark.parametrize(
        ("variant", "kind"),
        [(v, k) for v in WITH_BASE for k in HUB if v != "glora" or k == "linear"],
    )
    def test_with_the_base(self, variant: str, kind: str, lycoris: Any, tmp_path: Path) -> None:
        """At full rank the approximation is the delta itself."""
        first, truth, base = lycoris_module(*WITH_BASE[variant], kind, tmp_path)
        (tmp_path / "base").mkdir()
        weight = base.weight
        assert isinstance(weight, torch.Tensor)
        save_file(
            {f"{HUB[kind]}.weight": weight.detach().clone()},
            tmp_path / "base" / "model.safetensors",
        )
        with pytest.raises(UnsupportedError, match="base"):
            convert(first, "diffusers", tmp_path / "b.safetensors", to_lora=True)
        convert(
            first,
            "diffusers",
            tmp_path / "b.safetensors",
            to_lora=True,
            base=tmp_path / "base",
            rank=16,
        )
        found = stored_deltas(tmp_path / "b.safetensors", "unet.")
        assert_same(found, {HUB[kind]: truth}, 5e-6)

    @pytest.mark.parametrize("kind", HUB)
    @pytest.mark.parametrize("variant", {**VARIANTS, **WITH_BASE})
    def test_merged(self, variant: str, kind: str, lycoris: Any, tmp_path: Path) -> None:
        """What a merge makes of the weight is what the module computes with it."""
        settings = {**VARIANTS, **WITH_BASE}[variant]
        first, truth, base = lycoris_module(*settings, kind, tmp_path)
        weight = base.weight
        assert isinstance(weight, torch.Tensor)
        key = f"{HUB[kind]}.weight"
        save_file({key: weight.detach().clone()}, tmp_path / "base.safetensors")
        merge(tmp_path / "base.safetensors", [first], tmp_path / "out.safetensors")
        merged = load_file(tmp_path / "out.safetensors")[key]
        found = (merged.double() - weight.detach().double()).flatten(1)
        assert_same({key: found}, {key: truth}, 5e-6)

    def test_glora_of_a_convolution(self, lycoris: Any, tmp_path: Path) -> None:
        """Converted, or refused for what it is: nothing is missing from the file."""
        first, truth, base = lycoris_module(*WITH_BASE["glora"], "conv", tmp_path)
        (tmp_path / "base").mkdir()
        weight = base.weight
        assert isinstance(weight, torch.Tensor)
        save_file(
            {f"{HUB['conv']}.weight": weight.detach().clone()},
            tmp_path / "base" / "model.safetensors",
        )
        output = tmp_path / "b.safetensors"
        problem = ""
        try:
            convert(first, "diffusers", output, to_lora=True, base=tmp_path / "base", rank=16)
        except LoratoolError as error:
            problem = str(error)
        assert "lacks" not in problem
        if not problem:
            assert_same(stored_deltas(output, "unet."), {HUB["conv"]: truth}, 5e-6)

    @pytest.mark.parametrize("naming", [None, "base"])
    def test_linear_factors_of_a_convolution_of_1_by_1(
        self, naming: str | None, diffusers: Any, tmp_path: Path
    ) -> None:
        """Files have them flat or with kernels; the base says which it is."""
        model = sd1(diffusers)
        weights = weights_of(model)
        name = HUB["conv1x1"]
        down, up = factors(weights[name].shape, 3)
        key = f"lora_unet_{name.replace('.', '_')}"
        flat = {
            f"{key}.lora_down.weight": down.flatten(1),
            f"{key}.lora_up.weight": up.flatten(1),
        }
        save_file(flat, tmp_path / "a.safetensors")
        with quiet():
            model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
        (tmp_path / "base" / "diffusion_pytorch_model.safetensors").rename(
            tmp_path / "base" / "model.safetensors"
        )
        base = tmp_path / "base" if naming else None
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors", base=base)
        if base is None:  # nothing in the file tells; the delta is the same
            found = stored_deltas(tmp_path / "b.safetensors", "unet.")
        else:
            load_unet(diffusers, model, tmp_path / "b.safetensors", "StableDiffusionPipeline")
            found = fused_deltas(model, weights)
        assert_same(found, {name: product(up, down)})


# The files that people have ---------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="the published adapters are not here")
class TestPublished:
    @pytest.mark.parametrize(
        ("name", "last"),
        [
            ("sd15-cloneofsimo/analog_svd_rank4.safetensors", "cloneofsimo"),
            ("sd15-diffusers-legacy/pytorch_lora_weights.safetensors", "diffusers-legacy"),
        ],
    )
    def test_stable_diffusion_round(
        self, name: str, last: str, diffusers: Any, tmp_path: Path
    ) -> None:
        first = DATA / name
        digest = hashlib.sha256(first.read_bytes()).hexdigest()
        current = first
        for to in ("kohya", "diffusers", "peft", last):
            output = place(tmp_path, to, to)
            assert convert(current, to, output).is_exact
            current = output
        before, after = load_file(first), load_file(current)
        named = {key.removeprefix("unet."): value for key, value in after.items()}
        assert named.keys() == {key.removeprefix("unet.") for key in before}
        assert all(torch.equal(named[key.removeprefix("unet.")], before[key]) for key in before)
        assert hashlib.sha256(first.read_bytes()).hexdigest() == digest
        if last == "cloneofsimo":
            old, new = metadata_of(first), metadata_of(current)
            assert {k: v for k, v in new.items() if k in old} == old
        for to in ("diffusers", "kohya"):
            self._check_unet(diffusers, tmp_path / f"{to}.safetensors", tmp_path)

    @staticmethod
    def _check_unet(diffusers: Any, path: Path, folder: Path) -> None:
        with torch.device("meta"):
            model = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        model = model.to_empty(device="cpu")  # the weights are whatever memory holds
        load_unet(diffusers, model, path, "StableDiffusionPipeline")
        truth = {
            key: value
            for key, value in stored_deltas(folder / "diffusers.safetensors", "").items()
            if key.startswith("unet.")
        }
        found = {
            f"unet.{name}": module.get_delta_weight("default_0").detach().double()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        assert len(found) in (128, 144)
        assert_same(found, truth)

    def test_qwen2_of_mlx(self, tmp_path: Path) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        convert(DATA / "qwen2-mlx", "peft", tmp_path / "p")
        config = Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=1000,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            model = Qwen2ForCausalLM(config)
        found = peft_deltas(load_peft(model.to_empty(device="cpu"), tmp_path / "p"))
        tensors = load_file(DATA / "qwen2-mlx" / "0000200_adapters.safetensors")
        truth = {
            key.removesuffix(".lora_a"): 10.0
            * (value.double() @ tensors[key.removesuffix("_a") + "_b"].double()).T
            for key, value in tensors.items()
            if key.endswith(".lora_a")
        }
        assert len(truth) == 8
        assert_same(found, truth)

    def test_roberta_of_loralib(self, tmp_path: Path) -> None:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        first = DATA / "roberta-loralib" / "roberta_base_lora_mnli.bin"
        convert(DATA / "roberta-loralib", "peft", tmp_path / "p", alpha=16)
        config = RobertaConfig(
            vocab_size=1000, max_position_embeddings=514, type_vocab_size=1, num_labels=3
        )
        with quiet():
            model = RobertaForSequenceClassification(config)
        loaded = load_peft(model, tmp_path / "p")
        tensors = torch.load(first, weights_only=True, map_location="cpu")
        truth = {
            key.removesuffix(".lora_A"): product(tensors[key[:-1] + "B"], value, 16 / 8)
            for key, value in tensors.items()
            if key.endswith(".lora_A")
        }
        assert len(truth) == 24
        assert_same(peft_deltas(loaded), truth)
        parameters = dict(loaded.base_model.model.classifier.named_parameters())
        heads = {key: value for key, value in tensors.items() if key.startswith("classifier")}
        assert len(heads) == 4
        for key, value in heads.items():
            module, _, leaf = key.removeprefix("classifier.").rpartition(".")
            assert torch.equal(parameters[f"{module}.modules_to_save.default.{leaf}"], value)


# Files ----------------------------------------------------------------------------------------


QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY_PATH = f"unet.{HUB['linear']}"


def one_module(path: Path, extra: Tensors | None = None, width: int = 8) -> Path:
    down, up = factors((width, width), 2)
    tensors = {
        f"{QUERY}.lora_down.weight": down,
        f"{QUERY}.lora_up.weight": up,
        f"{QUERY}.alpha": torch.tensor(1.0),
    }
    save_file(tensors | (extra or {}), path)
    return path


class TestFiles:
    @pytest.mark.parametrize("width", [8, 1 << 17])
    def test_hashes_of_kohya(self, width: int, tmp_path: Path) -> None:
        """Both as sd-scripts computes them: the older one is of the bytes behind the first MiB."""
        output = tmp_path / "k.safetensors"
        convert(one_module(tmp_path / "a.safetensors", width=width), "kohya", output)
        metadata, data = metadata_of(output), output.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
        training = {key: text for key, text in metadata.items() if key.startswith("ss_")}
        written = save(load_file(output), training)
        expected = hashlib.sha256(written[0x100000:0x110000]).hexdigest()[:8]
        assert metadata["sshs_legacy_hash"] == expected
        assert (expected == "e3b0c442") == (width == 8)
        assert metadata["ss_network_dim"] == "2"
        assert metadata["ss_network_alpha"] == "1"

    @pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers", "diffusers-legacy", "peft"])
    def test_the_bytes_are_those_of_safetensors(self, to: str, tmp_path: Path) -> None:
        first = one_module(tmp_path / "a.safetensors")
        made = []
        for _ in range(2):
            output = place(tmp_path, to, "out")
            convert(first, to, output, force=True)
            file = output / "adapter_model.safetensors" if output.is_dir() else output
            made.append(file.read_bytes())
        assert made[0] == made[1]
        ours, theirs = (
            (json.loads(data[8 : 8 + size]), list(json.loads(data[8 : 8 + size])), data[8 + size :])
            for data in (made[0], save(load_file(file), metadata_of(file) or None))
            for (size,) in (struct.unpack("<Q", data[:8]),)
        )
        assert ours == theirs

    def test_a_dry_run_writes_nothing(self, tmp_path: Path) -> None:
        first = one_module(tmp_path / "a.safetensors")
        before = first.read_bytes()
        for to in ("kohya", "peft", "prefixed", "diffusers"):
            report = convert(first, to, place(tmp_path, to, "out"), dry_run=True)
            assert not report.is_written
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
        assert first.read_bytes() == before

    def test_errors_are_one_line(self, tmp_path: Path) -> None:
        first = one_module(tmp_path / "a.safetensors", {f"{QUERY}.mystery": torch.ones(3)})
        before = first.read_bytes()
        output = tmp_path / "out.safetensors"
        for arguments in (
            [str(first), "--to", "diffusers", "-o", str(output)],
            [str(first), "--to", "cloneofsimo", "-o", str(output), "--drop", "mystery"],
            [str(first), "--to", "kohya", "-o", str(first), "--force"],
            [str(tmp_path / "none"), "--to", "kohya", "-o", str(output)],
        ):
            run = subprocess.run(
                [sys.executable, "-m", "loratool", "convert", *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 2
            assert run.stdout == ""
            lines = run.stderr.splitlines()
            assert lines[0].startswith("error: ")
            assert [line.partition(":")[0] for line in lines[1:]] in ([], ["hint"])
            assert not output.exists()
            assert first.read_bytes() == before

    @pytest.mark.parametrize("scheme", ["kohya", "diffusers"])
    def test_the_hint_for_an_unknown_tensor_costs_no_delta(
        self, scheme: str, tmp_path: Path
    ) -> None:
        first = one_module(tmp_path / "a.safetensors")
        if scheme == "diffusers":
            convert(first, "diffusers", tmp_path / "d.safetensors")
            tensors = load_file(tmp_path / "d.safetensors")
            save_file(tensors | {f"{QUERY_PATH}.mystery": torch.ones(3)}, first)
        else:
            one_module(first, {f"{QUERY}.mystery": torch.ones(3)})
        with pytest.raises(AdapterError, match="mystery") as caught:
            convert(first, "diffusers", tmp_path / "b.safetensors")
        match = re.search(r"--skip '(.+)'", str(caught.value))
        assert match is not None
        for number, left_out in enumerate(({"skip": [match[1]]}, {"drop": [match[1]]})):
            convert(first, "diffusers", tmp_path / f"{number}.safetensors", **left_out)
            written = load_file(tmp_path / f"{number}.safetensors")
            assert written.keys() == {f"{QUERY_PATH}.lora_{side}.weight" for side in "AB"}

    def test_the_hint_for_a_norm_helps(self, tmp_path: Path) -> None:
        extra = {"lora_unet_mid_block_resnets_0_norm1.w_norm": torch.ones(8)}
        first = one_module(tmp_path / "a.safetensors", extra)
        with pytest.raises(UnsupportedError, match="norm") as caught:
            convert(first, "diffusers", tmp_path / "b.safetensors")
        assert "--drop" in str(caught.value.hint)

    @pytest.mark.parametrize("part", ["string_to_param.*", "clip_l", "clip_g", "t5"])
    def test_trained_tokens_stay_in_a_file_of_kohya(self, part: str, tmp_path: Path) -> None:
        key = f"bundle_emb.word.{part}"
        first = one_module(tmp_path / "a.safetensors", {key: torch.rand(2, 8)})
        convert(first, "kohya", tmp_path / "b.safetensors")
        assert torch.equal(load_file(tmp_path / "b.safetensors")[key], load_file(first)[key])

    def test_a_bias_is_added_unscaled_in_kohya_and_scaled_in_peft(
        self, diffusers: Any, tmp_path: Path
    ) -> None:
        name = "conv_out"
        model = sd1(diffusers)
        down, up = factors(weights_of(model)[name].shape, 4)
        bias = torch.randn(4)
        tensors = {
            f"lora_unet_{name}.lora_down.weight": down,
            f"lora_unet_{name}.lora_up.weight": up,
            f"lora_unet_{name}.alpha": torch.tensor(1.0),
            f"lora_unet_{name}.diff_b": bias,
        }
        save_file(tensors, tmp_path / "a.safetensors")
        before = model.conv_out.bias.detach().clone()  # type: ignore[union-attr]
        convert(tmp_path / "a.safetensors", "peft", tmp_path / "p")
        merged = merged_weights(load_peft(model, tmp_path / "p"))
        assert torch.allclose(merged["conv_out.bias"] - before.double(), bias.double(), atol=1e-6)
        convert(tmp_path / "p", "kohya", tmp_path / "b.safetensors")
        back = load_file(tmp_path / "b.safetensors")
        assert torch.allclose(back[f"lora_unet_{name}.diff_b"], bias, atol=1e-6)

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_an_alpha_that_is_no_number(self, number: float, tmp_path: Path) -> None:
        extra = {f"{QUERY}.alpha": torch.tensor(number)}
        first = one_module(tmp_path / "a.safetensors", extra)
        with pytest.raises(LoratoolError, match="expected a number"):
            convert(first, "kohya", tmp_path / "b.safetensors")
