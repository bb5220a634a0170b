"""Models and adapters of the hub, served by a mock of it on this machine."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hub_cache import in_cache
from huggingface_hub import close_session
from mock_hub import MockHub, mock_hub
from safetensors.torch import save_file
from samples import FIXTURES

import loratool
from loratool.errors import FileFormatError, HubError, LoratoolError, MissingFileError, OutputError
from loratool.files.container import read_bytes
from loratool.files.containers import open_weights
from loratool.files.hub import remote
from loratool.files.places import forget_stand_ins, located
from loratool.files.sources import listeners, source_of
from loratool.verbs.merge import plan_merge

BASE = FIXTURES / "bases" / "llama-untied"
PICKLED = FIXTURES / "bases" / "llama-bin"
ADAPTER = FIXTURES / "adapters" / "lora-linear"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(remote, "WAIT", 0.01)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with mock_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        found.add("org/base", BASE)
        found.add("org/lora", ADAPTER)
        yield found
    forget_stand_ins()
    close_session()


RECORDS = ("README.md", "loratool.json")
"""What says where the inputs came from."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in RECORDS}


def sparse(folder: Path, shards: int, per_shard: int, size: int) -> int:
    """Write a model of shards that are holes but for their headers; return its size in bytes."""
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for shard in range(1, shards + 1):
        name = f"model-{shard:05}-of-{shards:05}.safetensors"
        fields: dict[str, Any] = {}
        for index in range(per_shard):
            layer = (shard - 1) * per_shard + index
            key = f"model.layers.{layer}.mlp.down_proj.weight"
            fields[key] = {
                "dtype": "BF16",
                "shape": [size // 2048, 1024],
                "data_offsets": [index * size, (index + 1) * size],
            }
            weight_map[key] = name
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + per_shard * size)
        total += per_shard * size
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return total


@pytest.mark.parametrize(("name", "folder"), [("org/lora", ADAPTER), ("org/base", BASE)])
def test_inspect_says_the_same(hub: MockHub, name: str, folder: Path) -> None:
    found, expected = (loratool.inspect(path).as_json() for path in (name, folder))
    assert found.pop("hub") == {"repo": name, "commit": "a" * 40, "path": None}
    found["path"] = expected["path"] = ""
    assert found == expected


def test_inspecting_a_large_model_reads_kilobytes(hub: MockHub, tmp_path: Path) -> None:
    size = sparse(tmp_path / "large", shards=30, per_shard=24, size=192 << 20)
    hub.add("org/large", tmp_path / "large")
    info = loratool.inspect("org/large").as_json()
    assert size > 140e9 and info["bytes"] > size and info["shards"] == 30
    assert hub.sent < 1.2e6  # 32 KiB of each shard, and the index
    api = [path for _, path, _ in hub.asked if path.startswith("/api/models/")]
    assert len(api) == 1
    assert sum(path.startswith("/data/") for _, path, _ in hub.asked) == 30
    assert not Path(os.environ["HF_HUB_CACHE"]).exists()


def test_a_header_longer_than_the_first_range(hub: MockHub, tmp_path: Path) -> None:
    tensors = {f"layer.{n}.{'x' * 200}.weight": torch.full((1,), float(n)) for n in range(3000)}
    save_file(tensors, tmp_path / "long.safetensors")
    (tmp_path / "long").mkdir()
    (tmp_path / "long.safetensors").rename(tmp_path / "long" / "model.safetensors")
    hub.add("org/long", tmp_path / "long")
    file = open_weights(located("org/long") / "model.safetensors")
    assert len(file.tensors) == 3000
    assert sum(path.startswith("/data/") for _, path, _ in hub.asked) <= 3


