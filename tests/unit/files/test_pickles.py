"""Torch pickles read as data: equal to torch's own loader, and nothing in them runs."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import contents

from loratool.errors import FileFormatError
from loratool.files.container import read_bytes
from loratool.files.dtypes import DTYPES
from loratool.files.pickles import other_contents, read_pickle

NUMPY = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "F16": torch.float16}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: torch.frombuffer(
            bytearray(read_bytes(stored)), dtype=NUMPY[stored.spec.dtype]
        ).reshape(stored.spec.shape)
        for name, stored in read_pickle(path).tensors.items()
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_equal_those_of_torch(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    original = contents()
    torch.save(original, path, _use_new_zipfile_serialization=zipped)
    read = tensors_of(path)
    expected = {key: value for key, value in original.items() if isinstance(value, torch.Tensor)}
    expected["nested.inner"] = original["nested"]["inner"]
    assert set(read) == set(expected)
    for key, value in expected.items():
        assert torch.equal(read[key], value.detach()), key
    description = read_pickle(path)
    assert description.tensors["alias"].alias_of == "plain"
    assert description.other == {"epoch": "3", "name": "run"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_dtypes_that_are_younger_than_the_format(zipped: bool, tmp_path: Path) -> None:
    """They stand beside storages of bytes, which several of them may share."""
    path = tmp_path / "x.bin"
    x = torch.arange(48, dtype=torch.uint8)
    original = {
        "u16": torch.arange(30).to(torch.uint16).reshape(5, 6)[1:4, 2:],
        "plain": torch.ones(3),
        "e4m3": x.view(torch.float8_e4m3fn).reshape(6, 8),
        "e5m2": x.view(torch.float8_e5m2).reshape(6, 8),
        "alias": x.view(torch.float8_e5m2).reshape(6, 8),
        "transposed": x.view(torch.float8_e5m2).reshape(6, 8).T,
        "u32": x.view(torch.uint32)[5:],
        "last": torch.ones(2, dtype=torch.uint64),
    }
    torch.save(original, path, _use_new_zipfile_serialization=zipped)
    read = read_pickle(path).tensors
    assert {name: DTYPES[stored.spec.dtype].torch_name for name, stored in read.items()} == {
        name: str(tensor.dtype).removeprefix("torch.") for name, tensor in original.items()
    }
    for name, tensor in original.items():
        assert read[name].spec.shape == tensor.shape
        expected = bytes(tensor.contiguous().view(torch.uint8).numpy())
        assert read_bytes(read[name]) == expected, name
    assert {name for name, stored in read.items() if stored.alias_of} == {"alias"}


def test_state_dict_of_a_module_and_wrapped_state_dicts(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "a.bin")
    torch.save({"state_dict": module.state_dict(), "epoch": 1}, tmp_path / "b.bin")
    assert set(read_pickle(tmp_path / "a.bin").tensors) == set(module.state_dict())
    wrapped = read_pickle(tmp_path / "b.bin")
    assert set(wrapped.tensors) == set(module.state_dict())
    assert other_contents(wrapped) == ("b.bin holds 1 more entries, not used: epoch",)
    assert other_contents(read_pickle(tmp_path / "a.bin")) == ()


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_is_executed(zipped: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "x.bin", tmp_path / "executed"
    torch.save({"a": torch.ones(2), "b": Evil(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match="not executed"):
        read_pickle(path)
    assert not mark.exists()


def test_plain_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    cases = {
        "plain": pickle.dumps({"a": 1}),
        "text": b"hello",
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "empty": b"",
        "list": pickle.dumps([1, 2]),
    }
    for name, data in cases.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(data)
        with pytest.raises(FileFormatError):
            read_pickle(path)


def test_damaged_files_are_refused_whatever_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(20, 20)}, path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError):
            read_pickle(path)


def test_storage_shorter_than_claimed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(64)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data[:16] if "/data/" in name else data)
    with pytest.raises(FileFormatError, match="shorter"):
        read_pickle(path)


def write_zip(path: Path, pickled: bytes, method: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3", zipfile.ZIP_STORED)
        for name, data in more.items():
            archive.writestr(f"archive/{name}", data)
    return path


def laughs(kind: str, depth: int = 40) -> bytes:
    """Return a pickle of containers that hold the one before them ten times."""
    value: Any = ["lol"]
    for _ in range(depth):
        value = [value] * 10 if kind == "list" else (value,) * 10
    return pickle.dumps({"a": value, "b": {"c": value}}, protocol=2)


@pytest.mark.parametrize(
    "pickled",
    [
        laughs("list"),
        laughs("tuple"),
        b"\x80\x02}(" + b"K\x01" * 5 + b"u.",
        b"\x80\x02}" + b"(" * 50 + b"K\x01" + b"t" * 50 + b"K\x01s.",
        b"\x80\x02}X\x01\x00\x00\x00a\x8b" + (3000).to_bytes(4, "little") + b"\x7f" * 3000 + b"s.",
        b"\x80\x02.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00aj\xff\xff\xff\x7fs.",
    ],
    ids=["lists", "tuples", "odd items", "nested key", "huge number", "empty", "huge memo"],
)
def test_absurd_descriptions_cost_nothing(pickled: bytes, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.bin", pickled)
    with contextlib.suppress(FileFormatError):
        assert not read_pickle(path).tensors


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    bomb = b"\x00" * (64 << 20)
    plain = pickle.dumps({}, protocol=2)
    for number, arguments in enumerate(
        [(bomb, zipfile.ZIP_DEFLATED, {}), (plain, zipfile.ZIP_DEFLATED, {"byteorder": bomb})]
    ):
        pickled, method, more = arguments
        path = write_zip(tmp_path / f"{number}.bin", pickled, method, **more)
        with pytest.raises(FileFormatError, match="compressed"):
            read_pickle(path)


def test_lazily_conjugated_or_negated_tensors_are_refused(tmp_path: Path) -> None:
    value = torch.randn(3, 3, dtype=torch.complex64)
    for name, tensor in (("conj", value.conj()), ("neg", value.conj().imag)):
        torch.save({"a": tensor}, tmp_path / f"{name}.bin")
        with pytest.raises(FileFormatError, match="lazily"):
            read_pickle(tmp_path / f"{name}.bin")
