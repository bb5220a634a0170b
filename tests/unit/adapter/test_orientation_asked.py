"""Files whose keys fit two schemes: the shapes decide, or somebody has to say."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapter.slots import AdapterKey, Slot
from loratool.errors import AdapterError
from loratool.schemes import builtin_schemes, scheme_named
from loratool.schemes.opening import open_adapter

PAIRS = [
    (one, other)
    for one, other in itertools.permutations(builtin_schemes(), 2)
    if one.keys.templates == other.keys.templates
    and one.roles.is_transposed != other.roles.is_transposed
]
"""Schemes that write the same keys and mean other matrices."""


def write(path: Path, shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> Path:
    tensors = {}
    for module, (down, up) in shapes.items():
        tensors[f"{module}.lora_A"] = torch.randn(*down)
        tensors[f"{module}.lora_B"] = torch.randn(*up)
    save_file(tensors, path)
    return path


SQUARE = {"layers.0.a": ((4, 4), (4, 4)), "layers.1.a": ((4, 4), (4, 4))}
CONTRARY = {"layers.0.a": ((8, 4), (4, 8)), "layers.1.a": ((4, 8), (8, 4))}
DECIDED = {
    "loralib by the rank": ({"x.a": ((2, 8), (8, 2))}, "loralib"),
    "transposed by the rank": ({"x.a": ((8, 2), (2, 8))}, "transposed"),
    "loralib by another module": (SQUARE | {"x.b": ((4, 6), (5, 4))}, "loralib"),
    "transposed by another module": (SQUARE | {"x.b": ((6, 4), (4, 5))}, "transposed"),
    "loralib by one rank": (SQUARE | {"x.b": ((4, 6), (6, 4))}, "loralib"),
    "transposed by one rank": (SQUARE | {"x.b": ((6, 4), (4, 6))}, "transposed"),
}


@pytest.mark.parametrize("case", DECIDED)
def test_shapes_decide(case: str, tmp_path: Path) -> None:
    shapes, scheme = DECIDED[case]
    assert open_adapter(write(tmp_path / "a.safetensors", shapes)).scheme == scheme


@pytest.mark.parametrize("shapes", [SQUARE, CONTRARY], ids=["square", "contrary"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_fits_both_ways_is_asked(
    shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]], suffix: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", shapes)
    if suffix == "bin":
        torch.save(load_file(path), tmp_path / "a.bin")
        path = tmp_path / "a.bin"
    out = tmp_path / "out"
    for verb in (
        lambda: loratool.inspect(path),
        lambda: loratool.compose([path, path], out),
        lambda: loratool.truncate(path, out, rank=1),
        lambda: loratool.rescale(path, out, scale=2.0),
        lambda: loratool.compare([path, path]),
        lambda: loratool.convert(path, "peft", out),
        lambda: loratool.merge(tmp_path, [path], out),
    ):
        with pytest.raises(AdapterError, match="both ways round") as caught:
            verb()
        assert "--from loralib" in str(caught.value.hint)
        assert "--from transposed" in str(caught.value.hint)
    (found,) = loratool.validate(path)
    assert found.is_error
    assert found.hint == caught.value.hint


@pytest.mark.parametrize("one", PAIRS, ids=lambda pair: f"{pair[0].name}-{pair[1].name}")
def test_the_hint_works_for_every_such_pair(one: tuple, tmp_path: Path) -> None:
    scheme, _ = one
    down = scheme.keys.format(AdapterKey("layers.0.a", Slot.DOWN))
    up = scheme.keys.format(AdapterKey("layers.0.a", Slot.UP))
    factors = {down: torch.randn(4, 4), up: torch.randn(4, 4)}
    save_file(factors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=scheme.name):
        open_adapter(tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", source=scheme.name)
    made = load_file(tmp_path / "p" / "adapter_model.safetensors")
    expected = factors[up] @ factors[down]
    if scheme.roles.is_transposed:
        expected = (factors[down] @ factors[up]).T
    a, b = (made[f"base_model.model.layers.0.a.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(b @ a, expected, atol=1e-6)


def test_every_pair_is_tried() -> None:
    assert {(one.name, other.name) for one, other in PAIRS} >= {
        ("loralib", "transposed"),
        ("transposed", "loralib"),
    }


@pytest.mark.parametrize("to", ["loralib", "transposed"])
def test_files_of_loratool_say_what_they_are(to: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", SQUARE)
    loratool.convert(path, to, tmp_path / "b.safetensors", source="loralib")
    assert open_adapter(tmp_path / "b.safetensors").scheme == to


def test_names_with_an_adapter_in_them_are_not_turned(tmp_path: Path) -> None:
    """Factors that only fit transposed are not read as another scheme of such keys."""
    path = write(tmp_path / "a.safetensors", {"enc_0.mixer": ((6, 2), (2, 5))})
    assert open_adapter(path).scheme == "transposed"
    assert scheme_named("prefixed").keys.recognise(open_adapter(path).tensors) == 0