def test_merging_fetches_once(hub: MockHub, tmp_path: Path) -> None:
    told: list[Any] = []
    listeners.append(told.append)
    try:
        report = loratool.merge("org/base", ["org/lora"], tmp_path / "merged")
    finally:
        listeners.remove(told.append)
    loratool.merge(BASE, [ADAPTER], tmp_path / "expected")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "expected")
    commit = {"commit": "a" * 40, "path": None}
    assert report.hub == {
        "base": {"repo": "org/base", **commit},
        "adapters": [{"repo": "org/lora", **commit}],
    }
    assert [(each.name, each.files) for each in told] == [
        ("org/base@aaaaaaaa", 5),
        ("org/lora@aaaaaaaa", 2),
    ]
    assert told[0].size == sum(path.stat().st_size for path in BASE.iterdir())
    hub.forget_requests()
    forget_stand_ins()
    loratool.merge("org/base", ["org/lora"], tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "expected")
    assert hub.asked == []


def test_what_is_cached_needs_neither_network_nor_library(
    hub: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(os.environ["HF_HUB_CACHE"])
    in_cache(cache, "org/base", BASE)
    in_cache(cache, "org/lora", ADAPTER)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    report = loratool.merge("org/base", ["org/lora"], tmp_path / "merged")
    assert report.hub is not None and report.hub["base"]["repo"] == "org/base"
    assert hub.asked == []
    with pytest.raises(HubError, match="not in the local cache") as caught:
        loratool.inspect("org/other")
    assert caught.value.hint == "to fetch from the hub: pip install 'loratool[hub]'"


def test_a_part_of_a_model_in_the_cache_is_completed(hub: MockHub, tmp_path: Path) -> None:
    snapshot = in_cache(Path(os.environ["HF_HUB_CACHE"]), "org/base", BASE, commit="a" * 40)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    loratool.merge("org/base", [ADAPTER], tmp_path / "merged")
    loratool.merge(BASE, [ADAPTER], tmp_path / "expected")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "expected")
    fetched = {path for method, path, asked in hub.asked if method == "GET" and not asked}
    assert "/data/org--base/model-00002-of-00002.safetensors" in fetched
    assert "/data/org--base/model-00001-of-00002.safetensors" not in fetched


