"""XLabs' attention processors of Flux.1: rows of fused projections, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import UnsupportedError

Tensors = dict[str, torch.Tensor]
WIDTH = 8
RANK = 3

PARTS = {
    "double_blocks.0.processor.qkv_lora1": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.processor.qkv_lora2": [
        f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"
    ],
    "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
    "single_blocks.1.processor.qkv_lora": [
        f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"
    ],
    "single_blocks.1.processor.proj_lora": ["single_transformer_blocks.1.proj_out"],
}
"""What each processor is in diffusers, the parts in the order of their rows."""
ROWS = {
    "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 3 * WIDTH),
    "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", 3 * WIDTH),
    "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj", WIDTH),
    "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", WIDTH),
    "single_blocks.1.processor.qkv_lora": ("single_blocks.1.linear1", 7 * WIDTH),
    "single_blocks.1.processor.proj_lora": ("single_blocks.1.linear2", WIDTH),
}
"""In the checkpoint, with how many rows that has."""


def inputs(name: str) -> int:
    return 5 * WIDTH if name.startswith("single") and "proj" in name else WIDTH


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {}
    for name, parts in PARTS.items():
        tensors[f"{name}.down.weight"] = torch.randn(RANK, inputs(name))
        tensors[f"{name}.up.weight"] = torch.randn(len(parts) * WIDTH, RANK)
    save_file(tensors, tmp_path / "xlabs.safetensors")
    return tmp_path / "xlabs.safetensors"


def products(path: Path, down: str = "down.weight", up: str = "up.weight") -> Tensors:
    tensors = load_file(path)
    return {
        key.removesuffix(f".{down}"): (
            tensors[key.removesuffix(down) + up].double() @ value.double()
        )
        for key, value in tensors.items()
        if key.endswith(f".{down}")
    }


def of_diffusers(source: Path) -> Tensors:
    """What diffusers' modules get, in float64."""
    return {
        f"transformer.{part}": rows
        for name, delta in products(source).items()
        for part, rows in zip(PARTS[name], delta.chunk(len(PARTS[name])), strict=True)
    }


