"""AnimateDiff's motion LoRAs: up @ down on its motion modules, whichever names those have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool

Tensors = dict[str, torch.Tensor]
WIDTH = 8

BLOCK = "{}.motion_modules.{}.temporal_transformer.transformer_blocks.0.attention_blocks.{}"
HUB = "{}.motion_modules.{}.transformer_blocks.0.attn{}"
LEAVES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
PLACES = [("down_blocks.0", 1), ("mid_block", 0), ("up_blocks.3", 2)]


@pytest.fixture
def tensors() -> Tensors:
    torch.manual_seed(0)
    found: Tensors = {}
    for place in PLACES:
        for number in range(2):
            for leaf in LEAVES:
                key = f"{BLOCK.format(*place, number)}.processor.{leaf}_lora"
                found[f"{key}.down.weight"] = torch.randn(2, WIDTH)
                found[f"{key}.up.weight"] = torch.randn(WIDTH, 2)
    return found


def deltas(tensors: Tensors, pattern: str, *, first: int) -> Tensors:
    """What each module gets, in float64, by the names of the modules."""
    return {
        f"{pattern.format(*place, number + first)}.{module}": (
            tensors[f"{BLOCK.format(*place, number)}.processor.{leaf}_lora.up.weight"].double()
            @ tensors[f"{BLOCK.format(*place, number)}.processor.{leaf}_lora.down.weight"].double()
        )
        for place in PLACES
        for number in range(2)
        for leaf, module in LEAVES.items()
    }


def test_names_of_diffusers_and_back(tensors: Tensors, tmp_path: Path) -> None:
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "zoom.ckpt")
    adapter = loratool.open_adapter(tmp_path / "zoom.ckpt")
    assert (adapter.scheme, adapter.family) == ("diffusers-legacy", "animatediff")
    loratool.convert(tmp_path / "zoom.ckpt", "diffusers", tmp_path / "d.safetensors")
    found = load_file(tmp_path / "d.safetensors")
    expected = deltas(tensors, HUB, first=1)
    assert {key.rsplit(".", 2)[0] for key in found} == {f"unet.{name}" for name in expected}
    for name, delta in expected.items():
        up, down = (found[f"unet.{name}.lora_{side}.weight"].double() for side in "BA")
        assert torch.equal(up @ down, delta)
    back = tmp_path / "back.safetensors"
    loratool.convert(tmp_path / "d.safetensors", "diffusers-legacy", back, naming="native")
    written = load_file(back)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(value, written[key]) for key, value in tensors.items())
    loratool.rescale(back, tmp_path / "r.safetensors", scale=0.5)
    assert load_file(tmp_path / "r.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("naming", ["native", "hub"])
def test_a_merge_into_motion_modules(naming: str, tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    pattern, first = (BLOCK, 0) if naming == "native" else (HUB, 1)
    changes = deltas(tensors, pattern, first=first)
    base = {f"{name}.weight": torch.randn(WIDTH, WIDTH) for name in changes}
    untouched = pattern.format("up_blocks.0", 0, first) + ".to_q.weight"
    base[untouched] = torch.randn(WIDTH, WIDTH)
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(
        tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "m.safetensors"
    )
    merged = load_file(tmp_path / "m.safetensors")
    assert torch.equal(merged[untouched], base[untouched])
    for name, delta in changes.items():
        wanted = base[f"{name}.weight"].double() + delta
        assert (merged[f"{name}.weight"] - wanted).norm() <= 1e-6 * wanted.norm()


def test_nothing_else_goes_by_native_names_there(tmp_path: Path) -> None:
    save_file(lora("unet.mid_block.attentions.0.proj_in", 8, 8), tmp_path / "a.safetensors")
    with pytest.raises(loratool.errors.OptionError, match="diffusers' names only"):
        loratool.convert(
            tmp_path / "a.safetensors",
            "diffusers-legacy",
            tmp_path / "b.safetensors",
            naming="native",
        )


def test_control_loras_are_refused_by_name(tmp_path: Path) -> None:
    """Stability's are a network of their own beside the base, whose weights they are added to."""
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    tensors = {
        "lora_controlnet": torch.zeros(0),
        f"{name}.up": torch.randn(8, 2),
        f"{name}.down": torch.randn(2, 8),
        "input_hint_block.0.weight": torch.randn(2, 3, 3, 3),
        **{f"{name[:-4]}norm{number}.weight": torch.randn(8) for number in range(9)},
        "zero_convs.0.0.weight": torch.randn(8, 8, 1, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    for verb in (loratool.inspect, loratool.open_adapter):
        with pytest.raises(loratool.errors.AdapterError, match="control-LoRA"):
            verb(tmp_path / "a.safetensors")
