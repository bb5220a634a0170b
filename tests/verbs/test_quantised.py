"""Quantised models: decoded exactly, changed, rounded once; every verb sees logical weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes.finding import find_fakes
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.cli.main import _run as run_command_line
from loratool.errors import (
    FileFormatError,
    MergeError,
    OptionError,
    OutputError,
    UnsupportedError,
)
from loratool.verbs.merging import files as output

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
OUT, INTO = 13, 17  # both ragged in blocks of 5 × 7, and of 8 × 8
MODULES = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate"))
NORM = "model.norm.weight"
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


def spread(grid: torch.Tensor, height: int, breadth: int) -> torch.Tensor:
    wide = grid.double().repeat_interleave(height, 0).repeat_interleave(breadth, 1)
    return wide[:OUT, :INTO]


def blocked(module: str) -> tuple[Tensors, torch.Tensor]:
    codes = torch.randint(-128, 128, (OUT, INTO), dtype=torch.int8)
    scales, shifts = torch.rand(3, 3) / 100, torch.randn(3, 3) / 100
    truth = codes.double() * spread(scales, 5, 7) + spread(shifts, 5, 7)
    parts = {"codes": codes, "scales": scales, "shifts": shifts}
    return {f"{module}.blocked_{part}": value for part, value in parts.items()}, truth


def fp8(module: str) -> tuple[Tensors, torch.Tensor]:
    codes = torch.randn(OUT, INTO).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.1
    truth = codes.double() * spread(scales, 8, 8)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scales}, truth


KINDS = {"blocked": blocked, "fp8": fp8}
CONFIGS: dict[str, Any] = {
    "blocked": {"quant_method": "blocked"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [8, 8]},
}
FORMATS = {"blocked": "blocked", "fp8": "fp8-block"}
parametrised = pytest.mark.parametrize("kind", list(KINDS))


def model(kind: str) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Return the stored tensors, the truth of the coded weights, and the configuration."""
    stored: Tensors = {NORM: torch.randn(INTO).bfloat16()}
    truth = {}
    for module in MODULES:
        tensors, truth[f"{module}.weight"] = KINDS[kind](module)
        stored |= tensors
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    return stored, truth, config | {"quantization_config": CONFIGS[kind]}


def adapter_of(make_adapter: Make) -> tuple[Path, torch.Tensor]:
    made = lora(MODULES[0], OUT, INTO)
    down, up = (t.double() for t in made.values())
    return make_adapter(made), 2 * (up @ down)


def assert_rounded(actual: torch.Tensor, truth: torch.Tensor) -> None:
    """The value is the truth rounded once, but for the last bits of float32 sums."""
    error = (actual.double() - truth).abs()
    bound = HALF_ULP[actual.dtype] * truth.abs() * 1.001 + 2e-6 * truth.abs().max()
    assert bool((error <= bound).all())


@parametrised
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_merge_writes_plain_numbers(
    kind: str, dtype: str | None, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, truth, config = model(kind)
    base = make_base(stored, config)
    adapter, delta = adapter_of(make_adapter)
    report = loratool.merge(base, [adapter], tmp_path / "out", dtype=dtype)
    merged = load_file(tmp_path / "out" / "model.safetensors")

    assert sorted(merged) == sorted((*truth, NORM))
    wanted = torch.float32 if dtype else torch.bfloat16
    assert {tensor.dtype for tensor in merged.values()} == {wanted}
    assert torch.equal(merged[NORM], stored[NORM].to(wanted))
    first, second = (f"{module}.weight" for module in MODULES)
    assert_rounded(merged[first], truth[first] + delta)
    assert_rounded(merged[second], truth[second])
    assert (report.merged, report.copied) == (1, 2)
    assert any(f"2 weights in {FORMATS[kind]}" in note for note in report.notes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "llama", "torch_dtype": dtype or "bfloat16"}
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


@parametrised
def test_shards_lose_their_scales_and_the_index_says_so(
    kind: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, truth, config = model(kind)
    base = make_base({}, config)
    (base / "model.safetensors").unlink()
    codes = {k: t for k, t in stored.items() if k.endswith((".weight", "_codes"))}
    rest = {k: t for k, t in stored.items() if k not in codes}
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, tensors in zip(names, (codes, rest), strict=True):
        save_file(tensors, base / name, metadata={"format": "pt"})
    weight_map = dict.fromkeys(codes, names[0]) | dict.fromkeys(rest, names[1])
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "hf_quant_config.json").write_text("{}")
    adapter, delta = adapter_of(make_adapter)
    loratool.merge(base, [adapter], tmp_path / "out")

    content = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(content["weight_map"]) == sorted((*truth, NORM))
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"README.md", "loratool.json"}
    assert files == {*content["weight_map"].values(), "config.json", "model.safetensors.index.json"}
    count = len(set(content["weight_map"].values()))
    assert all(
        name.endswith(f"-of-{count:05}.safetensors") for name in content["weight_map"].values()
    )
    merged = {k: t for name in set(content["weight_map"].values())
              for k, t in load_file(tmp_path / "out" / name).items()}  # fmt: skip
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    name = f"{MODULES[0]}.weight"
    assert_rounded(merged[name], truth[name] + delta)