def assert_close(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def test_rows_go_to_the_parts(source: Path, tmp_path: Path) -> None:
    adapter = loratool.open_adapter(source)
    assert (adapter.scheme, adapter.family) == ("xlabs", "flux")
    loratool.convert(source, "diffusers", tmp_path / "d.safetensors")
    found = products(tmp_path / "d.safetensors", "lora_A.weight", "lora_B.weight")
    assert_close(found, of_diffusers(source), 0)


@pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers", "peft", "onetrainer"])
def test_there_and_back_it_is_the_same_file(to: str, source: Path, tmp_path: Path) -> None:
    middle = tmp_path / ("out" if to == "peft" else "out.safetensors")
    loratool.convert(source, to, middle, family="flux")
    loratool.convert(middle, "xlabs", tmp_path / "back.safetensors", family="flux")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_parts_of_their_own_ranks_are_one_processor(tmp_path: Path) -> None:
    """The parts share a down there: each gets ranks of its own."""
    torch.manual_seed(0)
    tensors: Tensors = {}
    names = [f"transformer.{part}" for part in PARTS["single_blocks.1.processor.qkv_lora"]]
    for name in names[:2]:
        tensors |= lora(name, WIDTH, WIDTH, rank=2)
    save_file(tensors, tmp_path / "d.safetensors")
    loratool.convert(tmp_path / "d.safetensors", "xlabs", tmp_path / "x.safetensors")
    found = products(tmp_path / "x.safetensors")
    expected = products(tmp_path / "d.safetensors", "lora_A.weight", "lora_B.weight")
    zero = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    whole = torch.cat([expected[names[0]], expected[names[1]], zero])
    assert_close(found, {"single_blocks.1.processor.qkv_lora": whole}, 0)


def test_prefixes_and_other_scales(source: Path, tmp_path: Path) -> None:
    prefixed = {f"diffusion_model.{key}": value for key, value in load_file(source).items()}
    save_file(prefixed, tmp_path / "p.safetensors")
    assert loratool.open_adapter(tmp_path / "p.safetensors").scheme == "xlabs"
    loratool.convert(tmp_path / "p.safetensors", "diffusers", tmp_path / "d.safetensors")
    found = products(tmp_path / "d.safetensors", "lora_A.weight", "lora_B.weight")
    assert_close(found, of_diffusers(source), 0)
    loratool.convert(source, "xlabs", tmp_path / "a.safetensors", alpha=1.0)
    expected = {name: delta / RANK for name, delta in products(source).items()}
    assert_close(products(tmp_path / "a.safetensors"), expected)


def test_a_merge(source: Path, tmp_path: Path) -> None:
    base = {
        f"{native}.weight": torch.randn(rows, inputs(name)) for name, (native, rows) in ROWS.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", [source], tmp_path / "m.safetensors")
    expected = {key: value.double() for key, value in base.items()}
    for name, delta in products(source).items():
        expected[f"{ROWS[name][0]}.weight"][: len(delta)] += delta
    merged = load_file(tmp_path / "m.safetensors")
    assert_close({key: value.double() for key, value in merged.items()}, expected)
    untouched = "single_blocks.1.linear1.weight"
    assert torch.equal(merged[untouched][3 * WIDTH :], base[untouched][3 * WIDTH :])


def test_comfy_has_a_name_for_the_attention_of_a_single_block(source: Path, tmp_path: Path) -> None:
    """``linear1_qkv``, which ComfyUI adds to the first rows of ``linear1``."""
    tensors = load_file(source)
    name = "single_blocks.1.processor.qkv_lora"
    save_file(
        {
            f"diffusion_model.single_blocks.1.linear1_qkv.lora_{side}.weight": tensors[
                f"{name}.{side}.weight"
            ]
            for side in ("down", "up")
        },
        tmp_path / "c.safetensors",
    )
    loratool.convert(
        tmp_path / "c.safetensors", "diffusers", tmp_path / "d.safetensors", family="flux"
    )
    found = products(tmp_path / "d.safetensors", "lora_A.weight", "lora_B.weight")
    expected = of_diffusers(source)
    assert_close(found, {key: expected[key] for key in found}, 0)
    assert len(found) == 3


@pytest.mark.parametrize(
    "module",
    [
        "transformer.transformer_blocks.0.ff.net.2",
        "transformer.single_transformer_blocks.0.proj_mlp",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "unet.mid_block.attentions.0.proj_in",
        "model.layers.0.self_attn.q_proj",
    ],
)
def test_what_is_no_attention_of_flux_is_refused(module: str, tmp_path: Path) -> None:
    save_file(lora(module, 8, 8), tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError) as error:
        loratool.convert(tmp_path / "a.safetensors", "xlabs", tmp_path / "x.safetensors")
    assert error.value.hint


@pytest.mark.parametrize("other", ["kohya", "comfy", "onetrainer", "diffusers"])
def test_other_cuts_are_compared_and_added_once_both_are_alike(
    other: str, source: Path, tmp_path: Path
) -> None:
    """Modules of which one has outputs of another are never taken for different ones."""
    loratool.convert(source, other, tmp_path / "o.safetensors", family="flux")
    pair = [source, tmp_path / "o.safetensors"]
    for verb in (loratool.compare, lambda paths: loratool.compose(paths, tmp_path / "s")):
        with pytest.raises(UnsupportedError) as error:
            verb(pair)
        assert "--to diffusers" in str(error.value.hint)
    alike = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, made in zip(pair, alike, strict=True):
        loratool.convert(path, "diffusers", made, family="flux")
    assert loratool.compare(alike).as_json()["relative_distance"] == pytest.approx(0, abs=1e-6)
    out = tmp_path / "sum.safetensors"
    loratool.compose(alike, out, weights=[1.0, 1.0], to="xlabs")
    assert_close(products(out), {name: 2 * delta for name, delta in products(source).items()})


def test_a_part_beside_the_whole_is_refused(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for name, rows in {"linear1_qkv": 3 * WIDTH, "linear1": 7 * WIDTH}.items():
        tensors |= lora(f"diffusion_model.single_blocks.1.{name}", rows, WIDTH)
    save_file(tensors, tmp_path / "a.safetensors")
    for scheme in ("kohya", "onetrainer", "diffusers", "comfy"):
        with pytest.raises(UnsupportedError) as error:
            loratool.convert(
                tmp_path / "a.safetensors",
                scheme,
                tmp_path / f"{scheme}.safetensors",
                family="flux",
            )
        assert error.value.hint, scheme
