"""Models of object stores and web servers, served on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from mock_hub import mock_hub
from moto.server import ThreadedMotoServer
from samples import FIXTURES

import loratool
from loratool.errors import OptionError, StoreError
from loratool.files.container import read_bytes
from loratool.files.containers import open_weights
from loratool.files.places import forget_stand_ins, located
from loratool.files.sources import source_of

BASE = FIXTURES / "bases" / "llama-untied"
ADAPTER = FIXTURES / "adapters" / "lora-linear"
KEYS = {"AWS_ACCESS_KEY_ID": "key-id", "AWS_SECRET_ACCESS_KEY": "very-secret"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with a base and an adapter in it."""
    for name, value in {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    name = f"bucket-{os.urandom(4).hex()}"
    client.create_bucket(Bucket=name)
    for folder, key in ((BASE, "models/base"), (ADAPTER, "lora")):
        for path in folder.iterdir():
            client.upload_file(str(path), name, f"{key}/{path.name}")
    yield name
    client.close()
    forget_stand_ins()


RECORDS = ("README.md", "loratool.json")
"""What says where the inputs came from."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in RECORDS}


def test_a_merge_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    base, adapter = f"s3://{bucket}/models/base", f"s3://{bucket}/lora/"
    assert not loratool.validate(adapter, base=base)
    assert not (tmp_path / "cache").exists()  # headers alone
    loratool.merge(base, [adapter], tmp_path / "merged")
    loratool.merge(BASE, [ADAPTER], tmp_path / "expected")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "expected")
    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [name for name in kept if name.endswith(".safetensors")] == ["adapter_model.safetensors"]
    assert not [name for name in kept if name.endswith(".part")]


def test_data_are_the_stores(bucket: str) -> None:
    place = located(f"s3:/{bucket}/models/base/model-00001-of-00002.safetensors")
    assert source_of(place) is not None
    original = open_weights(BASE / place.name)
    for name, stored in open_weights(place).tensors.items():
        assert read_bytes(stored) == read_bytes(original.tensors[name]), name


def test_what_is_exchanged_meanwhile_is_an_error(bucket: str, server: str, tmp_path: Path) -> None:
    """Of the same size, so that only the entity tag tells."""
    name = "model-00002-of-00002.safetensors"
    place = located(f"s3://{bucket}/models/base")
    open_weights(place / name)
    data = bytearray((BASE / name).read_bytes())
    data[-1] ^= 1
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.put_object(Bucket=bucket, Key=f"models/base/{name}", Body=bytes(data))
    client.close()
    with pytest.raises(StoreError, match="exchanged while it was read"):
        loratool.merge(place, [ADAPTER], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_no_credentials_anywhere(bucket: str, tmp_path: Path) -> None:
    adapter = f"s3://{bucket}/lora"
    report = loratool.truncate(adapter, tmp_path / "small", rank=1)
    texts = [repr(report), *(path.read_bytes().decode("latin-1") for path in _all(tmp_path))]
    assert not [text for text in texts if "very-secret" in text or "key-id" in text]


def _all(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file())


def test_what_is_not_there(bucket: str) -> None:
    with pytest.raises(StoreError, match="there is nothing"):
        loratool.inspect(f"s3://{bucket}/models/other")
    with pytest.raises(StoreError) as caught:
        loratool.inspect("s3://no-such-bucket-here/x")
    assert "\n" not in str(caught.value) and "very-secret" not in str(caught.value)


def test_without_the_extra(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreError) as caught:
        loratool.inspect(f"s3://{bucket}/lora")
    assert "loratool[remote]" in str(caught.value.hint)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

    handler = partial(Handler, directory=str(FIXTURES))
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    forget_stand_ins()


def test_a_web_server_without_ranges(web: str) -> None:
    """Python's own server sends files whole, whatever is asked for: then they are fetched whole."""
    adapter = f"{web}/adapters/lora-linear/adapter_model.safetensors"
    modules = loratool.inspect(adapter).as_json()["modules"]
    assert modules == loratool.inspect(ADAPTER).as_json()["modules"]


def test_a_web_server_with_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with mock_hub() as server:
        server.add("x/base", BASE)
        server.add("x/lora", ADAPTER)
        base = f"{server.address}/data/x--base/model.safetensors.index.json"
        adapter = f"{server.address}/data/x--lora/adapter_model.safetensors?download=true"
        loratool.merge(base, [adapter], tmp_path / "merged")
        loratool.merge(BASE, [ADAPTER], tmp_path / "expected")
        weights = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        for name in (*weights, "config.json"):
            assert (tmp_path / "merged" / name).read_bytes() == (
                tmp_path / "expected" / name
            ).read_bytes()
    forget_stand_ins()


def test_the_command_line(bucket: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", f"s3://{bucket}/lora"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert f"s3://{bucket}/lora" in done.stdout and "/tmp" not in done.stdout


def test_datasets_and_other_things_are_no_addresses() -> None:
    with pytest.raises(OptionError):
        loratool.inspect("hf://datasets/org/name")


def test_a_server_that_refuses_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As public buckets do for those who may not list them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            if self.path.endswith("/config.json"):
                self.send_error(403)
            elif self.path.endswith("busy.safetensors"):
                self.send_error(501)
            else:
                super().do_HEAD()

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(FIXTURES)))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{http.server_port}"
    try:
        found = loratool.inspect(f"{address}/adapters/lora-linear/adapter_model.safetensors")
        assert found.as_json()["modules"] == loratool.inspect(ADAPTER).as_json()["modules"]
        with pytest.raises(StoreError, match=r"the server answers with an error \(501\)"):
            located(f"{address}/busy.safetensors")
    finally:
        http.shutdown()
        http.server_close()
        forget_stand_ins()
    with pytest.raises(StoreError, match="cannot be reached"):
        located(f"{address}/adapters/lora-linear/adapter_model.safetensors")
