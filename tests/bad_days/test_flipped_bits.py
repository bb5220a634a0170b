"""One bit of anything that a merge writes, flipped: ``verify`` sees it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from samples import lora

import loratool
from loratool.errors import LoratoolError

Make = Callable[..., Path]
CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "vocab_size": 32, "torch_dtype": "float32"}
BESIDE = {
    "generation_config.json": '{"temperature": 0.6, "top_p": 0.9}',
    "tokenizer.json": '{"model": {"vocab": {"a": 1, "b": 2}}}',
    "special_tokens_map.json": "[1, 2]",
    "merges.txt": "a b\nb c\n",
    "chat_template.jinja": "{{ messages }}",
}

FOR_PEOPLE = ("README.md", "loratool.json")


@pytest.fixture
def merged(make_base: Make, make_adapter: Make, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a base in two shards with files beside them, an adapter, and what was merged."""
    base = tmp_path / "base"
    base.mkdir()
    parts = {
        "model-00001-of-00002.safetensors": {"model.layers.0.q_proj.weight": torch.randn(12, 10)},
        "model-00002-of-00002.safetensors": {"model.norm.weight": torch.randn(10)},
    }
    from safetensors.torch import save_file

    for name, tensors in parts.items():
        save_file(tensors, base / name, {"format": "pt", "note": "of the base"})
    weight_map = {key: name for name, tensors in parts.items() for key in tensors}
    index = {"metadata": {"total_size": 520, "by": "somebody"}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(CONFIG))
    for name, text in BESIDE.items():
        (base / name).write_text(text)
    adapter = make_adapter(lora("model.layers.0.q_proj", 12, 10), target_modules=["q_proj"])
    loratool.merge(base, [adapter], tmp_path / "out")
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])
    return base, adapter, tmp_path / "out"


def is_seen(base: Path, adapter: Path, out: Path) -> bool:
    try:
        return bool(loratool.verify(out, base=base, adapters=[adapter]))
    except LoratoolError:
        return True


@pytest.mark.slow
def test_every_flip_is_seen(merged: tuple[Path, Path, Path]) -> None:
    source, missed = random.Random(0), []
    for path in sorted(merged[2].iterdir()):
        if path.name in FOR_PEOPLE:
            continue
        whole = path.read_bytes()
        for place in sorted(source.sample(range(len(whole)), min(60, len(whole)))):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << source.randrange(8)
            path.write_bytes(flipped)
            if not is_seen(*merged):
                missed.append((path.name, place, bytes(flipped[place - 8 : place + 8])))
        path.write_bytes(whole)
    assert not missed


@pytest.mark.parametrize("name", [*BESIDE, "config.json"])
def test_what_is_missing_is_said(name: str, merged: tuple[Path, Path, Path]) -> None:
    base, adapter, out = merged
    (out / name).unlink()
    (found,) = loratool.verify(out, base=base, adapters=[adapter])
    expected = "LT107" if name == "config.json" else "LT111"
    assert (found.code, found.where) == (expected, name)


@pytest.mark.parametrize("name", ["modeling_other.py", "added_tokens.json", "onnx/model.onnx"])
def test_what_no_merge_has_written_is_said(name: str, merged: tuple[Path, Path, Path]) -> None:
    base, adapter, out = merged
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    (found,) = loratool.verify(out, base=base, adapters=[adapter])
    assert (found.code, found.severity, found.where) == ("LT111", "warning", name)


@pytest.mark.parametrize("key", ["sha256", "headers_sha256", "command", None])
def test_a_record_of_other_inputs_is_said(key: str | None, merged: tuple[Path, Path, Path]) -> None:
    base, adapter, out = merged
    record = out / "loratool.json"
    text = record.read_text()
    if key is None:
        record.write_text(text[:-3])
    else:
        place = text.index(f'"{key}": "') + len(key) + 6
        other = "f" if text[place] != "f" else "e"
        record.write_text(text[:place] + other + text[place + 1 :])
    (found,) = loratool.verify(out, base=base, adapters=[adapter])
    assert (found.code, found.severity, found.where) == ("LT111", "warning", "loratool.json")


def test_what_says_the_same_to_python_alone(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, out = merged
    config = (out / "config.json").read_text()
    for spelled in (config.replace("32,", "32.0,"), "\N{BYTE ORDER MARK}" + config):
        (out / "config.json").write_text(spelled, "utf-8")
        codes = {each.code for each in loratool.verify(out, base=base, adapters=[adapter])}
        assert codes == {"LT107"}
    (out / "config.json").write_text(config)
    (out / "model.safetensors.index.json").unlink()
    (found,) = loratool.verify(out, base=base, adapters=[adapter])
    assert (found.code, found.message) == ("LT108", "is missing")


def test_a_dtype_that_only_the_configuration_had_not(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5).bfloat16()}, {"torch_dtype": "float32"})
    adapter = make_adapter(lora("a.q", 6, 5))
    loratool.merge(base, [adapter], tmp_path / "out", dtype="bfloat16")
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


def test_a_configuration_that_another_tool_has_saved(merged: tuple[Path, Path, Path]) -> None:
    """Spelling, the order of fields and who saved it are no errors; what it says is."""
    base, adapter, out = merged
    config = {"transformers_version": "5.0", "dtype": "float32"} | CONFIG
    del config["torch_dtype"]
    (out / "config.json").write_text(json.dumps(config, indent=4))
    found = loratool.verify(out, base=base, adapters=[adapter])
    assert [(each.code, each.severity) for each in found] == [("LT111", "warning")]
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    errors = [e for e in loratool.verify(out, base=base, adapters=[adapter]) if e.is_error]
    assert [each.message for each in errors] == ["rope_theta is 500000.0, expected 10000.0"]
