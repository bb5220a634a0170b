"""The local cache of the hub: where it is, what is in it, what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hub_cache import COMMIT, in_cache
from samples import FIXTURES

from loratool.files.hub.cache import (
    absent_sidecars,
    cache_folder,
    cached,
    missing_in,
    offline_by,
    snapshot_of,
)
from loratool.files.hub.names import HubName
from loratool.files.places import called, located, origin_of

BASE = FIXTURES / "bases" / "llama-untied"
ADAPTER = FIXTURES / "adapters" / "lora-linear"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As ``huggingface_hub`` finds it, whose constants are read when it is imported."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/c")
    assert cache_folder() == tmp_path / "c" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", "$HOME/hf")
    assert cache_folder() == tmp_path / "hf" / "hub"
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", "/old")
    assert cache_folder() == Path("/old")
    monkeypatch.setenv("HF_HUB_CACHE", "/new")
    assert cache_folder() == Path("/new")


@pytest.mark.parametrize(
    ("said", "expected"), [("1", True), ("yes", True), ("0", False), ("", False)]
)
def test_offline(monkeypatch: pytest.MonkeyPatch, said: str, expected: bool) -> None:
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    assert (offline_by() is not None) is expected


def test_what_is_in_it_is_found(cache: Path) -> None:
    snapshot = in_cache(cache, "org/base", BASE)
    other = in_cache(cache, "org/base", BASE, commit="f" * 40, ref="refs/pr/7")
    assert located("org/base") == snapshot
    assert located("hf://org/base") == snapshot
    assert located(f"org/base@{'f' * 40}") == other
    assert located("org/base@refs/pr/7") == other
    assert located("org/base/config.json") == snapshot / "config.json"
    origin = origin_of(snapshot / "config.json")
    assert origin is not None and (origin.repo, origin.commit) == ("org/base", COMMIT)
    assert called("org/base") == f"org/base@{COMMIT}"
    assert called(snapshot / "config.json") == f"org/base@{COMMIT}/config.json"


def test_a_path_on_the_disk_wins(cache: Path) -> None:
    in_cache(cache, "org/base", BASE)
    Path("org/base").mkdir(parents=True)
    assert located("org/base") == Path("org/base")


def test_a_ref_that_leads_elsewhere_is_not_followed(cache: Path) -> None:
    in_cache(cache, "org/base", BASE)
    ref = cache / "models--org--base" / "refs" / "main"
    for text in ("../../..", "main", "", "z" * 40, f"../{COMMIT}"):
        ref.write_text(text)
        assert cached(HubName("org/base")) is None
    ref.write_bytes(b"\xff" * 40)
    assert cached(HubName("org/base")) is None


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("config.json", "config.json"),
        ("model*", "it has no weights"),
    ],
)
def test_what_a_snapshot_lacks(cache: Path, lost: str, words: str) -> None:
    snapshot = in_cache(cache, "org/base", BASE)
    for path in snapshot.glob(lost):
        path.unlink()
    found = cached(HubName("org/base"))
    assert found is not None and words in str(missing_in(found))


def test_a_link_to_nothing_is_missing(cache: Path) -> None:
    snapshot = in_cache(cache, "org/base", BASE)
    (snapshot / "model-00001-of-00002.safetensors").resolve().unlink()
    found = cached(HubName("org/base"))
    assert found is not None and "model-00001-of-00002.safetensors" in str(missing_in(found))


def test_shards_without_an_index(cache: Path) -> None:
    snapshot = in_cache(cache, "org/base", BASE)
    (snapshot / "model.safetensors.index.json").unlink()
    found = cached(HubName("org/base"))
    assert found is not None and missing_in(found) is None
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors" in str(missing_in(found))


def test_an_adapter_without_its_configuration(cache: Path) -> None:
    snapshot = in_cache(cache, "org/lora", ADAPTER)
    found = cached(HubName("org/lora"))
    assert found is not None and missing_in(found) is None
    (snapshot / "adapter_config.json").unlink()
    assert "adapter_config.json" in str(missing_in(found))


def test_a_pipeline_without_a_component(cache: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    for name in ("unet", "text_encoder"):
        shutil.copytree(FIXTURES / "bases" / "clip-text", pipeline / name)
    index = {
        "_class_name": "X",
        "unet": ["d", "U"],
        "text_encoder": ["t", "C"],
        "vae": [None, None],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index))
    snapshot = in_cache(cache, "org/pipe", pipeline)
    found = cached(HubName("org/pipe"))
    assert found is not None and missing_in(found) is None
    (snapshot / "unet" / "model.safetensors").unlink()
    assert "the weights of unet/" in str(missing_in(found))
    shutil.rmtree(snapshot / "text_encoder")
    assert "text_encoder/" in str(missing_in(found))


def test_sidecars_that_the_commit_has(cache: Path) -> None:
    snapshot = in_cache(cache, "org/base", BASE)
    found = cached(HubName("org/base"))
    assert found is not None and absent_sidecars(found) == []
    names = [*(path.name for path in snapshot.iterdir()), "tokenizer.json", "img/a.png", "x.onnx"]
    trees = cache / "models--org--base" / "trees"
    trees.mkdir()
    (trees / f"{COMMIT}.json").write_text(json.dumps({"files": dict.fromkeys(names)}))
    assert absent_sidecars(found) == ["tokenizer.json"]


def test_what_is_no_snapshot() -> None:
    assert snapshot_of(Path("/x/models--a--b/blobs/abc")) is None
    assert origin_of(Path("/x/y")) is None