def test_scales_of_inputs_go_with_the_codes(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, truth, config = model("fp8")
    scales = {f"{MODULES[0]}.input_scale": torch.ones(1), "model.layers.0.k_scale": torch.ones(())}
    adapter, _ = adapter_of(make_adapter)
    report = loratool.merge(make_base(stored | scales, config), [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(merged) == sorted((*truth, NORM))
    assert any("2 scales of inputs were dropped" in note for note in report.notes)
    plain = {f"{MODULES[0]}.weight": torch.zeros(OUT, INTO), **scales}
    loratool.merge(make_base(plain, None, "plain"), [adapter], tmp_path / "kept")
    assert set(load_file(tmp_path / "kept" / "model.safetensors")) == set(plain)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"text_config": {"torch_dtype": "float16"}}, torch.float16),
    ],
)
def test_the_dtype_is_the_configured_one_else_bfloat16(
    config: dict[str, Any],
    expected: torch.dtype,
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    stored, _, _ = model("blocked")
    base = make_base(stored, {"model_type": "llama", **config})
    loratool.merge(base, [adapter_of(make_adapter)[0]], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {merged[f"{module}.weight"].dtype for module in MODULES} == {expected}


def test_keep_is_refused_by_name_where_it_takes_data(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, _, config = model("blocked")
    base, (adapter, _) = make_base(stored, config), adapter_of(make_adapter)
    with pytest.raises(UnsupportedError, match="blocked codes need data") as caught:
        loratool.merge(base, [adapter], tmp_path / "out", quantized="keep")
    assert caught.value.hint
    with pytest.raises(OptionError, match="dequantize, keep"):
        loratool.merge(base, [adapter], tmp_path / "out", quantized="both")
    with pytest.raises(OptionError, match="--dtype"):
        loratool.merge(base, [adapter], tmp_path / "out", quantized="keep", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_keep_writes_new_codes_and_scales_of_what_changed_and_the_rest_as_it_is(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, truth, config = model("fp8")
    stored |= {f"{MODULES[0]}.input_scale": torch.ones(1), "model.layers.0.k_scale": torch.ones(())}
    base, (adapter, delta) = make_base(stored, config), adapter_of(make_adapter)
    out = tmp_path / "out"
    report = loratool.merge(base, [adapter], out, quantized="keep")
    merged = load_file(out / "model.safetensors")
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert list(merged) == list(load_file(base / "model.safetensors"))
    assert (report.merged, report.copied) == (2, len(stored) - 2)
    assert not [note for note in report.notes if "plain numbers" in note]
    codes, scales = (f"{MODULES[0]}.weight{end}" for end in ("", "_scale_inv"))
    for name, tensor in stored.items():
        assert merged[name].dtype == tensor.dtype
        same = torch.equal(merged[name].double(), tensor.double())
        assert same == (name not in (codes, scales)), name
    wanted = truth[f"{MODULES[0]}.weight"] + delta
    for rows, columns in ((slice(0, 8), slice(8, 16)), (slice(8, 13), slice(16, 17))):
        largest = wanted[rows, columns].abs().max() / 448
        row, column = rows.start // 8, columns.start // 8
        assert merged[scales][row, column].item() == pytest.approx(largest.item(), rel=1e-5)
    found = merged[codes].double() * spread(merged[scales], 8, 8)
    step = spread(merged[scales], 8, 8) * torch.clamp(
        2.0**-4 * merged[codes].double().abs(), 2**-10
    )
    assert ((found - wanted).abs() <= step * (1 + 1e-3)).all()
    change = found - truth[f"{MODULES[0]}.weight"]
    assert report.retention == pytest.approx(((change * delta).sum() / delta.square().sum()).item())
    assert not loratool.verify(out, base=base, adapters=[adapter])
    merged[codes].view(torch.uint8)[0, 0] ^= 16
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    assert [f.code for f in loratool.verify(out, base=base, adapters=[adapter])] == ["LT105"]


def test_keep_writes_parts_to_the_shards_that_they_came_from(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, truth, config = model("fp8")
    base = make_base(stored, config)
    (base / "model.safetensors").unlink()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    split: dict[str, Tensors] = {file: {} for file in files}
    for name, tensor in stored.items():
        split[files[name.endswith("_inv")]][name] = tensor
    for file, tensors in split.items():
        save_file(tensors, base / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in split.items() for name in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter, delta = adapter_of(make_adapter)
    loratool.merge(base, [adapter], tmp_path / "out", quantized="keep")
    merged = {file: load_file(tmp_path / "out" / file) for file in split}
    assert {file: set(t) for file, t in merged.items()} == {f: set(t) for f, t in split.items()}
    codes, scales = merged.values()
    name = f"{MODULES[0]}.weight"
    found = codes[name].double() * spread(scales[f"{name}_scale_inv"], 8, 8)
    wanted = truth[name] + delta
    assert (found - wanted).norm() <= 0.04 * wanted.norm()
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


def test_keep_does_not_hide_an_overflow(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, _, config = model("fp8")
    made = lora(MODULES[0], OUT, INTO)
    adapter = make_adapter({name: tensor * 1e30 for name, tensor in made.items()})
    with pytest.raises(MergeError, match="not finite"):
        loratool.merge(make_base(stored, config), [adapter], tmp_path / "out", quantized="keep")


def test_room_for_the_growth_is_asked_for_before_anything_is_written(
    make_base: Make, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, _, config = model("fp8")
    base, (adapter, _) = make_base(stored, config), adapter_of(make_adapter)
    size = (base / "model.safetensors").stat().st_size
    room = SimpleNamespace(free=size + OUT * INTO)  # for the codes, not for two bytes each
    monkeypatch.setattr("loratool.files.atomic.shutil.disk_usage", lambda _: room)
    with pytest.raises(OutputError, match="are free there"):
        loratool.merge(base, [adapter], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    loratool.merge(base, [adapter], tmp_path / "kept", quantized="keep")


def test_files_that_decoding_makes_too_large_are_cut(
    make_base: Make, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, truth, config = model("fp8")
    adapter, _ = adapter_of(make_adapter)
    monkeypatch.setattr(output, "LARGEST_SHARD", 2 * OUT * INTO)
    base, out = make_base(stored, config), tmp_path / "out"
    loratool.merge(base, [adapter], out)
    content = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(content["weight_map"]) == sorted((*truth, NORM))
    assert len(set(content["weight_map"].values())) == 3
    for name, file in content["weight_map"].items():
        assert file.endswith("-of-00003.safetensors")
        assert name in load_file(out / file)
    assert not loratool.verify(out, base=base, adapters=[adapter])


@parametrised
def test_inspect_counts_what_the_codes_stand_for(kind: str, make_base: Make) -> None:
    stored, truth, config = model(kind)
    found = loratool.inspect(make_base(stored, config)).as_json()
    assert found["parameters"] == sum(t.numel() for t in truth.values()) + INTO
    assert found["tensors"] == len(stored)
    assert found["quantization"] == {
        "method": CONFIGS[kind]["quant_method"],
        "format": FORMATS[kind],
        "modules": 2,
    }


def test_inspect_says_what_is_not_read(
    make_base: Make, make_adapter: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {f"{MODULES[0]}.B": torch.zeros(8, 16, dtype=torch.int32)}
    tensors = codes | {f"{MODULES[0]}.s": torch.zeros(1, 64).half(), NORM: torch.ones(INTO)}
    config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}}
    base = make_base(tensors, config)
    found = loratool.inspect(base)
    assert found.as_json()["quantization"] == {
        "method": "gptq",
        "format": "not read",
        "modules": 0,
    }
    assert any("arlin" in note for note in found.notes)
    adapter = make_adapter(lora(MODULES[0], 8, 8))
    assert [f.code for f in loratool.validate(adapter, base=base)] == ["LT027"]
    assert run_command_line(["inspect", str(base)], debug=False) == 0
    assert "not read" in capsys.readouterr().out


def test_a_scale_without_its_codes_is_damage(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, _, config = model("fp8")
    del stored[f"{MODULES[1]}.weight"]
    base, (adapter, _) = make_base(stored, config), adapter_of(make_adapter)
    with pytest.raises(FileFormatError, match=f"{MODULES[1]}.*not there") as caught:
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "download" in str(caught.value.hint)
    with pytest.raises(FileFormatError, match="not there"):
        loratool.validate(adapter, base=base)


def test_verify_wants_no_word_of_codes_that_are_gone(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, _, config = model("fp8")
    config["vision_config"] = {"quantization_config": config["quantization_config"], "size": 1}
    base, (adapter, _) = make_base(stored, config), adapter_of(make_adapter)
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out)
    written = json.loads((out / "config.json").read_text())
    assert written["vision_config"] == {"size": 1}
    written["quantization_config"] = config["quantization_config"]
    (out / "config.json").write_text(json.dumps(written))
    found = loratool.verify(out, base=base, adapters=[adapter])
    assert [(f.code, f.severity) for f in found] == [("LT107", "error")]


def test_what_was_infinite_before_is_told_from_an_overflow(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, _, config = model("fp8")
    stored[f"{MODULES[0]}.weight"].view(torch.uint8)[0, 0] = 0x7F
    base, (adapter, _) = make_base(stored, config), adapter_of(make_adapter)
    for how in ("dequantize", "keep"):
        with pytest.raises(MergeError, match="in the base already"):
            loratool.merge(base, [adapter], tmp_path / "out", quantized=how)


def test_a_plain_model_has_no_quantization(make_base: Make) -> None:
    assert loratool.inspect(make_base({NORM: torch.ones(3)})).as_json()["quantization"] is None


@parametrised
def test_validate_sees_logical_shapes(kind: str, make_base: Make, make_adapter: Make) -> None:
    stored, _, config = model(kind)
    base = make_base(stored, config)
    good = make_adapter(lora(MODULES[0], OUT, INTO))
    assert not [f for f in loratool.validate(good, base=base) if f.code.startswith("LT02")]
    bad = make_adapter(lora(MODULES[0], OUT + 1, INTO), "bad")
    assert "LT022" in [finding.code for finding in loratool.validate(bad, base=base)]


@parametrised
@pytest.mark.parametrize("coded", ["base", "tuned"])
def test_extract_with_one_side_coded(
    kind: str, coded: str, make_base: Make, tmp_path: Path
) -> None:
    stored, truth, config = model(kind)
    delta = 10 * torch.randn(OUT, 2).double() @ torch.randn(2, INTO).double()
    plain = {name: weight.clone() for name, weight in truth.items()} | {NORM: stored[NORM]}
    name = f"{MODULES[0]}.weight"
    plain[name] += delta if coded == "base" else -delta
    plain = {k: t.float() if t.is_floating_point() and k != NORM else t for k, t in plain.items()}
    paths = {"base": make_base(stored, config, "coded"), "tuned": make_base(plain, None, "plain")}
    order = [paths["base"], paths["tuned"]]
    base, tuned = order if coded == "base" else order[::-1]
    loratool.extract(base, tuned, tmp_path / "out", rank=2, dtype="float32")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = f"base_model.model.{MODULES[0]}.lora_"
    made = found[f"{key}B.weight"].double() @ found[f"{key}A.weight"].double()
    assert (made - delta).norm() <= 1e-5 * delta.norm()


def test_a_dequantised_twin_of_the_base_has_not_changed(make_base: Make, tmp_path: Path) -> None:
    stored, truth, config = model("fp8")
    base = make_base(stored, config)
    tuned = {name: weight.bfloat16() for name, weight in truth.items()}
    tuned[f"{MODULES[0]}.weight"] += 1
    twin = make_base(tuned | {NORM: stored[NORM]}, None, "tuned")
    report = loratool.extract(base, twin, tmp_path / "out", rank=1)
    assert [module.module for module in report.modules if module.rank] == [MODULES[0]]


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("codebooks", torch.float16, "AQLM"),
        ("weight_scales", torch.float16, "EETQ"),
        ("tables2", torch.float16, "HIGGS"),
        ("weight", torch.int8, "is I8"),
        ("weight", torch.float8_e4m3fnuz, "F8_E4M3FNUZ"),
    ],
)
def test_codes_that_nothing_reads_are_refused_by_name(
    name: str,
    dtype: torch.dtype,
    words: str,
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    base = make_base({f"{MODULES[0]}.{name}": torch.ones(8, 8).to(dtype)})
    adapter = make_adapter(lora(MODULES[0], 8, 8))
    with pytest.raises(UnsupportedError, match=words):
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "LT027" in [finding.code for finding in loratool.validate(adapter, base=base)]


@pytest.mark.parametrize("said", ["float8_e4m3fn", "torch.float8_e4m3fn"])
def test_a_configuration_of_eight_bits_does_not_stay(
    said: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weights = {f"{module}.weight": torch.randn(OUT, INTO) for module in MODULES}
    stored = {name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}
    base = make_base(stored, {"model_type": "llama", "torch_dtype": said})
    loratool.merge(base, [adapter_of(make_adapter)[0]], tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "llama", "torch_dtype": "bfloat16"}


def test_zeros_are_taken_away_from_codes_in_eight_bits(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored: Tensors = {NORM: torch.ones(INTO).bfloat16()}
    truth = {}
    zeros = {
        MODULES[0]: torch.randint(-9, 9, (OUT, 1)).to(torch.int8),
        MODULES[1]: torch.tensor([3.0]).to(torch.float8_e4m3fn),
    }
    for module, zero in zeros.items():
        codes = torch.randn(OUT, INTO).to(torch.float8_e4m3fn)
        scales = torch.rand(zero.shape) + 0.1
        parts = {"weight": codes, "weight_scale": scales, "weight_zero_point": zero}
        stored |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
        stored[f"{module}.input_zero_point"] = torch.zeros(1).to(torch.float8_e4m3fn)
        truth[f"{module}.weight"] = (codes.double() - zero.double()) * scales.double()
    base = make_base(stored, {"model_type": "llama"})
    adapter, delta = adapter_of(make_adapter)
    loratool.merge(base, [adapter], tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(merged) == sorted((*truth, NORM))
    truth[f"{MODULES[0]}.weight"] += delta
    for name, expected in truth.items():
        assert_rounded(merged[name], expected)
    with pytest.raises(UnsupportedError, match="zeros"):
        loratool.merge(base, [adapter], tmp_path / "kept", quantized="keep")
    stored[f"{MODULES[0]}.weight_zero_point"] = torch.zeros(2, dtype=torch.int8)
    with pytest.raises(FileFormatError, match="zero"):
        loratool.inspect(make_base(stored, {"model_type": "llama"}, "damaged"))


def test_what_keeps_little_of_an_update_says_what_keeps_more(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    stored, _, config = model("fp8")
    stored = {
        name: value * 1000 if name.endswith("_inv") else value for name, value in stored.items()
    }
    base = make_base(stored, config)
    adapter = adapter_of(make_adapter)[0]
    report = loratool.merge(base, [adapter], tmp_path / "out", quantized="keep")
    (note,) = (note for note in report.notes if "survived" in note)
    assert "leave out --quantized keep" in note
    assert "--dtype" not in note


@pytest.mark.parametrize("told", [None, {"quant_method": "awq"}])
def test_the_method_is_what_the_tensors_can_be_of(told: Any, make_base: Make) -> None:
    parts = {"weight": torch.zeros(OUT, INTO, dtype=torch.int8), "SCB": torch.ones(OUT)}
    stored = {f"{MODULES[0]}.{leaf}": part for leaf, part in parts.items()}
    base = make_base(stored, {"model_type": "llama", "quantization_config": told})
    found = loratool.inspect(base).as_json()["quantization"]
    assert found == {"method": "bitsandbytes", "format": "int8", "modules": 1}


@pytest.mark.parametrize("bits", [{}, [[4]], 4.0, "4", None, 1 << 70])
def test_a_width_that_is_no_number_is_left_to_the_shapes(bits: Any, make_base: Make) -> None:
    parts = {
        "qweight": torch.zeros(8, 32, dtype=torch.int32),
        "qzeros": torch.zeros(2, 4, dtype=torch.int32),
        "scales": torch.ones(2, 32).half(),
        "g_idx": (torch.arange(64) // 32).int(),
    }
    stored = {f"{MODULES[0]}.{leaf}": part for leaf, part in parts.items()}
    told = {"quant_method": "gptq", "bits": bits}
    base = make_base(stored, {"model_type": "llama", "quantization_config": told})
    found = loratool.inspect(base).as_json()
    assert found["quantization"] == {"method": "gptq", "format": "gptq", "modules": 1}
    assert found["parameters"] == 64 * 32
