"""Outputs in a store: the bytes of one on the disk, little traffic, and nothing half done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from counted_store import Counted, counted_store
from safetensors.numpy import load_file, save_file
from samples import FIXTURES

import loratool
from loratool.errors import LoratoolError, OptionError, OutputError, OutputExistsError, StoreError
from loratool.files.places import forget_stand_ins, located

BASE = FIXTURES / "bases" / "llama-untied"
ADAPTER = FIXTURES / "adapters" / "lora-linear"
KEYS = {"AWS_ACCESS_KEY_ID": "key-id", "AWS_SECRET_ACCESS_KEY": "very-secret"}
RECORDS = ("README.md", "loratool.json")
"""What says where the inputs came from."""
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Counted]]:
    with counted_store() as found:
        yield found


class Bucket:
    """A bucket, and what the store counts."""

    def __init__(self, address: str, counted: Counted) -> None:
        self.counted = counted
        self.client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        self.name = f"bucket-{os.urandom(4).hex()}"
        self.client.create_bucket(Bucket=self.name)

    def address(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def send(self, folder: Path, key: str) -> str:
        for path in folder.iterdir():
            self.client.upload_file(str(path), self.name, f"{key}/{path.name}")
        return self.address(key)

    def put(self, key: str, data: bytes = b"x") -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def files(self, prefix: str = "") -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", ())
        return {
            each["Key"].removeprefix(prefix): self.client.get_object(
                Bucket=self.name, Key=each["Key"]
            )["Body"]._raw_stream.read()
            for each in found
        }

    @property
    def unfinished(self) -> int:
        return len(self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ()))


@pytest.fixture
def bucket(
    served: tuple[str, Counted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    address, counted = served
    settings = {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": address}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = Bucket(address, counted)
    counted.reset()
    yield found
    counted.failing = lambda *_: None
    found.client.close()
    forget_stand_ins()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}


def but_records(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in RECORDS}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 40 MiB in one file, of which an adapter changes 4, and that adapter."""
    folder = tmp_path_factory.mktemp("large")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    random = np.random.default_rng(0)
    tensors = {
        f"model.layers.0.{name}.weight": random.integers(
            0, 0x3F80, (rows, 1024), dtype=np.uint16
        ).view(np.float16)
        for name, rows in (
            ("mlp.down_proj", 9000),
            ("self_attn.q_proj", 2048),
            ("self_attn.z_norm", 8),
            ("z_last", 9000),
        )
    }
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    (base / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{key}.lora_A.weight": random.standard_normal((2, 1024), dtype=np.float32),
        f"{key}.lora_B.weight": random.standard_normal((2048, 2), dtype=np.float32),
    }
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


@pytest.mark.parametrize("is_far", [False, True])
def test_a_merge_has_the_bytes_of_one_on_the_disk(
    bucket: Bucket, tmp_path: Path, is_far: bool
) -> None:
    base: str | Path = bucket.send(BASE, "base") if is_far else BASE
    report = loratool.merge(base, [ADAPTER], bucket.address("a/merged/"))
    loratool.merge(BASE, [ADAPTER], tmp_path / "merged")
    assert report.as_json()["output"] == bucket.address("a/merged")
    made, wanted = bucket.files("a/merged/"), files_of(tmp_path / "merged")
    assert but_records(made) == but_records(wanted) and made.keys() == wanted.keys()
    if not is_far:
        assert made == wanted  # records too: the same inputs
    assert not bucket.unfinished
    assert not loratool.verify(bucket.address("a/merged"), base=base, adapters=[ADAPTER])


