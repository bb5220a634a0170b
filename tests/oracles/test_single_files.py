"""Pipelines in one file: merged and extracted, and read back by diffusers' own converters."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_files import PIPELINES, Pipeline, State

import loratool
from loratool.base.model import open_model

pytestmark = pytest.mark.slow
pytest.importorskip("diffusers")

RANK = 3


@cache
def pipeline(name: str) -> Pipeline:
    torch.manual_seed(5)
    return PIPELINES[name]()


def linear(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and "lm_head" not in n}


@cache
def trained(name: str) -> tuple[State, dict[str, State]]:
    """Return an adapter of all linear layers in diffusers' names, and the weights it makes."""
    torch.manual_seed(6)
    one = pipeline(name)
    factors: State = {}
    states = one.states()
    for component, model in one.models.items():
        for path, module in linear(model).items():
            weight = module.weight
            out, into = weight.shape[0], weight[0].numel()
            down = torch.randn(RANK, *weight.shape[1:])
            up = torch.randn(out, RANK, *([1, 1] if weight.ndim == 4 else []))
            factors[f"{component}.{path}.lora_A.weight"] = down
            factors[f"{component}.{path}.lora_B.weight"] = up
            delta = (up.flatten(1).double() @ down.reshape(RANK, into).double()).view(weight.shape)
            states[component][f"{path}.weight"] = (weight.double() + delta).float()
    return factors, states


def as_in_file(name: str, states: dict[str, State]) -> State:
    return pipeline(name).file(states)


def assert_same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.allclose(found[key].double(), value.double(), rtol=2e-6, atol=2e-6), key


