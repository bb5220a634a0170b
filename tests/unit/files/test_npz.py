"""NumPy's archives, as numpy itself writes them, and damaged ones."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.container import read_bytes
from loratool.files.containers import container_of, open_weights
from loratool.values.arrays import decode


def header(text: str, version: int = 1) -> bytes:
    data = text.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(data)) + data


def archive(path: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as target:
        for name, data in entries.items():
            target.writestr(name, data)
    return path


def npy(values: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(values))
    return stream.getvalue()


def test_what_numpy_writes(tmp_path: Path) -> None:
    values = {
        "a": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "half": np.arange(4).astype(np.float16),
        "number": np.array(2.5),
        "cube": np.asfortranarray(np.arange(24, dtype=np.int32).reshape(2, 3, 4)),
        "none": np.zeros((0, 3), dtype=np.float32),
        "naïve": np.arange(3, dtype=np.int64),
    }
    np.savez(tmp_path / "x.npz", **values)
    file = open_weights(tmp_path / "x.npz")
    assert list(file.tensors) == list(values)
    for name, value in values.items():
        found = decode(file.tensors[name])
        assert found.shape == value.shape
        assert np.array_equal(found, value)


def test_bits_of_bfloat16(tmp_path: Path) -> None:
    bits = (np.array([1.0, -2.5], dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    archive(tmp_path / "x.npz", {"w.npy": npy(bits.view("V2"))})
    (stored,) = open_weights(tmp_path / "x.npz").tensors.values()
    assert stored.spec.dtype == "BF16"
    assert decode(stored).tolist() == [1.0, -2.5]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"w.npy": npy(np.array([{}], dtype=object))}, "Python objects"),
        ({"w.npy": npy(np.zeros(2, dtype=">f4"))}, "big-endian"),
        ({"w.npy": npy(np.zeros(2, dtype=[("x", "f4")]))}, "no plain array"),
        ({"w.npy": npy(np.zeros(2, dtype=np.complex64))}, "not read"),
        ({"w.npy": npy(np.zeros(2))[:-1]}, "not as long"),
        ({"w.npy": npy(np.zeros(2)) + b"x"}, "not as long"),
        ({"w.npy": b"text"}, "no array of NumPy's"),
        ({"data.pkl": b"\x80\x02}."}, "no array"),
        ({"w.npy": header("{'descr': __import__('os'), 'fortran_order': False}")}, "no plain"),
        (
            {
                "w.npy": header(
                    "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999,)}"
                )
            },
            "no plausible",
        ),
    ],
)
def test_what_is_not_read(entries: dict[str, bytes], words: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=words):
        open_weights(archive(tmp_path / "x.npz", entries))


def test_damage_is_said(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", {"w.npy": npy(np.zeros((4, 4)))})
    whole = path.read_bytes()
    for cut in (0, 3, 40, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError):
            open_weights(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            tensors = open_weights(path).tensors
        except FileFormatError:
            continue
        for stored in tensors.values():
            decode(stored)


def test_an_adapter_of_mlx(tmp_path: Path) -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
    name = "model.layers.0.self_attn.q_proj"
    np.savez(tmp_path / "adapters.npz", **{f"{name}.lora_a": a, f"{name}.lora_b": b.T})
    adapter = loratool.open_adapter(tmp_path / "adapters.npz")
    assert adapter.scheme == "mlx"
    loratool.convert(tmp_path / "adapters.npz", "module-path", tmp_path / "a.safetensors", alpha=8)
    made = load_file(tmp_path / "a.safetensors")
    delta = made[f"{name}.lora_B.weight"].astype(float) @ made[f"{name}.lora_A.weight"]
    assert np.allclose(delta, 2 * (a.astype(float) @ b.T).T, atol=1e-6)
    with pytest.raises(UnsupportedError, match=r"\.npz"):
        container_of(".npz").lay_out([], {}, "x.npz")


def test_compressed_arrays_are_unpacked_when_they_are_read(tmp_path: Path) -> None:
    arrays = {
        "a": np.random.default_rng(0).normal(size=(300, 70)),
        "turned": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "zeros": np.zeros((500, 500), np.float16),
        "none": np.zeros((0, 4)),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = open_weights(tmp_path / "x.npz").tensors
    assert {name: stored.spec.shape for name, stored in found.items()} == {
        name: value.shape for name, value in arrays.items()
    }
    for name, value in arrays.items():
        assert read_bytes(found[name]) == np.ascontiguousarray(value).tobytes()
    part = found["a"].rows(10, 2, 70)
    assert part is not None and read_bytes(part) == arrays["a"][10:12].tobytes()
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(FileFormatError, match="changed"):
        read_bytes(found["a"])


def test_what_is_compressed_and_damaged(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 20)).round(1)
    np.savez_compressed(tmp_path / "x.npz", w=values)
    whole = (tmp_path / "x.npz").read_bytes()
    for at in range(0, len(whole), 3):
        (tmp_path / "y.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            (stored,) = open_weights(tmp_path / "y.npz").tensors.values()
            assert read_bytes(stored) == values.tobytes()
        except FileFormatError:
            continue


def test_what_would_grow_beyond_belief_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.files.zip_entries.MOST", 1 << 16)
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros(1 << 14))
    with pytest.raises(FileFormatError, match="not believed"):
        open_weights(tmp_path / "x.npz")
