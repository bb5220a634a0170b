"""The base that an adapter records, where none is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_cache import COMMIT, in_cache
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import FIXTURES

import loratool
from loratool.errors import AdapterError, HubError
from loratool.verbs.merging.recorded import recorded_base

BASE = FIXTURES / "bases" / "llama-untied"
ADAPTER = FIXTURES / "adapters" / "lora-linear"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "hub"


def recording(folder: Path, base: object, **more: Any) -> Path:
    shutil.copytree(ADAPTER, folder)
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": base, **more}
    path.write_text(json.dumps(config))
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_folder_as_a_path(cache: Path, tmp_path: Path) -> None:
    adapter = recording(tmp_path / "a", str(BASE))
    report = loratool.merge(None, [adapter], tmp_path / "out")
    loratool.merge(BASE, [adapter], tmp_path / "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert any(f"the base is {BASE}: the adapter records" in note for note in report.notes)
    assert not loratool.verify(tmp_path / "out", adapters=[adapter])


def test_a_path_from_here_and_from_the_adapter(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(BASE, "model")
    adapter = recording(tmp_path / "a", "model")
    assert recorded_base(adapter)[0] == Path("model")
    shutil.copytree(BASE, tmp_path / "b" / "base")
    other = recording(tmp_path / "b" / "adapter", "../base")
    assert recorded_base(other)[0].resolve() == tmp_path / "b" / "base"


def test_a_name_of_the_hub_in_the_cache(cache: Path, tmp_path: Path) -> None:
    snapshot = in_cache(cache, "org/base", BASE)
    pinned = in_cache(cache, "org/base", BASE, commit="f" * 40, ref="v1")
    alone = in_cache(cache, "gpt9", BASE)
    for number, (said, revision, expected) in enumerate(
        [
            ("org/base", None, snapshot),
            ("org/base", "v1", pinned),
            ("org/base", "f" * 40, pinned),
            ("org/base", "main", snapshot),
            ("https://huggingface.co/org/base", None, snapshot),
            ("gpt9", None, alone),
        ]
    ):
        adapter = recording(tmp_path / f"a{number}", said, revision=revision)
        assert recorded_base(adapter) == (expected, said)
    report = loratool.merge(None, [tmp_path / "a0"], tmp_path / "out")
    assert report.hub is not None
    assert report.hub["base"] == {"repo": "org/base", "commit": COMMIT, "path": None}


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (None, AdapterError, "records no base"),
        ("", AdapterError, "records no base"),
        ("/nowhere/model", AdapterError, "records '/nowhere/model' as its base, which is not here"),
        ("a\0b", AdapterError, "records no base"),
        ("https://example.com/x", AdapterError, "which is not here"),
        ("model.safetensors", AdapterError, "which is not here"),
        ("../../up", AdapterError, "which is not here"),
        ("org/base", HubError, "records 'org/base' as its base: not in the local cache of the hub"),
    ],
)
def test_what_is_not_to_be_had(
    cache: Path, tmp_path: Path, said: str | None, kind: type[Exception], words: str
) -> None:
    adapter = recording(tmp_path / "a", said)
    with pytest.raises(kind, match=words):
        loratool.merge(None, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_tools_record_it_elsewhere(cache: Path, tmp_path: Path) -> None:
    mlx = tmp_path / "mlx"
    loratool.convert(ADAPTER, "mlx", mlx)
    config = json.loads((mlx / "adapter_config.json").read_text())
    (mlx / "adapter_config.json").write_text(json.dumps({**config, "model": str(BASE)}))
    assert recorded_base(mlx)[0] == BASE
    kohya = tmp_path / "k.safetensors"
    loratool.convert(ADAPTER, "kohya", kohya, base=BASE)
    with safe_open(kohya, "pt") as file:
        metadata = file.metadata()
    model = BASE / "model-00001-of-00002.safetensors"
    shutil.copyfile(model, tmp_path / "sd.safetensors")
    save_file(load_file(kohya), kohya, {**metadata, "ss_sd_model_name": "sd.safetensors"})
    assert recorded_base(kohya)[0] == tmp_path / "sd.safetensors"


def test_a_model_alone_is_no_adapter(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        loratool.merge(None, [BASE], tmp_path / "out")
    assert caught.value.hint


def test_the_command_line(cache: Path, tmp_path: Path) -> None:
    adapter = recording(tmp_path / "a", str(BASE))
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "merge", str(adapter), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=True,
    )
    assert f"note: the base is {BASE}: the adapter records '{BASE}'" in done.stderr
    again = [sys.executable, "-m", "loratool", "verify", str(tmp_path / "out")]
    assert subprocess.run([*again, "--adapter", str(adapter)], check=False).returncode == 0


def test_validate_says_that_the_base_is_at_hand(cache: Path, tmp_path: Path) -> None:
    in_cache(cache, "org/base", BASE)
    for number, (said, near) in enumerate(
        [("org/base", "org/base"), (str(BASE), str(BASE)), ("org/other", None), (None, None)]
    ):
        adapter = recording(tmp_path / f"a{number}", said)
        found = [item for item in loratool.validate(adapter) if item.code == "LT037"]
        hints = [f"loratool validate {adapter} --base {near}"] if near else []
        assert [item.hint for item in found] == hints
    again = loratool.validate(tmp_path / "a0", base="org/base")
    assert "LT037" not in {item.code for item in again}