def test_untouched_bytes_are_copied_by_the_store(
    bucket: Bucket, large: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = bucket.send(large[0], "base"), large[1]
    size, changed = (large[0] / WEIGHTS).stat().st_size, 2048 * 1024 * 2
    planned = loratool.merge(base, [adapter], bucket.address("out"), dry_run=True).as_json()
    assert not bucket.files("out/")
    bucket.counted.reset()
    loratool.merge(base, [adapter], bucket.address("out"))
    counted = bucket.counted
    assert counted.requests["copy part"] == 2 and counted.requests["copy"] == 1
    assert changed <= counted.sent < changed + (1 << 20) + 20_000  # of 4 MiB a part of 5 MiB
    assert counted.read < 5 * (1 << 20) + 400_000
    assert counted.copied + counted.sent > size
    told = planned["transfer"]
    assert told["bytes_copied"] + told["bytes_sent"] >= size
    assert abs(told["bytes_sent"] - counted.sent) < 20_000
    assert told["bytes_read"] <= counted.read
    loratool.merge(large[0], [adapter], tmp_path / "out")
    assert but_records(bucket.files("out/")) == but_records(files_of(tmp_path / "out"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_base_on_the_disk_is_sent(
    bucket: Bucket, large: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = large
    loratool.merge(base, [adapter], bucket.address("out/"))
    loratool.merge(base, [adapter], tmp_path / "out")
    assert bucket.files("out/") == files_of(tmp_path / "out")
    assert bucket.counted.requests["put part"] >= 4


def test_one_file(bucket: Bucket, large: tuple[Path, Path], tmp_path: Path) -> None:
    """Whose header says how it was made, which is known in the end."""
    base, adapter = large
    output = bucket.address("deep/er/out.safetensors")
    loratool.merge(base / WEIGHTS, [adapter], output)
    loratool.merge(base / WEIGHTS, [adapter], tmp_path / "out.safetensors")
    assert bucket.files() == {
        "deep/er/out.safetensors": (tmp_path / "out.safetensors").read_bytes()
    }
    assert not loratool.verify(output, base=base / WEIGHTS, adapters=[adapter])


def test_archives_are_staged(bucket: Bucket, tmp_path: Path) -> None:
    loratool.convert(ADAPTER, "prefixed", bucket.address("out.bin"))
    loratool.convert(ADAPTER, "prefixed", tmp_path / "out.bin")
    assert bucket.files() == {"out.bin": (tmp_path / "out.bin").read_bytes()}


def test_a_large_adapter_is_sent_in_parts(bucket: Bucket, tmp_path: Path) -> None:
    tensors = {
        "base_model.model.q.lora_A.weight": np.ones((512, 6000), np.float32),
        "base_model.model.q.lora_B.weight": np.ones((64, 512), np.float32),
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 512, "lora_alpha": 2, "target_modules": ["q"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    loratool.rescale(adapter, bucket.address("out"), alpha=1.0)
    loratool.rescale(adapter, tmp_path / "out", alpha=1.0)
    assert bucket.files("out/") == files_of(tmp_path / "out")
    assert bucket.counted.requests["put part"] == 2


def test_verbs_that_write_an_adapter(bucket: Bucket, tmp_path: Path) -> None:
    adapter = bucket.send(ADAPTER, "lora")
    made = bucket.address("made")
    reports = [
        loratool.convert(adapter, "kohya", f"{made}/kohya.safetensors"),
        loratool.rescale(adapter, f"{made}/rescaled", scale=0.5),
        loratool.truncate(adapter, f"{made}/truncated/", rank=1),
        loratool.compose([adapter, adapter], f"{made}/composed"),
        loratool.metadata(adapter, output=f"{made}/said", set={"author": "me"}),
    ]
    outputs = [report.as_json()["output"] for report in reports]
    names = ("kohya.safetensors", "rescaled", "truncated", "composed", "said")
    assert outputs == [f"{made}/{name}" for name in names]
    for output in outputs:
        assert loratool.inspect(output).as_json()["modules"]
    loratool.rescale(ADAPTER, tmp_path / "rescaled", scale=0.5)
    told = files_of(tmp_path / "rescaled")
    assert bucket.files("made/rescaled/").keys() == told.keys()
    wanted = told["adapter_config.json"]
    assert bucket.files("made/rescaled/")["adapter_config.json"] == wanted
    assert (
        bucket.files("made/said/")["adapter_config.json"]
        == (ADAPTER / "adapter_config.json").read_bytes()
    )


def test_what_is_there_is_not_overwritten(bucket: Bucket) -> None:
    output = bucket.address("out")
    bucket.put("out/old.safetensors")
    bucket.put("out/model.safetensors.index.json")
    bucket.put("outside/other.txt")
    before = bucket.files()
    for verb in (
        lambda: loratool.merge(BASE, [ADAPTER], output),
        lambda: loratool.truncate(ADAPTER, output, rank=1),
        lambda: loratool.merge(BASE, [ADAPTER], bucket.address("out/old.safetensors")),
    ):
        with pytest.raises((OutputExistsError, OptionError, OutputError)):
            verb()
    assert bucket.files() == before
    loratool.merge(BASE, [ADAPTER], output, force=True)
    made = bucket.files()
    assert "out/old.safetensors" not in made and made["outside/other.txt"] == b"x"
    assert not loratool.verify(output, base=BASE, adapters=[ADAPTER])


def test_somebodys_work_is_not_replaced(bucket: Bucket) -> None:
    bucket.put("out/thesis.tex")
    bucket.put("out/model.safetensors")
    with pytest.raises(OutputExistsError, match=r"it holds thesis\.tex"):
        loratool.merge(BASE, [ADAPTER], bucket.address("out"), force=True)


@pytest.mark.parametrize("inside", ["base", "", "base/merged", "base/config.json"])
def test_an_input_is_never_touched(bucket: Bucket, inside: str) -> None:
    base = bucket.send(BASE, "base")
    before = bucket.files()
    with pytest.raises((OutputError, OptionError), match=r"would overwrite|\.json"):
        loratool.merge(base, [ADAPTER], bucket.address(inside), force=True)
    assert bucket.files() == before


def test_what_appears_meanwhile_stays(bucket: Bucket) -> None:
    """After the first look: the store itself refuses to write over it."""
    key = "out/model-00002-of-00002.safetensors"

    def appear(kind: str, path: str, environ: dict[str, Any]) -> None:
        if kind == "begin":
            bucket.counted.failing = lambda *_: None
            bucket.put(key, b"theirs")

    bucket.counted.failing = appear
    with pytest.raises(OutputExistsError, match="has appeared meanwhile"):
        loratool.merge(BASE, [ADAPTER], bucket.address("out"))
    assert bucket.files("out/") == {"model-00002-of-00002.safetensors": b"theirs"}
    assert not bucket.unfinished


@pytest.mark.parametrize("kind", ["put part", "end", "put", "begin"])
def test_a_failure_leaves_nothing(bucket: Bucket, kind: str) -> None:
    bucket.counted.failing = lambda asked, *_: 403 if asked == kind else None
    with pytest.raises(StoreError, match="refuses access") as caught:
        loratool.merge(BASE, [ADAPTER], bucket.address("out"))
    assert "very-secret" not in repr(caught.value) and "key-id" not in repr(caught.value)
    bucket.counted.failing = lambda *_: None
    assert not bucket.files() and not bucket.unfinished


def test_an_index_that_fails_is_not_there(bucket: Bucket) -> None:
    bucket.counted.failing = lambda _, path, __: 403 if path.endswith("index.json") else None
    with pytest.raises(StoreError):
        loratool.merge(BASE, [ADAPTER], bucket.address("out"))
    bucket.counted.failing = lambda *_: None
    assert not bucket.files()


def test_the_order_in_which_files_appear(bucket: Bucket) -> None:
    seen: list[str] = []

    def note(kind: str, path: str, environ: dict[str, Any]) -> None:
        if kind in ("end", "put", "copy"):
            seen.append(path.rpartition("/")[2])

    bucket.counted.failing = note
    loratool.merge(BASE, [ADAPTER], bucket.address("out"))
    assert seen[-1] == "model.safetensors.index.json"
    assert all(name.endswith(".safetensors") for name in seen[-3:-1])
    assert not any(name.endswith(".safetensors") for name in seen[:-3])


def test_a_merge_that_changes_nothing_leaves_nothing(bucket: Bucket, tmp_path: Path) -> None:
    zero = tmp_path / "zero"
    zero.mkdir()
    name = "adapter_model.safetensors"
    found = load_file(ADAPTER / name)
    save_file({k: np.zeros_like(v) for k, v in found.items()}, zero / name, {"format": "pt"})
    (zero / "adapter_config.json").write_bytes((ADAPTER / "adapter_config.json").read_bytes())
    with pytest.raises(LoratoolError, match="exactly zero"):
        loratool.merge(BASE, [zero], bucket.address("out"))
    assert not bucket.files() and not bucket.unfinished


def test_a_busy_server_is_asked_again(bucket: Bucket) -> None:
    """By the libraries that make the requests, for reading and for writing."""
    base = bucket.send(BASE, "base")
    left = {kind: [503, 500] for kind in ("put part", "end", "get", "put")}
    bucket.counted.failing = lambda kind, *_: left[kind].pop() if left.get(kind) else None
    loratool.merge(base, [ADAPTER], bucket.address("out"))
    assert not any(left.values())
    assert not loratool.verify(bucket.address("out"), base=BASE, adapters=[ADAPTER])


def test_a_base_that_is_exchanged_while_it_is_copied(
    bucket: Bucket, large: tuple[Path, Path]
) -> None:
    base = bucket.send(large[0], "base")
    data = bytearray((large[0] / WEIGHTS).read_bytes())
    data[-1] ^= 1

    def exchange(kind: str, path: str, environ: dict[str, Any]) -> None:
        if kind == "copy part":
            bucket.counted.failing = lambda *_: None
            bucket.put(f"base/{WEIGHTS}", bytes(data))

    bucket.counted.failing = exchange
    with pytest.raises(StoreError, match="exchanged while it was read"):
        loratool.merge(base, [large[1]], bucket.address("out"))
    assert not bucket.files("out/") and not bucket.unfinished


def test_copies_name_the_tag_that_was_read(bucket: Bucket, large: tuple[Path, Path]) -> None:
    base, seen = bucket.send(large[0], "base"), []

    def note(kind: str, path: str, environ: dict[str, Any]) -> None:
        if kind.startswith("copy"):
            seen.append(environ.get("HTTP_X_AMZ_COPY_SOURCE_IF_MATCH"))

    bucket.counted.failing = note
    loratool.merge(base, [large[1]], bucket.address("out"))
    head = bucket.client.head_object(Bucket=bucket.name, Key=f"base/{WEIGHTS}")
    assert seen.count(head["ETag"]) == 2 and None not in seen


def test_a_hostile_listing(bucket: Bucket) -> None:
    """Keys that lead out of a folder are no files."""
    base = bucket.send(BASE, "base")
    for key in ("base/a\\b.json", "base/\u202ered.json", f"base/{'x' * 300}.json"):
        bucket.put(key)
    place = located(base)
    assert sorted(path.name for path in place.rglob("*")) == sorted(
        path.name for path in BASE.iterdir()
    )
    loratool.merge(base, [ADAPTER], bucket.address("out"))
    assert not loratool.verify(bucket.address("out"), base=BASE, adapters=[ADAPTER])


@pytest.mark.parametrize("key", ["base/../../up.safetensors", "base/\x1b[31mred", "base//two"])
def test_a_listing_that_is_refused(bucket: Bucket, key: str) -> None:
    base = bucket.send(BASE, "base")
    bucket.put(key)
    with pytest.raises(StoreError, match="holds a name that is no path"):
        located(base)


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("gs://bucket/x", "outputs go to the disk or to s3://"),
        ("az://container/x", "outputs go to the disk or to s3://"),
        ("https://example.com/x", "outputs go to the disk or to s3://"),
        ("hf://org/name", "outputs go to the disk or to s3://"),
        ("s3://bucket/../x", "is no address of an output"),
        ("s3://bucket/a//b", "is no address of an output"),
        ("s3://bucket/\x1b[31m", "is no address of an output"),
    ],
)
def test_addresses_that_nothing_is_written_to(output: str, what: str) -> None:
    with pytest.raises(OutputError, match=what):
        loratool.merge(BASE, [ADAPTER], output, dry_run=True)


def test_without_boto3(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StoreError) as caught:
        loratool.merge(BASE, [ADAPTER], bucket.address("out"))
    assert "loratool[remote]" in str(caught.value.hint)


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    with pytest.raises(StoreError, match="there is no such bucket"):
        loratool.merge(BASE, [ADAPTER], "s3://no-such-bucket-here/out")


def test_no_credentials_anywhere(bucket: Bucket) -> None:
    base, adapter = bucket.send(BASE, "base"), bucket.send(ADAPTER, "lora")
    report = loratool.merge(base, [adapter], bucket.address("out"))
    texts = [json.dumps(report.as_json())]
    texts += [data.decode("latin-1") for data in bucket.files("out/").values()]
    assert not [text for text in texts if "loratool-hub-" in text]
    texts.append(repr(report))
    assert not [text for text in texts if "very-secret" in text or "key-id" in text]


def test_credentials_of_a_profile(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For reading and writing alike."""
    base = bucket.send(BASE, "base")
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    lines = ["[mine]", "aws_access_key_id = of-profile", "aws_secret_access_key = very-secret"]
    (tmp_path / "credentials").write_text("\n".join(lines))
    seen: set[bool] = set()

    def note(kind: str, path: str, environ: dict[str, Any]) -> None:
        seen.add("Credential=of-profile/" in environ.get("HTTP_AUTHORIZATION", ""))

    bucket.counted.failing = note
    loratool.merge(base, [ADAPTER], bucket.address("out"))
    assert seen == {True}


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratool", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(bucket: Bucket) -> None:
    base, output = bucket.send(BASE, "base"), bucket.address("out/")
    planned = run("merge", base, ADAPTER, "-o", output, "--dry-run")
    assert "through the network: " in planned.stdout and not bucket.files("out/")
    done = run("merge", base, ADAPTER, "-o", output, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["output"] == output.rstrip("/")
    again = run("merge", base, ADAPTER, "-o", output)
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {output.rstrip('/')}: exists already")
    checked = run("verify", output, "--base", base, "--adapter", ADAPTER)
    assert checked.returncode == 0, checked.stderr


def test_an_output_that_is_written_again_is_read_anew(bucket: Bucket) -> None:
    """In one process: what stood for the old files does not hide the new ones."""
    output = bucket.address("out")
    ranks: list[Sequence[int]] = []
    for rank in (2, 1):
        loratool.truncate(ADAPTER, output, rank=rank, force=True)
        modules = loratool.inspect(output).as_json()["modules"]
        ranks.append([module["rank"] for module in modules])
    assert set(ranks[0]) == {2} and set(ranks[1]) == {1}
