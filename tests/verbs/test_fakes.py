"""A family, a container and a loader of no real model or program: one file each, and no list."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.finding import find_fakes
from safetensors.torch import load_file, save_file
from samples import FIXTURES, lora

import loratool
from loratool.errors import OptionError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.containers import container_of, open_weights

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

WIDTH = 6
PARTS = ("to_q", "to_k", "to_v")
BASE, ADAPTER = FIXTURES / "bases" / "llama-untied", FIXTURES / "adapters" / "lora-linear"


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


def command(*arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "loratool", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def product(tensors: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    down, up = (tensors[f"{module}.lora_{end}.weight"].double() for end in ("down", "up"))
    return up @ down * float(tensors[f"{module}.alpha"]) / len(down)


# A family


def braid_shapes() -> dict[str, int]:
    """The rows of every native module that is adapted."""
    blocks = {f"strands.{i}.{each}": rows for i in (0, 3) for each, rows in INNER.items()}
    return {"entry": WIDTH, **blocks}


INNER = {"mix.qkv": 3 * WIDTH, "mix.out": WIDTH, "up": 4 * WIDTH}
HUB = {
    "entry": ("entrance",),
    **{f"strands.{i}.mix.qkv": tuple(f"strand_blocks.{i}.attn.{p}" for p in PARTS) for i in (0, 3)},
    **{f"strands.{i}.mix.out": (f"strand_blocks.{i}.attn.to_out.0",) for i in (0, 3)},
    **{f"strands.{i}.up": (f"strand_blocks.{i}.ff.net.0.proj",) for i in (0, 3)},
}


@pytest.fixture
def braid(tmp_path: Path) -> tuple[Path, Tensors]:
    """A kohya adapter of the family, and its deltas by native path."""
    tensors: Tensors = {}
    for module, rows in braid_shapes().items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, WIDTH)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    path = tmp_path / "braid.safetensors"
    save_file(tensors, path)
    return path, {
        module: product(tensors, f"lora_unet_{module.replace('.', '_')}")
        for module in braid_shapes()
    }


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


def test_a_family_is_renamed_in_both_directions(
    braid: tuple[Path, Tensors], tmp_path: Path
) -> None:
    path, deltas = braid
    assert loratool.inspect(path).adapter.family == "braid"
    loratool.convert(path, "diffusers", tmp_path / "hub.safetensors")
    hub = load_file(tmp_path / "hub.safetensors")
    for native, delta in deltas.items():
        found = [
            hub[f"transformer.{name}.lora_B.weight"].double()
            @ hub[f"transformer.{name}.lora_A.weight"].double()
            for name in HUB[native]
        ]
        assert_near(torch.cat(found), delta)
    assert len(hub) == 2 * sum(map(len, HUB.values()))
    loratool.convert(tmp_path / "hub.safetensors", "kohya", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == set(load_file(path))
    for native, delta in deltas.items():
        assert_near(product(back, f"lora_unet_{native.replace('.', '_')}"), delta)
    metadata = open_weights(tmp_path / "back.safetensors").metadata
    assert metadata["ss_base_model_version"] == "braid-1"
    assert metadata["modelspec.architecture"] == "braid/lora"


def test_its_text_encoder_is_called_as_each_scheme_calls_that_role(tmp_path: Path) -> None:
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    made = lora(f"text_encoder.{clip}", 8, 8) | lora("transformer.entrance", 8, 8)
    save_file(made, tmp_path / "a.safetensors")
    for scheme, prefix in (("kohya", "lora_te_"), ("comfy", "text_encoders.clip_l.transformer.")):
        loratool.convert(tmp_path / "a.safetensors", scheme, tmp_path / f"{scheme}.safetensors")
        written = load_file(tmp_path / f"{scheme}.safetensors")
        assert any(key.startswith(prefix) for key in written)
        assert any("entry" in key for key in written)


@pytest.mark.parametrize("is_native", [False, True])
def test_it_is_merged_into_a_base_in_either_naming(
    is_native: bool, braid: tuple[Path, Tensors], tmp_path: Path
) -> None:
    path, deltas = braid
    weights = {module: torch.randn(rows, WIDTH) for module, rows in braid_shapes().items()}
    if is_native:
        base = tmp_path / "base.safetensors"
        save_file({f"model.diffusion_model.{m}.weight": w for m, w in weights.items()}, base)
        out = tmp_path / "merged.safetensors"
        loratool.merge(base, [path], out)
        merged = {
            name.removeprefix("model.diffusion_model.").removesuffix(".weight"): value
            for name, value in load_file(out).items()
        }
    else:
        base = tmp_path / "base"
        (base / "transformer").mkdir(parents=True)
        (base / "transformer" / "config.json").write_text("{}")
        parts = {
            f"{name}.weight": part.clone()
            for module, weight in weights.items()
            for name, part in zip(HUB[module], weight.chunk(len(HUB[module])), strict=True)
        }
        save_file(parts, base / "transformer" / "diffusion_pytorch_model.safetensors")
        loratool.merge(base / "transformer", [path], tmp_path / "out")
        found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
        merged = {m: torch.cat([found[f"{n}.weight"] for n in names]) for m, names in HUB.items()}
    assert set(merged) == set(weights)
    for module, weight in weights.items():
        assert_near(merged[module].double(), weight.double() + deltas[module])


@pytest.mark.slow
def test_it_can_be_named_on_the_command_line(braid: tuple[Path, Tensors], tmp_path: Path) -> None:
    path, _ = braid
    assert command("inspect", path)["scheme"] == "kohya"
    out = tmp_path / "out.safetensors"
    command("convert", path, "--to", "comfy", "--family", "braid", "-o", out)
    assert all(key.startswith("diffusion_model.") for key in load_file(out))


# A container


def as_fake(path: Path, source: Path) -> Path:
    """Write what a safetensors file holds as a fake one."""
    file, container = open_weights(source), container_of(".fake")
    specs = [stored.spec for stored in file.tensors.values()]
    layout = container.lay_out(specs, file.metadata, path.name)
    with path.open("w+b") as target:
        target.truncate(layout.size)
        for name, stored in file.tensors.items():
            target.seek(layout.offsets[name])
            target.write(read_bytes(stored))
        target.flush()
        layout.seal(target.fileno(), file.metadata, path=path)
    return path


@pytest.fixture
def fake_adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = (ADAPTER / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(config)
    as_fake(folder / "adapter_model.fake", ADAPTER / "adapter_model.safetensors")
    return folder


@pytest.fixture
def fake_base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_bytes((BASE / "config.json").read_bytes())
    for shard in BASE.glob("*.safetensors"):
        as_fake(folder / f"{shard.stem}.fake", shard)
    return folder


@pytest.mark.slow
def test_an_adapter_in_a_container_is_read_by_every_verb(
    fake_adapter: Path, fake_base: Path, tmp_path: Path
) -> None:
    there, here = command("inspect", ADAPTER), command("inspect", fake_adapter)
    for document in (there, here):
        for key in ("path", "bytes"):
            del document[key]
    assert here == there
    assert loratool.validate(fake_adapter, base=fake_base) == loratool.validate(ADAPTER, base=BASE)
    assert command("compare", fake_adapter, ADAPTER)["relative_distance"] < 1e-12
    for name, verb in {
        "convert": lambda source, out: loratool.convert(source, "kohya", out),
        "compose": lambda source, out: loratool.compose([source, ADAPTER], out, to="kohya"),
        "truncate": lambda source, out: loratool.truncate(source, out, rank=1),
        "rescale": lambda source, out: loratool.rescale(source, out, scale=0.5),
        "merge": lambda source, out: loratool.merge(fake_base, [source], out),
    }.items():
        for number, source in enumerate((ADAPTER, fake_adapter)):
            verb(source, tmp_path / f"{name}{number}")
        assert data_of(tmp_path / f"{name}0") == data_of(tmp_path / f"{name}1"), name
    assert not loratool.verify(tmp_path / "merge1", base=fake_base, adapters=[fake_adapter])


def data_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    opened = (stored for file in files for stored in open_weights(file).tensors.values())
    return {stored.spec.name: read_bytes(stored) for stored in opened}


def test_a_base_in_a_container_is_merged_and_extracted_from(
    fake_adapter: Path, fake_base: Path, tmp_path: Path
) -> None:
    loratool.merge(BASE, [ADAPTER], tmp_path / "one")
    loratool.merge(fake_base, [fake_adapter], tmp_path / "two")
    assert data_of(tmp_path / "one") == data_of(tmp_path / "two")
    assert not list((tmp_path / "two").glob("*.fake"))
    alone = as_fake(
        tmp_path / "alone.fake", FIXTURES / "bases" / "llama-tied" / "model.safetensors"
    )
    one_layer = ("layers.1",)
    loratool.merge(alone, [fake_adapter], tmp_path / "alone.safetensors", skip=one_layer)
    assert not loratool.verify(
        tmp_path / "alone.safetensors", base=alone, adapters=[fake_adapter], skip=one_layer
    )
    report = loratool.extract(fake_base, tmp_path / "two", tmp_path / "extracted", rank=4)
    assert report.relative_error < 0.5


def test_an_adapter_is_written_in_a_container(tmp_path: Path) -> None:
    loratool.convert(ADAPTER, "kohya", tmp_path / "a.safetensors")
    loratool.convert(ADAPTER, "kohya", tmp_path / "a.fake")
    assert data_of(tmp_path / "a.fake") == data_of(tmp_path / "a.safetensors")
    one, two = (open_weights(tmp_path / f"a{end}").metadata for end in (".safetensors", ".fake"))
    assert one == two
    loratool.truncate(tmp_path / "a.fake", tmp_path / "b.fake", rank=1)
    loratool.truncate(tmp_path / "a.fake", tmp_path / "c.fake", max_size=2500)
    assert (tmp_path / "c.fake").stat().st_size <= 2500
    assert {module.rank for module in loratool.inspect(tmp_path / "b.fake").modules} == {1}


# A loader


@pytest.mark.slow
def test_a_loader_refuses_what_its_file_says(make_adapter: Make, tmp_path: Path) -> None:
    q, o = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    path = make_adapter(lora(q, 6, 5) | lora(o, 5, 6), target_modules=["q_proj", "o_proj"])
    assert {f.code for f in loratool.validate(path, target="picky")} == {"LT201"}
    document = command("validate", path, "--for", "picky")
    assert not document["ok"]
    out = tmp_path / "out.safetensors"
    command("convert", path, "--for", "picky", "-o", out)
    (found,) = loratool.validate(out, target="picky")
    assert found.code == "LT201" and "o_proj" in found.message
    loratool.convert(path, None, tmp_path / "less.safetensors", target="picky", drop=("o_proj",))
    assert loratool.validate(tmp_path / "less.safetensors", target="picky") == ()


def test_a_loader_says_what_mends_it(tmp_path: Path) -> None:
    dora = FIXTURES / "adapters" / "dora-linear"
    with pytest.raises(UnsupportedError, match="Picky has no magnitudes") as caught:
        loratool.convert(dora, None, tmp_path / "out.safetensors", target="picky")
    assert "--for picky --to-lora" in str(caught.value.hint)
    with pytest.raises(OptionError, match="picky"):
        loratool.validate(dora, target="pickier")