def test_a_dry_run_fetches_no_data(hub: MockHub, tmp_path: Path) -> None:
    size = sparse(tmp_path / "large", shards=4, per_shard=4, size=64 << 20)
    hub.add("org/large", tmp_path / "large")
    adapter = {}
    for layer in range(16):
        start = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        adapter[f"{start}.lora_A.weight"] = torch.randn(4, 1024)
        adapter[f"{start}.lora_B.weight"] = torch.randn((64 << 20) // 2048, 4)
    save_file(adapter, tmp_path / "a.safetensors")
    plan = plan_merge("org/large", [tmp_path / "a.safetensors"], alpha=4)
    assert plan.merged == 16
    assert hub.sent < 200_000
    assert sum(plan.unfetched.values()) > size


def test_a_stand_in_is_never_read_as_data(hub: MockHub) -> None:
    """What comes of a tensor are its bytes, and what reads the path itself finds no numbers."""
    place = located("org/base") / "model-00001-of-00002.safetensors"
    original = open_weights(BASE / place.name)
    file = open_weights(place)
    assert source_of(place) is not None
    assert b"stand-in" in place.read_bytes()
    for name, stored in file.tensors.items():
        assert read_bytes(stored) == read_bytes(original.tensors[name]), name


def test_validate_against_a_base_of_the_hub(hub: MockHub) -> None:
    assert loratool.validate("org/lora", base="org/base") == loratool.validate(ADAPTER, base=BASE)
    assert not Path(os.environ["HF_HUB_CACHE"]).exists()


def verbs(base: object, tuned: object, adapter: object, out: Path) -> dict[str, Any]:
    """Return the verbs on these inputs, each of which writes below ``out``."""
    pair = [adapter, adapter]
    return {
        "convert": lambda: loratool.convert(adapter, "kohya", out / "k.safetensors", base=base),
        "compose": lambda: loratool.compose(pair, out / "sum", weights=[1, 2]),
        "rescale": lambda: loratool.rescale(adapter, out / "scaled", scale=2),
        "truncate": lambda: loratool.truncate(adapter, out / "small", rank=1),
        "extract": lambda: loratool.extract(base, tuned, out / "extracted", rank=2),
        "merge": lambda: loratool.merge(base, [adapter], out / "merged"),
        "verify": lambda: loratool.verify(tuned, base=base, adapters=[adapter]).as_json(),
        "validate": lambda: loratool.validate(adapter, base=base, deep=True).as_json(),
        "compare": lambda: loratool.compare(pair).cosines,
        "inspect": lambda: loratool.inspect(adapter, spectrum=True).as_json()["modules"],
        "metadata": lambda: loratool.metadata(adapter, out / "m", set={"a": "b"}),
    }


@pytest.mark.parametrize("verb", list(verbs("", "", "", Path())))
def test_every_verb_takes_names(
    hub: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """With nothing in the cache: whatever a verb reads goes by way of the hub."""
    loratool.merge(BASE, [ADAPTER], tmp_path / "tuned", dtype="float32")
    hub.add("org/tuned", tmp_path / "tuned")
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    expected = verbs(BASE, tmp_path / "tuned", ADAPTER, tmp_path / "near")[verb]()
    found = verbs("org/base", "org/tuned", "org/lora", tmp_path / "far")[verb]()
    if isinstance(expected, list | dict | tuple):
        assert found == expected
    for path in sorted((tmp_path / "near").rglob("*.safetensors")):
        other = tmp_path / "far" / path.relative_to(tmp_path / "near")
        one, two = (open_weights(each) for each in (path, other))
        assert {n: read_bytes(t) for n, t in one.tensors.items()} == {
            n: read_bytes(t) for n, t in two.tensors.items()
        }
        if "loratool" in two.metadata:
            assert "org/" in two.metadata["loratool"] and "/tmp" not in two.metadata["loratool"]
    assert {path.name for path in (tmp_path / "near").rglob("*")} == {
        path.name for path in (tmp_path / "far").rglob("*")
    }


def test_a_pickled_model(hub: MockHub, tmp_path: Path) -> None:
    """The directory of its archives is at their end."""
    hub.add("org/pickled", PICKLED)
    found, expected = (loratool.inspect(path).as_json() for path in ("org/pickled", PICKLED))
    assert found["parameters"] == expected["parameters"]
    loratool.merge("org/pickled", [ADAPTER], tmp_path / "merged")
    loratool.merge(PICKLED, [ADAPTER], tmp_path / "expected")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "expected")


def test_a_file_and_a_folder_inside(hub: MockHub, tmp_path: Path) -> None:
    (tmp_path / "many" / "one").mkdir(parents=True)
    for path in ADAPTER.iterdir():
        (tmp_path / "many" / "one" / path.name).write_bytes(path.read_bytes())
    hub.add("org/many", tmp_path / "many", revisions={"v1": "b" * 40, "refs/pr/2": "c" * 40})
    expected = loratool.inspect(ADAPTER).as_json()["modules"]
    for name, commit in (
        ("org/many/one", "a" * 40),
        ("org/many/one/adapter_model.safetensors", "a" * 40),
        ("org/many@v1/one", "b" * 40),
        ("hf://org/many@refs/pr/2/one", "c" * 40),
        (f"{hub.address}/org/many/tree/main/one", "a" * 40),
        (f"org/many@{'b' * 40}/one", "b" * 40),
    ):
        found = loratool.inspect(name).as_json()
        assert found["modules"] == expected
        assert found["hub"]["commit"] == commit
    with pytest.raises(HubError, match="holds no 'two'"):
        loratool.inspect("org/many/two")


def test_the_token_goes_to_the_hub_alone(
    hub: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mock refuses it where the weights lie, which is another host."""
    hub.add("org/private", BASE, token="secret")
    with pytest.raises(HubError, match="no such model, or it is private"):
        loratool.inspect("org/private")
    monkeypatch.setenv("HF_TOKEN", "secret")
    report = loratool.merge("org/private", [ADAPTER], tmp_path / "merged")
    assert report.merged
    assert "secret" not in repr(report)
    for path in (tmp_path / "merged").iterdir():
        assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "token", "words", "hint"),
    [
        (
            "org/gone",
            None,
            "no such file or folder, and the hub has no such model",
            "hf auth login",
        ),
        ("org/gated", None, "is gated", "accept its terms at http://127.0.0.1"),
        ("org/gated", "other", "is gated", "accept its terms"),
        ("org/lora", "wrong", "does not accept the token", "HF_TOKEN"),
        ("org/lora@v9", None, "has no revision 'v9'", "/org/lora/refs"),
        ("hf://org/gone", None, "no such", "hf auth login"),
    ],
)
def test_what_cannot_be_had(
    hub: MockHub,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    token: str | None,
    words: str,
    hint: str,
) -> None:
    hub.add("org/gated", ADAPTER, token="secret", is_gated=True)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=words) as caught:
        loratool.inspect(name)
    assert hint in str(caught.value.hint)
    assert "\n" not in str(caught.value)


def test_offline(hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="not in the local cache of the hub, and HF_HUB_OFFLINE"):
        loratool.inspect("org/lora")
    assert hub.asked == []


def test_nobody_is_there(hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        loratool.inspect("org/lora")


def test_a_mistake_in_a_path_is_told(hub: MockHub) -> None:
    Path("models/lora").mkdir(parents=True)
    with pytest.raises(HubError) as caught:
        loratool.inspect("modles/lora")
    assert caught.value.hint == "did you mean models/lora?"
    hub.forget_requests()
    for path in ("models/other", "x/adapter.safetensors"):  # meant here: no stranger is asked
        with pytest.raises(MissingFileError, match="no such file or folder"):
            loratool.inspect(path)
    assert hub.asked == []


def test_a_busy_hub_is_asked_again(hub: MockHub) -> None:
    hub.busy = [500, 429, 503]
    assert loratool.inspect("org/lora").as_json()["modules"]
    forget_stand_ins()
    hub.busy = [503] * 50
    with pytest.raises(HubError, match=r"answers with an error \(503\)"):
        loratool.inspect("org/lora")
    forget_stand_ins()
    hub.busy = [429] * 50
    with pytest.raises(HubError, match="too many requests"):
        loratool.inspect("org/lora")


def test_an_answer_that_ends_early_is_asked_for_again(hub: MockHub, tmp_path: Path) -> None:
    hub.cut = 2
    assert loratool.inspect("org/lora").as_json()["modules"]
    assert hub.cut == 0
    hub.cut = 1  # of the base's header; then of its data, which goes on where it ended
    located("org/base")
    open_weights(located("org/base") / "model-00001-of-00002.safetensors")
    hub.forget_requests()
    hub.cut = 1
    loratool.merge("org/base", [ADAPTER], tmp_path / "merged")
    loratool.merge(BASE, [ADAPTER], tmp_path / "expected")
    assert hub.cut == 0
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "expected")


@pytest.mark.parametrize("folder", [BASE, PICKLED])
def test_a_server_without_ranges(hub: MockHub, tmp_path: Path, folder: Path) -> None:
    hub.takes_ranges = False
    hub.add("org/model", folder)
    assert (
        loratool.inspect("org/model").as_json()["parameters"]
        == loratool.inspect(folder).as_json()["parameters"]
    )
    loratool.merge("org/model", [ADAPTER], tmp_path / "merged")
    loratool.merge(folder, [ADAPTER], tmp_path / "expected")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "expected")


def test_without_ranges_a_header_is_all_that_is_read(hub: MockHub, tmp_path: Path) -> None:
    sparse(tmp_path / "large", shards=2, per_shard=2, size=512 << 20)
    hub.add("org/large", tmp_path / "large")
    hub.takes_ranges = False
    assert loratool.inspect("org/large").as_json()["shards"] == 2
    assert hub.sent < 100e6


def test_a_file_that_is_not_what_was_listed(hub: MockHub, tmp_path: Path) -> None:
    """A server that sends another length than it listed is not believed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ADAPTER.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    hub.add("org/copy", copy)
    place = located("org/copy")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"0123")
    with pytest.raises(FileFormatError, match="the server sent"):
        loratool.inspect(place)


def test_names_that_lead_elsewhere_are_dropped(
    hub: MockHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    bad = ["../evil.json", "/etc/evil", "a/../../evil", "ok.json", "a\\..\\evil", "x\x1b[2J.json"]
    siblings = [{"rfilename": name, "size": 3} for name in bad]
    info = ModelInfo(id="org/evil", sha="a" * 40, siblings=siblings, private=False, tags=[])
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: info)
    place = located("org/evil")
    assert [path.name for path in place.rglob("*")] == ["ok.json"]


def test_an_adapter_whose_alphas_are_tensors(hub: MockHub, tmp_path: Path) -> None:

    (tmp_path / "kohya").mkdir()
    loratool.convert(ADAPTER, "kohya", tmp_path / "kohya" / "a.safetensors", base=BASE)
    hub.add("org/kohya", tmp_path / "kohya")
    found, expected = (
        loratool.inspect(path, spectrum=True).as_json()
        for path in ("org/kohya", tmp_path / "kohya")
    )
    assert found["modules"] == expected["modules"]
    assert np.isfinite(found["modules"][0]["frobenius_norm"])


def run(hub: MockHub, *args: object, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, **more}
    return subprocess.run(
        [sys.executable, "-m", "loratool", *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line(hub: MockHub, tmp_path: Path) -> None:
    dry = run(
        hub, "merge", "org/base", "hf://org/lora", "-o", tmp_path / "m", "--dry-run", "--json"
    )
    said = json.loads(dry.stdout)
    assert said["hub"]["base"]["commit"] == "a" * 40 and said["bytes_to_fetch"] > 10_000
    done = run(hub, "merge", "org/base", "org/lora", "-o", tmp_path / "m")
    assert done.returncode == 0
    assert done.stderr.splitlines()[0].startswith("fetching 5 files, 14.7 kB, of org/base@aaaaaaaa")
    assert "%|" not in done.stderr  # no bars outside of a terminal
    quiet = run(hub, "merge", "org/base", "org/lora", "-o", tmp_path / "q", "-q")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    shown = run(hub, "inspect", "org/lora", HF_HUB_CACHE=str(tmp_path / "other"))
    assert "org/lora@aaaaaaaa" in shown.stdout and "/tmp" not in shown.stdout
    failed = run(hub, "inspect", "org/base/config.json", HF_HUB_CACHE=str(tmp_path / "other"))
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "loratool-hub-" not in failed.stderr


def test_the_error_of_a_verb_is_one_line(hub: MockHub) -> None:
    failed = run(hub, "merge", "org/nothing", "org/lora", "-o", "out")
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 2
    assert failed.stderr.startswith("error: org/nothing: ")


def test_all_errors_are_ours(hub: MockHub) -> None:
    with pytest.raises(LoratoolError):
        loratool.merge("org/gone", ["org/lora"], "out")


def test_an_interruption_does_not_wait_for_gigabytes(hub: MockHub, tmp_path: Path) -> None:
    sparse(tmp_path / "large", shards=2, per_shard=1, size=256 << 20)
    hub.add("org/large", tmp_path / "large")
    key = "base_model.model.model.layers.0.mlp.down_proj"
    factors = {f"{key}.lora_A.weight": torch.ones(1, 1024)}
    factors[f"{key}.lora_B.weight"] = torch.ones((256 << 20) // 2048, 1)
    save_file(factors, tmp_path / "a.safetensors")
    hub.pause = 0.02
    inputs = ["merge", "org/large", tmp_path / "a.safetensors", "--alpha", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loratool", *map(str, inputs), "-o", str(tmp_path / "out")],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("fetching 4 files, 537 MB")
    while hub.sent < 20 << 20:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - start < 4
    assert process.returncode == 130
    assert told.splitlines() == ["error: loratool: interrupted; nothing was written"]
    assert not list(Path(os.environ["HF_HUB_CACHE"]).rglob("*.incomplete"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_changed_in_place_that_is_elsewhere(hub: MockHub) -> None:
    with pytest.raises(OutputError, match="is not on this disk"):
        loratool.metadata("org/lora", set={"a": "b"}, in_place=True)


def test_a_recipe_finds_the_commit_again(hub: MockHub, tmp_path: Path) -> None:
    loratool.merge("org/base", ["org/lora"], tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "loratool.json").read_text())
    assert [each["name"] for each in record["inputs"]] == [
        f"org/base@{'a' * 40}",
        f"org/lora@{'a' * 40}",
    ]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model: org/base" in card and "# org/base + org/lora" in card
    assert located(record["inputs"][0]["name"]).is_dir()


class _Sibling:
    def __init__(self, name: str, size: object) -> None:
        self.rfilename, self.size = name, size


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ([("a.safetensors", 10), ("a.safetensors/x", 3)], ["a.safetensors/x"]),
        ([("a.safetensors/x", 3), ("a.safetensors", 10)], ["a.safetensors/x"]),
        ([("x" * 300, 10), ("a", 1)], ["a"]),
        ([("a", -5), ("b", "12"), ("c", 10**19)], ["c"]),
        ([("../../x", 3), ("/etc/passwd", 3), ("a\x1b[31m", 3), ("b", 3)], ["b"]),
    ],
)
def test_lists_that_no_disk_can_hold(
    hub: MockHub,
    monkeypatch: pytest.MonkeyPatch,
    listed: list[tuple[str, object]],
    there: list[str],
) -> None:
    class Said:
        sha = "b" * 40
        siblings = [_Sibling(*each) for each in listed]  # noqa: RUF012

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_args, **_more: Said)
    root = located("evil/listed")
    assert [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()] == there


def test_who_answers_otherwise_than_a_hub(
    hub: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mock_hub.json.dumps", lambda _said: "<html>log in first</html>")
    hub.add("org/page", tmp_path)
    with pytest.raises(HubError, match="answers otherwise than a hub does") as told:
        located("org/page")
    assert "HF_ENDPOINT" in (told.value.hint or "")


def test_what_a_model_lacks_is_told_with_what_it_has(hub: MockHub) -> None:
    hub.add("org/held", ADAPTER)
    with pytest.raises(HubError) as near:
        located("org/held/adapter_modl.safetensors")
    assert near.value.hint == "did you mean 'adapter_model.safetensors'?"
    with pytest.raises(HubError) as far:
        located("org/held/zzz")
    assert "'adapter_config.json'" in (far.value.hint or "")


def test_no_more_is_read_than_was_asked_for() -> None:
    def endless() -> Iterator[bytes]:
        yield from (b"12345", b"67890")
        raise AssertionError

    assert remote._beginning(endless(), 7) == b"1234567"


def test_what_is_in_the_cache_is_called_as_on_the_hub(hub: MockHub) -> None:
    hub.add("org/called", ADAPTER)
    said = [str(loratool.inspect("org/called")).splitlines()[0]]
    place = in_cache(Path(os.environ["HF_HUB_CACHE"]), "org/called", ADAPTER, commit="a" * 40)
    said.append(str(loratool.inspect("org/called")).splitlines()[0])
    assert said == ["adapter     org/called@aaaaaaaa"] * 2
    many = loratool.inspect_many(["org/called", ADAPTER])
    assert "org/called@aaaaaaaa" in str(many)
    assert "snapshots" not in str(many)
    assert loratool.inspect("org/called").as_json()["path"] == str(place)


def test_a_mistaken_path_is_none_of_the_hubs(hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "WAIT", 0.0)
    monkeypatch.setattr(remote, "TRIES", 1)
    for name, is_told in (("some/path", False), ("hf://some/path", True)):
        with pytest.raises(HubError, match="cannot be reached") as told:
            located(name)
        assert ("no such file or folder, and" in str(told.value)) is not is_told
