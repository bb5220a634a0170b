"""Merges, verifications and extractions in parts: what comes out is that of a single run."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from samples import FIXTURES, lora

import loratool
import loratool.shards.status
from loratool.cli.main import _run as run_command_line
from loratool.errors import (
    FileFormatError,
    LoratoolError,
    MergeError,
    OptionError,
    OutputError,
    OutputExistsError,
)
from loratool.shards import course, driver, folder, model, records
from loratool.shards.course import ShareReport, do_share
from loratool.shards.folder import PartsFolder

Make = Callable[..., Path]
CASES = {
    case["case"]: case
    for case in json.loads((FIXTURES / "cases.json").read_text())
    if case["expect"] == "merge"
}
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(6)]
OUT, INTO = 24, 20


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "POLL", 0.01)
    monkeypatch.setattr(records, "POLL", 0.01)
    monkeypatch.setattr(folder, "PAUSE", 0.01)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files written by several workers that are far too small for that."""
    monkeypatch.setattr(model, "CUT_ABOVE", 1000)
    monkeypatch.setattr(model, "CUT_BYTES", 1500)


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        each.relative_to(path).as_posix(): each.read_bytes()
        for each in sorted(path.rglob("*"))
        if each.is_file()
    }


def sharded(place: Path, shards: int = 3, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a base in several files, with an index and a configuration."""
    place.mkdir()
    names: dict[str, str] = {}
    for number in range(1, shards + 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        mine = MODULES[number - 1 :: shards]
        tensors = {f"{name}.weight": torch.randn(OUT, INTO).to(dtype) for name in mine}
        tensors[f"model.norm.{number}.weight"] = torch.randn(number * 50).to(dtype)
        save_file(tensors, place / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "config.json").write_text('{"model_type": "llama"}')
    return place


@pytest.fixture
def inputs(tmp_path: Path, make_adapter: Make) -> tuple[Path, Path]:
    """Return a base in three files, and an adapter."""
    factors: dict[str, Any] = {}
    for name in MODULES:
        factors |= lora(name, OUT, INTO)
    return sharded(tmp_path / "base"), make_adapter(factors, target_modules=["q_proj"])


def in_parts(call: Callable[..., Any], count: int, *, seed: int = 0) -> Any:
    """Do all shares of a command in some order, some of them twice, and finish."""
    order = [*range(1, count + 1), random.Random(seed).randint(1, count)]
    random.Random(seed).shuffle(order)
    for number in order:
        share = call(shards=f"{number}/{count}")
        assert isinstance(share, ShareReport)
    assert share.left == 0
    return call(finish=True)


def adapter_paths(case: dict[str, Any]) -> tuple[Path, list[Path], dict[str, Any]]:
    adapters = [FIXTURES / path for path in case["adapters"]]
    alpha = case.get("options", {}).get("lora_alpha")
    return FIXTURES / case["base"], adapters, {"alpha": alpha} if alpha else {}


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", CASES)
def test_all_kinds_of_adapters_and_bases(name: str, tmp_path: Path) -> None:
    """Merged in parts, and verified in parts, whole and damaged."""
    base, adapters, options = adapter_paths(CASES[name])
    one, two = tmp_path / "one", tmp_path / "two"
    single = loratool.merge(base, adapters, one, **options)
    report = in_parts(lambda **how: loratool.merge(base, adapters, two, **options, **how), 3)
    assert contents(one) == contents(two)
    assert {**report.as_json(), "output": ""} == {**single.as_json(), "output": ""}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "two"]
    asked = {"base": base, "adapters": adapters, **options}
    assert not in_parts(lambda **how: loratool.verify(two, **asked, **how), 2)
    path = max(two.glob("*.safetensors"), default=None, key=lambda each: each.stat().st_size)
    if path is not None:
        damaged = bytearray(path.read_bytes())
        damaged[-3] ^= 64
        path.write_bytes(damaged)
        found = loratool.verify(two, **asked)
        assert found == in_parts(lambda **how: loratool.verify(two, **asked, **how), 2)
        assert found


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_division_gives_the_bytes_of_a_single_run(
    data: st.DataObject, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    one, two = tmp_path / "one", tmp_path / "two"
    for each in (one, two, PartsFolder(two).path):  # an example that failed leaves them
        shutil.rmtree(each, ignore_errors=True)
    monkeypatch.setattr(model, "CUT_ABOVE", data.draw(st.sampled_from([100, 2_500, 10**9])))
    monkeypatch.setattr(model, "CUT_BYTES", data.draw(st.sampled_from([1, 700, 3_000])))
    options: dict[str, Any] = {
        "dtype": data.draw(st.sampled_from([None, "float32"])),
        "weights": data.draw(st.sampled_from([(), (0.5,)])),
    }
    loratool.merge(base, [adapter], one, **options)
    count = data.draw(st.integers(1, 12))
    numbers = st.integers(1, count).map(lambda n: f"{n}/{count}")
    order = data.draw(st.lists(st.one_of(numbers, st.just("auto")), max_size=8))
    for shards in order:
        threads = data.draw(st.sampled_from([1, 2, None]))
        loratool.merge(base, [adapter], two, shards=shards, threads=threads, **options)
    ends: list[dict[str, Any]] = [
        {"shards": "auto", "finish": True},
        {"resume": True},
        {"shards": "auto", "finish": True, "wait": True},
    ]
    loratool.merge(base, [adapter], two, **data.draw(st.sampled_from(ends)), **options)
    assert contents(one) == contents(two)
    assert not PartsFolder(two).path.exists()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("executor", ["threads", "processes:2"])
def test_an_executor_gives_the_bytes_of_a_single_run(
    executor: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    loratool.merge(base, [adapter], tmp_path / "one")
    told: list[tuple[int, int]] = []
    with ThreadPoolExecutor(4) as threads:
        report = loratool.merge(
            base,
            [adapter],
            tmp_path / "two",
            executor=threads if executor == "threads" else executor,
            progress=lambda done, total: told.append((done, total)),
        )
    assert isinstance(report, loratool.MergeReport) and report.is_written
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert told[-1][0] == told[-1][1] > 0


def fp8_base(make_base: Make) -> Path:
    stored = {
        f"{name}.{part}": tensor
        for name in MODULES
        for part, tensor in (
            ("weight", torch.randn(OUT, INTO).to(torch.float8_e4m3fn)),
            ("weight_scale_inv", torch.rand(3, 3) + 0.1),
        )
    }
    settings = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": settings}
    return make_base(stored, config, name="fp8")


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("quantized", ["keep", "dequantize"])
def test_a_quantised_base(
    quantized: str, inputs: tuple[Path, Path], make_base: Make, tmp_path: Path
) -> None:
    base, adapter = fp8_base(make_base), inputs[1]
    one, two = tmp_path / "one", tmp_path / "two"
    single = loratool.merge(base, [adapter], one, quantized=quantized)
    report = in_parts(
        lambda **how: loratool.merge(base, [adapter], two, quantized=quantized, **how), 3
    )
    assert contents(one) == contents(two)
    assert report.retention == single.retention and report.notes == single.notes


@pytest.mark.usefixtures("cut")
def test_a_gguf_base(make_adapter: Make, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf_files import LLAMA, write_gguf

    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 40}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    modules = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]
    weights = {f"{name}.weight": torch.randn(64, 64).numpy() for name in modules}
    weights |= {"model.embed_tokens.weight": torch.randn(40, 64).numpy()}
    base = write_gguf(tmp_path / "base.gguf", weights, config, LLAMA, "Q8_0")
    factors: dict[str, torch.Tensor] = {}
    for name in modules:
        factors |= lora(name, 64, 64)
    make_adapter(factors)
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    for quantized in ("keep", "dequantize"):
        arguments: tuple[Any, ...] = (base, [tmp_path / "adapter"])
        options: dict[str, Any] = {"quantized": quantized, "force": True}
        loratool.merge(*arguments, one, **options)
        for number in (3, 1, 2):
            loratool.merge(*arguments, two, shards=f"{number}/3", **options)
        loratool.merge(*arguments, two, finish=True, **options)
        assert contents(one) == contents(two)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_single_file(form: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in inputs[0].glob("*.safetensors"):
        tensors |= load_file(path)
    base = tmp_path / f"single.{form}"
    if form == "bin":
        torch.save(tensors, base)
    else:
        save_file(tensors, base)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    loratool.merge(base, [inputs[1]], one)
    in_parts(lambda **how: loratool.merge(base, [inputs[1]], two, **how), 2)
    assert contents(one) == contents(two)


@pytest.mark.usefixtures("cut")
def test_the_base_that_an_adapter_records(make_adapter: Make, tmp_path: Path) -> None:
    base = sharded(tmp_path / "base")
    factors = lora(MODULES[0], OUT, INTO)
    adapter = make_adapter(factors, base_model_name_or_path=str(base))
    loratool.merge(None, [adapter], tmp_path / "one")
    in_parts(lambda **how: loratool.merge(None, [adapter], tmp_path / "two", **how), 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_names_that_are_no_text(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(inputs[0], place / "base")
    shutil.copytree(inputs[1], place / os.fsdecode(b"adapter-\xff"))
    arguments = (place / "base", [place / os.fsdecode(b"adapter-\xff")])
    loratool.merge(*arguments, place / "one")
    in_parts(lambda **how: loratool.merge(*arguments, place / "two", **how), 2)
    assert contents(place / "one") == contents(place / "two")


# -- verify and extract ---------------------------------------------------------------------------


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULES[0]}.wight"] = tensors.pop(f"{MODULES[0]}.weight")


def _other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULES[0]}.weight"] = tensors[f"{MODULES[0]}.weight"].float()


def _change(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[0] += 1


DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "renamed": ("LT101", _rename),
    "strange": ("LT102", lambda tensors: tensors.update(more=torch.zeros(3))),
    "dtype": ("LT103", _other_dtype),
    "copied": ("LT104", lambda tensors: _change(tensors, "model.norm.1.weight")),
    "merged": ("LT105", lambda tensors: _change(tensors, f"{MODULES[0]}.weight")),
}


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_in_parts_finds_what_verify_finds(
    damage: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    code, change = DAMAGES[damage]
    merged = tmp_path / "merged"
    loratool.merge(base, [adapter], merged)
    path = merged / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    index = merged / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"] = {
        name: file for name, file in said["weight_map"].items() if file != path.name
    } | dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps(said))
    expected = loratool.verify(merged, base=base, adapters=[adapter])
    assert code in {each.code for each in expected}
    options = ["verify", str(merged), "--base", str(base), "--adapter", str(adapter), "-q"]
    for number in (2, 1, 2):
        assert run_command_line([*options, "--shards", f"{number}/2"], debug=False) == 0
    found = loratool.verify(merged, base=base, adapters=[adapter], finish=True)
    assert found == expected
    assert not PartsFolder(merged).path.exists()
    assert run_command_line([*options, "--shards", "auto", "--finish"], debug=False) == 1
    with ThreadPoolExecutor(3) as threads:
        again = loratool.verify(merged, base=base, adapters=[adapter], executor=threads)
    assert again == expected


EXTRACTIONS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 3},
    "auto": {"rank": "auto"},
    "energy": {"energy": 0.9},
    "max-error": {"max_error": 0.2, "rank": 16},
    "max-size": {"max_size": "12kB"},
    "dora": {"rank": 3, "variant": "dora"},
    "carry": {"rank": 2, "residual": "carry"},
    "kohya": {"rank": 2, "to": "kohya"},
    "randomised": {"rank": 2, "method": "randomised", "seed": 5},
}


@pytest.fixture
def tuned(inputs: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return what the base was tuned to: norms changed as well."""
    place = tmp_path / "tuned"
    shutil.copytree(inputs[0], place)
    for path in place.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                change = torch.randn(OUT, 3) @ torch.randn(3, INTO)
            else:
                change = torch.randn_like(tensor, dtype=torch.float32)
            tensors[name] = (tensor.float() + 0.1 * change).to(tensor.dtype)
        save_file(tensors, path, {"format": "pt"})
    return place


@pytest.mark.parametrize("rule", EXTRACTIONS)
def test_extract_in_parts(
    rule: str, inputs: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    options, base = EXTRACTIONS[rule], inputs[0]
    end = ".safetensors" if rule == "kohya" else ""
    found = []
    for name in ("one", "two", "three", "four"):
        (tmp_path / name).mkdir()

        def call(name: str = name, **how: Any) -> Any:
            place = tmp_path / name
            spectrum = place / "spectrum.json"
            more = {"save_spectrum": spectrum, **options, **how}
            return loratool.extract(base, tuned, place / f"out{end}", **more)

        if name == "one":
            report = call()
        elif name == "two":
            report = in_parts(call, 2)
        elif name == "three":
            with ThreadPoolExecutor(3) as threads:
                report = call(executor=threads)
        else:
            report = call(shards="auto", finish=True, wait=True)
        said = json.dumps(report.as_json()).replace(str(tmp_path / name), "")
        found.append((contents(tmp_path / name), json.loads(said)))
    for files, said in found[1:]:
        assert files == found[0][0]
        assert said == found[0][1]


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"shards": "0/3"},
        {"shards": "4/3"},
        {"shards": "all"},
        {"shards": ""},
        {"shards": "1/2/3"},
        {"shards": "1/2", "executor": "processes:2"},
        {"finish": True, "executor": "processes:2"},
        {"wait": True, "executor": "processes:2"},
        {"wait": True},
        {"shards": "1/2", "wait": True},
        {"resume": True, "shards": "1/2"},
        {"resume": True, "finish": True},
        {"resume": True, "wait": True},
        {"executor": "threads"},
        {"executor": "processes:0"},
    ],
    ids=str,
)
def test_options_that_contradict_each_other(
    options: dict[str, Any], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(OptionError):
        loratool.merge(inputs[0], [inputs[1]], tmp_path / "out", **options)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(inputs: tuple[Path, Path], tmp_path: Path) -> Run:
    """Run ``loratool merge`` in another process."""

    def run(*options: str, base: str = "base", out: str = "out") -> Any:
        line = [sys.executable, "-m", "loratool", "merge", base, "adapter", "-o", out, *options]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_parts_that_are_missing_are_named_and_the_hint_works(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="no parts") as caught:
        loratool.merge(base, [adapter], out, finish=True)
    assert "--shards auto" in str(caught.value.hint)
    loratool.merge(base, [adapter], out, shards="1/3")
    with pytest.raises(OutputError, match="2 of 3 parts are missing: model-") as caught:
        loratool.merge(base, [adapter], out, finish=True)
    assert "--shards auto" in str(caught.value.hint) and not out.exists()
    loratool.merge(base, [adapter], out, shards="auto")
    loratool.merge(base, [adapter], out, finish=True)
    loratool.merge(base, [adapter], tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_what_is_finished_stays_so(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, shards="auto", finish=True)
    before = contents(out)
    ways: list[dict[str, Any]] = [
        {"finish": True},
        {"finish": True, "wait": True},
        {"shards": "1/3"},
        {"shards": "auto"},
        {"shards": "auto", "finish": True},
        {"resume": True},
        {"executor": "processes:1"},
    ]
    for how in ways:
        report = loratool.merge(base, [adapter], out, **how)
        assert report.was_there and "finished before" in str(report)
        assert contents(out) == before
        assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base", "out"]
    for other in ({"weights": [0.5]}, {"dtype": "float32"}):
        for how in ({"finish": True}, {"shards": "1/3"}, {"resume": True}):
            with pytest.raises(OutputError):
                loratool.merge(base, [adapter], out, **how, **other)
            assert contents(out) == before


def test_other_options_and_other_inputs_are_refused(
    inputs: tuple[Path, Path], make_adapter: Make, tmp_path: Path
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, shards="1/3")
    other = make_adapter(lora(MODULES[0], OUT, INTO), name="other")
    for paths, options in (
        ([adapter], {"weights": [0.5]}),
        ([adapter], {"dtype": "float32"}),
        ([adapter], {"skip": ["layers.0"]}),
        ([other], {}),
        ([adapter, other], {}),
    ):
        with pytest.raises(OutputExistsError, match="other inputs or options") as caught:
            loratool.merge(base, paths, out, shards="2/3", **options)
        assert "rm -r" in str(caught.value.hint)
    loratool.merge(base, [adapter], out, shards="auto")
    for paths, options in (
        ([adapter], {"weights": [0.5]}),
        ([adapter], {"dtype": "float32"}),
        ([other], {}),
        ([adapter, other], {}),
    ):
        with pytest.raises(LoratoolError, match=r"other inputs|is not the file that the plan"):
            loratool.merge(base, paths, out, finish=True, **options)
    assert not out.exists()
    loratool.merge(base, [adapter], out, finish=True)


def test_an_input_that_changes_between_parts(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, shards="1/3")
    path = sorted(base.glob("*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(OutputExistsError, match="other inputs"):
        loratool.merge(base, [adapter], out, shards="2/3")


def test_an_input_that_changes_between_plan_and_part(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    path = sorted(base.glob("*.safetensors"))[0]
    begin = PartsFolder.begin

    def changing(self: PartsFolder, document: Any) -> bool:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return begin(self, document)

    monkeypatch.setattr(PartsFolder, "begin", changing)
    with pytest.raises(FileFormatError, match="is not the file that the plan was made with"):
        loratool.merge(base, [adapter], tmp_path / "out", shards="1/1")
    status = loratool.shards.status.status(tmp_path / "out")
    assert status.count("failed") == 1 and str(path) in json.dumps(status.as_json())
    with pytest.raises(OutputError, match=r"one failed: .*is not the file"):
        loratool.merge(base, [adapter], tmp_path / "out", finish=True, wait=True)


def test_an_input_that_changes_during_a_part(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.files.inputs import InputFiles

    base, adapter = inputs
    path = sorted(base.glob("*.safetensors"))[0]
    check = InputFiles.check_unchanged

    def changed(self: InputFiles) -> None:
        os.utime(path, ns=(1, 1))
        check(self)

    monkeypatch.setattr(InputFiles, "check_unchanged", changed)
    with pytest.raises(LoratoolError, match="changed"):
        loratool.merge(base, [adapter], tmp_path / "out", shards="1/1")
    parts = PartsFolder(tmp_path / "out")
    assert not (parts.made / path.name).exists()
    (failed,) = (parts.path / "records").glob("*.failed.json")
    assert "changed" in failed.read_text()


def test_a_copy_of_the_base_elsewhere(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, shards="1/3")
    (tmp_path / "there").mkdir()
    kept = shutil.copytree(base, tmp_path / "there" / "base")  # keeps times
    loratool.merge(kept, [adapter], out, shards="2/3")
    new = shutil.copytree(base, tmp_path / "new" / "base", copy_function=shutil.copyfile)
    for path in new.iterdir():
        os.utime(path, ns=(5, 5))
    with pytest.raises(OutputExistsError, match="other inputs"):
        loratool.merge(new, [adapter], out, shards="3/3")
    loratool.merge(kept, [adapter], out, shards="auto", finish=True)
    loratool.merge(base, [adapter], tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_a_finish_waits_for_workers_that_start_later(command: Run, tmp_path: Path) -> None:
    assert command("--shards", "1/3", "-q").returncode == 0
    line = [sys.executable, "-m", "loratool", "merge", "base", "adapter", "-o", "out", "-q"]
    waiting = subprocess.Popen([*line, "--finish", "--wait"], cwd=tmp_path)
    time.sleep(0.5)
    assert waiting.poll() is None
    for number in (2, 3):
        assert command("--shards", f"{number}/3", "-q").returncode == 0
    assert waiting.wait(30) == 0
    assert command(out="one").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize("verb", ["merge", "verify", "extract"])
def test_a_finish_waits_for_workers_where_none_has_begun(
    verb: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    merged, out = tmp_path / "merged", tmp_path / "out"
    if verb != "merge":
        loratool.merge(base, [adapter], merged)
    calls: dict[str, Callable[..., Any]] = {
        "merge": partial(loratool.merge, base, [adapter], out),
        "verify": partial(loratool.verify, merged, base=base, adapters=[adapter]),
        "extract": partial(loratool.extract, base, merged, out, rank=4),
    }
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(calls[verb], finish=True, wait=True)
        time.sleep(0.3)
        assert not waiting.done()
        share = calls[verb](shards="auto")
        assert isinstance(share, ShareReport)
        report = waiting.result(60)
    assert not isinstance(report, ShareReport)
    assert not [*tmp_path.glob("*.loratool-parts")]


def test_of_workers_that_verify_one_tells_and_the_others_end_well(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    merged = tmp_path / "merged"
    loratool.merge(base, [adapter], merged)
    how: dict[str, Any] = {"base": base, "adapters": [adapter], "shards": "auto", "finish": True}
    verify = partial(loratool.verify, merged, **how)
    told: list[Any] = []

    def others_are_quicker(*args: Any, **options: Any) -> ShareReport:
        monkeypatch.undo()
        share = do_share(*args, **options)
        told.append(verify())
        return share

    monkeypatch.setattr(driver, "do_share", others_are_quicker)
    share = verify()
    assert told[0].ok
    assert isinstance(share, ShareReport)
    assert "was finished by another process" in share.notes[-1]
    assert not [*tmp_path.glob("*.loratool-parts")]


def test_claims_of_other_machines_are_taken_over_when_they_do_not_grow(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, shards="1/3")
    claims = PartsFolder(out).path / "claims"
    done = {path.name for path in (PartsFolder(out).path / "records").iterdir()}
    open_part = next(n for n in (1, 2, 3) if f"{n:04}.json" not in done)
    claim = claims / f"{open_part:04}"
    claim.write_text('{"host": "elsewhere", "pid": 1}\n')
    share = loratool.merge(base, [adapter], out, shards="auto")
    assert isinstance(share, ShareReport) and share.left == 1 and share.parts == 1
    assert claim.exists()
    monkeypatch.setattr(course, "STALE", 0.2)
    begun = time.monotonic()
    loratool.merge(base, [adapter], out, shards="auto", wait=True, finish=True)
    assert time.monotonic() - begun > 0.2
    loratool.merge(base, [adapter], tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_dry_runs_and_json_and_quiet(command: Run, tmp_path: Path) -> None:
    done = command("--shards", "1/3", "--dry-run")
    assert done.returncode == 0 and "model-00001-of-00003" in done.stdout
    assert not (tmp_path / "out.loratool-parts").exists()
    done = command("--shards", "1/3", "--json")
    said = json.loads(done.stdout)
    assert said["shards"] == "1/3" and said["parts"] == 1 and said["left"] == 2
    assert said["all_parts"] == 3 and said["bytes"] > 0 and done.stderr == ""
    done = command("--shards", "2/3", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = command("--finish")
    assert done.returncode == 2 and "1 of 3 parts are missing" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    done = command("--shards", "auto", "--finish", "--json")
    assert json.loads(done.stdout)["dry_run"] is False


def test_an_output_inside_an_input_or_in_no_folder(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    before = contents(base)
    for out in (base / "inside", base, tmp_path, tmp_path / "none" / "out"):
        with pytest.raises(OutputError):
            loratool.merge(base, [adapter], out, shards="1/3", force=True)
    assert contents(base) == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_is_there_is_replaced_in_the_end_only(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, weights=[0.25])
    old = contents(out)
    with pytest.raises(OutputExistsError):
        loratool.merge(base, [adapter], out, shards="1/2")
    for number in (1, 2):
        loratool.merge(base, [adapter], out, shards=f"{number}/2", force=True)
    assert contents(out) == old
    with pytest.raises(OutputExistsError):
        loratool.merge(base, [adapter], out, finish=True)
    assert contents(out) == old
    loratool.merge(base, [adapter], out, finish=True, force=True)
    loratool.merge(base, [adapter], tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_a_disk_that_is_full(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from loratool.files import transfer

    base, adapter = inputs
    out = tmp_path / "out"
    real = os.pwrite
    count = 0

    def full(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(transfer.os, "pwrite", full)
    with pytest.raises(OutputError, match=r"full|space"):
        loratool.merge(base, [adapter], out, shards="1/1")
    monkeypatch.undo()
    loratool.merge(base, [adapter], out, shards="auto", finish=True)
    loratool.merge(base, [adapter], tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_an_empty_merge_is_refused_as_in_one_run(make_adapter: Make, tmp_path: Path) -> None:
    base = sharded(tmp_path / "base")
    factors = {
        key: torch.zeros_like(value) if "lora_B" in key else value
        for key, value in lora(MODULES[0], OUT, INTO).items()
    }
    adapter = make_adapter(factors)
    with pytest.raises(MergeError) as single:
        loratool.merge(base, [adapter], tmp_path / "out")
    with pytest.raises(MergeError) as caught:
        loratool.merge(base, [adapter], tmp_path / "out", shards="auto", finish=True)
    assert caught.value.what == single.value.what
    assert not (tmp_path / "out").exists()


def test_two_workers_at_the_same_part_at_once(command: Run, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "loratool", "merge", "base", "adapter", "-o", "out", "-q"]
    for shards in ("1/1", "auto"):
        workers = [
            subprocess.Popen([*line, "--shards", shards, "--finish"], cwd=tmp_path)
            for _ in range(3)
        ]
        assert [worker.wait(60) for worker in workers] == [0, 0, 0]
        assert command(out="one").returncode == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "one")
        assert not (tmp_path / "out.loratool-parts").exists()
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "one")


# -- strangers ------------------------------------------------------------------------------------

SIDECAR = "plan.sidecar:Sidecar"


def _renamed(closing: dict[str, Any], name: str) -> None:
    sidecar = {"@": SIDECAR, "name": name, "source": None, "content": {"t": "owned"}}
    closing["plan"]["sidecars"] = [sidecar]


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "above": lambda closing: _renamed(closing, "../../owned.json"),
    "absolute": lambda closing: _renamed(closing, "/tmp/owned.json"),
    "inside": lambda closing: _renamed(closing, "a/../../owned.json"),
    "number": lambda closing: closing["plan"].update(sidecars=3),
    "text": lambda closing: closing.update(plan="x"),
    "shared above": lambda closing: closing.update(shared=["../../adapter"]),
    "shared number": lambda closing: closing.update(shared=7),
    "source above": lambda closing: closing.update(marks={"m": [[{"p": ["base", "../x"]}, 1]]}),
    "no root": lambda closing: closing.update(marks={"m": [[{"p": ["/etc", "passwd"]}, 1]]}),
    "marks": lambda closing: closing.update(marks={"m": [[{"p": ["base", "config.json"]}, 1]]}),
    "other class": lambda closing: closing.update({"@": "shards.roots:Roots"}),
    "foreign class": lambda closing: closing.update({"@": "os:system"}),
    "field": lambda closing: closing.update(more=1),
    "history": lambda closing: closing["plan"].update(history=5),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_plan_that_a_stranger_has_edited(
    edit: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, shards="auto")
    path = PartsFolder(out).plan_path
    said = json.loads(path.read_text())
    EDITS[edit](said["closing"])
    path.write_text(json.dumps(said))
    before = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*") if each.is_file()}
    with pytest.raises(FileFormatError) as caught:
        loratool.merge(base, [adapter], out, finish=True)
    assert "\n" not in str(caught.value)
    after = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*") if each.is_file()}
    assert before == after and not Path("/tmp/owned.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"kept": ["x"]},
        {"kept": [10**400]},
        {"kept": 3},
        {"total": None},
        {"digests": [["base", "../x", "a"]]},
        {"digests": [["base"]]},
    ],
    ids=str,
)
def test_a_record_that_a_stranger_has_edited(
    change: dict[str, Any], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, shards="auto")
    path = PartsFolder(out).path / "records" / "0001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileFormatError):
        loratool.merge(base, [adapter], out, finish=True)
    assert not out.exists()