@pytest.fixture(params=list(PIPELINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(name: str, tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    others = {"first_stage_model.decoder.conv_in.weight": torch.randn(4, 4, 3, 3)}
    alone = len(pipeline(name).models) == 1
    save_file(pipeline(name).file(pipeline(name).states()) | ({} if alone else others), path)
    return path


@pytest.fixture
def adapter(name: str, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_file(trained(name)[0], path)
    return path


def converted(name: str, state: State) -> dict[str, State]:
    """Return the models of a single file, as diffusers reads them."""
    from diffusers.loaders import single_file_utils as utils

    one = pipeline(name)
    state = {key: value.clone() for key, value in state.items()}
    found: dict[str, State] = {}
    for component in one.models:
        prefix = one.prefixes[component]
        if component in one.open_clip:
            found[component] = utils.convert_open_clip_checkpoint(
                one.models[component], state, prefix=prefix
            )
        elif component == "unet":
            found[component] = utils.convert_ldm_unet_checkpoint(dict(state), one.config)
        elif component == "transformer":
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            convert = {
                "flux": utils.convert_flux_transformer_checkpoint_to_diffusers,
                "sd3": utils.convert_sd3_transformer_checkpoint_to_diffusers,
            }[one.family]
            found[component] = convert(mine)
        else:
            found[component] = {
                k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
            }
    return found


CONVERTED = ("sd1", "sd2", "sdxl")
"""Whose converters take models of any size; those of others have tables of their own tests."""


@pytest.mark.parametrize("name", CONVERTED, indirect=True)
def test_the_file_is_what_diffusers_reads(name: str, base: Path) -> None:
    states = pipeline(name).states()
    for component, state in converted(name, load_file(base)).items():
        wanted = {
            key.removeprefix("text_model."): value for key, value in states[component].items()
        }
        for key, value in state.items():
            key = key.removeprefix("text_model.")
            if key in wanted:
                assert torch.equal(value, wanted.pop(key)), key
        assert not {k for k in wanted if not k.endswith("position_ids")}


@pytest.mark.parametrize("scheme", ["diffusers", "kohya", "comfy", "peft"])
def test_all_layers_are_merged(
    name: str, base: Path, adapter: Path, scheme: str, tmp_path: Path
) -> None:
    if scheme != "diffusers":
        place = tmp_path / ("lora" if scheme == "peft" else "lora.safetensors")
        loratool.convert(adapter, to=scheme, output=place)
        adapter = place
    report = loratool.merge(base, [adapter], tmp_path / "out.safetensors")
    assert not report.unused
    merged = load_file(tmp_path / "out.safetensors")
    vae = {key: value for key, value in load_file(base).items() if key.startswith("first_stage")}
    assert_same(merged, as_in_file(name, trained(name)[1]) | vae)


@pytest.mark.parametrize("scheme", ["kohya", "comfy", "diffusers", "peft"])
def test_what_is_extracted_merges_back(name: str, base: Path, scheme: str, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    kept = {k: v for k, v in load_file(base).items() if k.startswith("first_stage")}
    save_file(as_in_file(name, trained(name)[1]) | kept, tuned)
    out = tmp_path / ("lora" if scheme == "peft" else "lora.safetensors")
    report = loratool.extract(base, tuned, out, rank=4 * RANK, to=scheme)
    assert [item.name for item in report.leftovers] == []
    loratool.merge(base, [out], tmp_path / "back.safetensors")
    back, wanted = load_file(tmp_path / "back.safetensors"), load_file(tuned)
    for key, value in wanted.items():
        assert torch.allclose(back[key], value, atol=2e-3), key


def test_the_components_are_told(name: str, base: Path) -> None:
    model = open_model(base)
    models = pipeline(name).models
    assert set(models) <= set(model.components) <= {*models, "vae"}
    assert model.family == pipeline(name).family
    assert model.layout.name != "transformers"


def test_keys_of_an_extraction_are_kohyas(base: Path, name: str, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    kept = {k: v for k, v in load_file(base).items() if k.startswith("first_stage")}
    save_file(as_in_file(name, trained(name)[1]) | kept, tuned)
    loratool.extract(base, tuned, tmp_path / "lora.safetensors", rank=2, to="kohya")
    found = {key.partition(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    prefixes: dict[str, Any] = {
        "sd1": r"lora_(unet_(down|mid|up)|unet_(conv|time)_|te_text_model_)",
        "sdxl": r"lora_(unet_(input|middle|output)_|unet_(time_embed|label_emb|out)_|te[12]_)",
        "flux": r"lora_(unet_(double|single|(img|txt|time|vector|guidance)_in|final)|te[13]_)",
        "sd3": r"lora_(unet_(joint|context|x_emb|t_emb|y_emb|final)|te[123]_)",
    }
    assert all(re.match(prefixes[pipeline(name).family], key) for key in found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline as diffusers saves it, its autoencoder and its tokenizer beside it."""
    path = tmp_path / "pipeline"
    for component, model in pipeline("sdxl").models.items():
        model.save_pretrained(path / component)
    (path / "vae").mkdir()
    save_file({"decoder.conv_in.weight": torch.randn(4, 4)}, path / "vae/model.safetensors")
    (path / "tokenizer").mkdir()
    (path / "tokenizer/vocab.json").write_text("{}")
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_pipeline_in_folders_is_merged_as_one(
    folder: Path, dtype: str | None, tmp_path: Path
) -> None:
    save_file(trained("sdxl")[0], tmp_path / "lora.safetensors")
    out = tmp_path / "out"
    plan = loratool.plan_merge(folder, [tmp_path / "lora.safetensors"], output=out, dtype=dtype)
    loratool.merge(folder, [tmp_path / "lora.safetensors"], out, dtype=dtype)
    for component, expected in trained("sdxl")[1].items():
        model = type(pipeline("sdxl").models[component]).from_pretrained(out / component)
        kind = torch.float32 if dtype is None else torch.bfloat16
        for key, value in model.state_dict().items():
            wanted = expected[key]
            assert torch.allclose(
                value.to(kind), wanted.to(kind), rtol=1e-2 if dtype else 1e-6, atol=2e-6
            ), key
    for name in ("model_index.json", "tokenizer/vocab.json", "vae/model.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert {file.name for file in plan.files} == {
        path.relative_to(out).as_posix()
        for path in out.rglob("*.safetensors")
        if path.parent.name != "vae"
    }
    assert loratool.verify(out, base=folder, adapters=[tmp_path / "lora.safetensors"]) == ()


def test_verify_finds_what_is_wrong_in_one_folder(folder: Path, tmp_path: Path) -> None:
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out"
    save_file(trained("sdxl")[0], lora)
    loratool.merge(folder, [lora], out)
    file = out / "text_encoder_2/model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("layers.1.self_attn.q_proj.weight"))
    state[key][0, 0] += 1
    save_file(state, file, metadata={"format": "pt"})
    found = loratool.verify(out, base=folder, adapters=[lora])
    assert [(item.code, item.where) for item in found] == [("LT105", f"text_encoder_2.{key}")]


def as_folders(name: str, states: dict[str, State], path: Path) -> Path:
    for component, state in states.items():
        model = copy.deepcopy(pipeline(name).models[component])
        model.load_state_dict(state)
        model.save_pretrained(path / component)
    return path


@pytest.mark.parametrize("is_tuned", [False, True])
@pytest.mark.parametrize("name", ["sd2", "sdxl", "flux", "sd3"], indirect=True)
def test_a_file_and_a_folder_are_compared(
    name: str, base: Path, is_tuned: bool, tmp_path: Path
) -> None:
    """Releases of one model that differ in naming and fusion differ by nothing else."""
    states, tuned = pipeline(name).states(), trained(name)[1]
    if is_tuned:
        first, second = base, as_folders(name, tuned, tmp_path / "tuned")
    else:
        first = as_folders(name, states, tmp_path / "base")
        second = tmp_path / "tuned.safetensors"
        save_file(as_in_file(name, tuned), second)
    report = loratool.extract(
        first, second, tmp_path / "lora.safetensors", rank=4 * RANK, to="kohya"
    )
    # A file may have T5's table under both of its names, a folder has one; the rest is alike.
    alone = ("first_stage_model.decoder.conv_in.weight", "encoder.embed_tokens.weight")
    left = {item.name: item.why for item in report.leftovers if not item.name.endswith(alone)}
    assert left == {}
    loratool.merge(base, [tmp_path / "lora.safetensors"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for key, value in as_in_file(name, tuned).items():
        assert torch.allclose(back[key], value, atol=2e-3), key


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, scheme) for name in ("sd1", "sdxl") for scheme in ("kohya", "diffusers")),
        ("flux", "diffusers"),  # its converter knows Flux's own widths alone
    ],
    indirect=["name"],
)
def test_what_is_extracted_loads_in_diffusers(
    name: str, base: Path, scheme: str, tmp_path: Path
) -> None:
    """Every layer of the backbone that attention adapts, loaded and fused by the library."""
    from diffusers import loaders

    one, (backbone, mixin) = pipeline(name), MIXINS[name]
    wanted = [path for path in linear(one.models[backbone]) if ATTENDING.search(path)]
    states, tuned = one.states(), one.states()
    for path in wanted:
        tuned[backbone][f"{path}.weight"] = trained(name)[1][backbone][f"{path}.weight"]
    save_file(one.file(states), base)
    save_file(one.file(tuned), tmp_path / "tuned.safetensors")
    lora = tmp_path / "lora.safetensors"
    rank = RANK if backbone == "unet" else 4 * RANK  # of as many as are fused in its files
    loratool.extract(base, tmp_path / "tuned.safetensors", lora, rank=rank, to=scheme)
    options = {"unet_config": one.config} if backbone == "unet" else {}
    state = getattr(loaders, mixin).lora_state_dict(str(tmp_path), weight_name=lora.name, **options)
    state, alphas = state if isinstance(state, tuple) else (state, None)
    model = copy.deepcopy(one.models[backbone])
    model.load_lora_adapter(state, prefix=backbone, network_alphas=alphas)
    model.fuse_lora()
    model.unload_lora()
    for key, value in model.state_dict().items():
        assert torch.allclose(value, tuned[backbone][key], atol=5e-3), key


ATTENDING = re.compile(r"attn\d?\.to_(q|k|v|out\.0)$|attn\.add_[qkv]_proj$|\.ff\.net|proj_mlp$")
MIXINS = {
    "sd1": ("unet", "StableDiffusionLoraLoaderMixin"),
    "sdxl": ("unet", "StableDiffusionXLLoraLoaderMixin"),
    "flux": ("transformer", "FluxLoraLoaderMixin"),
}


@pytest.mark.parametrize("name", ["flux"], indirect=True)
def test_norms_whose_weight_is_called_a_scale(name: str, base: Path, tmp_path: Path) -> None:
    one = pipeline(name)
    tuned = one.states()
    for key, value in tuned["transformer"].items():
        if "norm_q" in key or "norm_added_k" in key or key.endswith("blocks.0.attn.to_q.weight"):
            tuned["transformer"][key] = value + torch.randn_like(value)
    second = as_folders(name, tuned, tmp_path / "tuned")
    loratool.extract(base, second, tmp_path / "lora", rank=16, residual="carry")
    loratool.merge(base, [tmp_path / "lora"], tmp_path / "back.safetensors")
    assert_close = torch.testing.assert_close
    back = load_file(tmp_path / "back.safetensors")
    for key, value in one.file(tuned).items():
        assert_close(back[key], value, atol=1e-5, rtol=0)
    assert set(back) == set(load_file(base))


@pytest.mark.parametrize("scheme", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["sd3"], indirect=True)
def test_the_base_tells_which_block_is_the_last(
    name: str, base: Path, scheme: str, tmp_path: Path
) -> None:
    """The halves of the last block's modulation are exchanged, whatever the adapter reaches."""
    module = "transformer_blocks.23.norm1_context.linear"
    keys = [f"transformer.{module}.lora_{factor}.weight" for factor in "AB"]
    lora = tmp_path / "lora.safetensors"
    save_file({key: trained(name)[0][key] for key in keys}, lora)
    if scheme != "diffusers":
        loratool.convert(lora, scheme, tmp_path / "other.safetensors", family=name)
        lora = tmp_path / "other.safetensors"
    loratool.merge(base, [lora], tmp_path / "out.safetensors")
    states = pipeline(name).states()
    states["transformer"][f"{module}.weight"] = trained(name)[1]["transformer"][f"{module}.weight"]
    vae = {key: value for key, value in load_file(base).items() if key.startswith("first_stage")}
    assert_same(load_file(tmp_path / "out.safetensors"), as_in_file(name, states) | vae)


@pytest.mark.parametrize("scheme", ["peft", "module-path", "kohya"])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "unet"])
@pytest.mark.parametrize("name", ["sdxl"], indirect=True)
def test_one_component_of_several_changed(
    name: str, component: str, base: Path, scheme: str, tmp_path: Path
) -> None:
    states = pipeline(name).states()
    states[component] = trained(name)[1][component]
    kept = {key: value for key, value in load_file(base).items() if key.startswith("first_stage")}
    tuned = as_in_file(name, states) | kept
    save_file(tuned, tmp_path / "tuned.safetensors")
    lora = tmp_path / ("lora" if scheme == "peft" else "lora.safetensors")
    loratool.extract(base, tmp_path / "tuned.safetensors", lora, rank=4 * RANK, to=scheme)
    loratool.merge(base, [lora], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for key, value in tuned.items():
        assert torch.allclose(back[key], value, atol=2e-3), key


@pytest.mark.parametrize("name", ["sdxl"], indirect=True)
def test_biases_in_one_are_told_one_by_one(name: str, base: Path, tmp_path: Path) -> None:
    tuned = load_file(base)
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"
    other = "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight"
    tuned[key][12:24] += 1  # of the keys
    tuned[other] += 1
    save_file(tuned, tmp_path / "tuned.safetensors")
    report = loratool.extract(base, tmp_path / "tuned.safetensors", tmp_path / "lora", rank=2)
    left = {item.name: item.squared_change for item in report.leftovers}
    path = "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj.bias"
    assert left == {path: pytest.approx(12.0)}
    loratool.extract(
        base, tmp_path / "tuned.safetensors", tmp_path / "all", rank=2, residual="carry"
    )
    loratool.merge(base, [tmp_path / "all"], tmp_path / "back.safetensors")
    for name_, value in tuned.items():
        found = load_file(tmp_path / "back.safetensors")[name_]
        assert torch.allclose(found, value, atol=1e-5), name_
