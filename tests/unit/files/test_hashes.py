"""Hashes of a file, against their definitions applied to all of its bytes at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratool.errors import UnreadableError
from loratool.files.hashes import hashes_of


@pytest.mark.parametrize("elements", [10, 300_000])
def test_a_safetensors_file(tmp_path: Path, elements: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(elements, dtype=torch.float32)}, path, metadata={"x": "y" * 99})
    data = path.read_bytes()
    whole = hashlib.sha256(data).hexdigest()
    header = int.from_bytes(data[:8], "little")
    assert hashes_of(path) == {
        "sha256": whole,
        "AutoV1": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "AutoV2": whole[:10],
        "AutoV3": hashlib.sha256(data[8 + header :]).hexdigest(),
    }


def test_metadata_do_not_change_the_hash_of_the_tensors(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"a": torch.ones(4)}, tmp_path / f"{name}.safetensors", metadata={"name": name})
    one, other = (hashes_of(tmp_path / f"{name}.safetensors") for name in ("a", "b"))
    assert one["AutoV3"] == other["AutoV3"]
    assert one["AutoV2"] != other["AutoV2"]


def test_other_files_have_no_header(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    assert "AutoV3" not in hashes_of(path)
    with pytest.raises(UnreadableError):
        hashes_of(tmp_path / "nothing")
