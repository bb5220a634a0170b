"""Safetensors headers: every rule of the format, and bytes equal to the reference writer's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratool.errors import FileFormatError
from loratool.files.safetensors import canonical_order, format_header, read_header


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def field(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty file": (b"", "empty"),
    "seven bytes": (b"1234567", "not a safetensors"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS"),
    "a web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "a zip": (b"PK\x03\x04" + b"\0" * 60, "torch pickle"),
    "a header longer than the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "a header of terabytes": (struct.pack("<Q", 1 << 60) + b"{}", "claims"),
    "a header that is a list": (struct.pack("<Q", 2) + b"[]", "not a safetensors"),
    "a header that is not JSON": (struct.pack("<Q", 3) + b"{a}", "not valid JSON"),
    "a header that is not UTF-8": (struct.pack("<Q", 5) + b'{"\xff"}', "not UTF-8"),
    "nested JSON": (struct.pack("<Q", 99_999) + b'{"a":' + b"[" * 99_994, "nested|valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    data, words = BROKEN[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=words):
        read_header(path)


WRONG_FIELDS = {
    "unknown dtype": (field("F99"), 8),
    "dtype of another type": (field(7), 8),
    "negative shape": (field(shape=[-2]), 8),
    "fractional shape": (field(shape=[2.0]), 8),
    "boolean shape": (field(shape=[True, 2]), 8),
    "shape of another type": (field(shape="2"), 8),
    "overflowing shape": (field(shape=[1 << 61, 1 << 61]), 8),
    "too few offsets": (field(offsets=[0]), 8),
    "offsets backwards": (field(offsets=[8, 0]), 8),
    "size that disagrees": (field(shape=[3]), 8),
    "hole at the start": (field(offsets=[4, 12]), 12),
    "data missing": (field(), 4),
    "trailing bytes": (field(), 9),
    "not an object": ([1, 2], 8),
    "half a byte": (field("F4", [1], [0, 1]), 1),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_fields_that_break_a_rule_are_refused(name: str, tmp_path: Path) -> None:
    value, size = WRONG_FIELDS[name]
    path = write(tmp_path / "x.safetensors", {"t": value}, b"\0" * size)
    with pytest.raises(FileFormatError):
        read_header(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"a": field(), "b": field(offsets=(4, 12))},
        {"a": field(), "b": field(offsets=(12, 20))},
        {"__metadata__": {"a": 1}, "b": field()},
        {"__metadata__": [], "b": field()},
    ],
    ids=["overlap", "hole", "metadata number", "metadata list"],
)
def test_tables_that_break_a_rule_are_refused(fields: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", fields, b"\0" * 16)
    with pytest.raises(FileFormatError):
        read_header(path)


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    one = json.dumps(field())
    path = write(tmp_path / "x.safetensors", f'{{"a":{one},"a":{one}}}'.encode(), b"\0" * 8)
    with pytest.raises(FileFormatError, match="twice"):
        read_header(path)


def test_scalars_empty_tensors_and_strange_names_are_fine(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "naïve ключ": torch.ones(2, dtype=torch.int64),
        "": torch.ones(1, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_header(tmp_path / "x.safetensors")
    assert {name: stored.spec.shape for name, stored in read.tensors.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_headers_are_those_of_the_reference_writer(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in contents.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except UnicodeEncodeError:
        return
    read = read_header(path)
    specs = [stored.spec for stored in read.tensors.values()]
    assert canonical_order(reversed(specs)) == specs
    assert format_header(specs, {"format": "pt"}) == read.header


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([10] * 400, "impossible shape"),
        ([1] * 65, "impossible shape"),
        ([1 << 61, 8], "impossible"),
    ],
)
def test_absurd_shapes_are_refused(shape: list[int], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"t": field(shape=shape)}, b"\0" * 8)
    with pytest.raises(FileFormatError, match=words):
        read_header(path)


def test_headers_of_millions_of_tensors_are_refused_unread(tmp_path: Path) -> None:
    for text in (b'{"a":' + b"[" * 3_000_000, b"{" * 3_000_000):
        path = write(tmp_path / "x.safetensors", text)
        with pytest.raises(FileFormatError, match="more than"):
            read_header(path)
