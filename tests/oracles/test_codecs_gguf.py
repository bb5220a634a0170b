"""Blocks of GGUF against the ``gguf`` package, which computes as llama.cpp does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coded.gguf import blocks

from loratool.codecs.codec import CodedTensor, Description, codec_named, recognise
from loratool.codecs.gguf import BY_LIBRARY, WRITTEN
from loratool.codecs.weights import read_matrix
from loratool.files.containers import open_weights
from loratool.files.dtypes import BLOCKS, DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec

gguf = pytest.importorskip("gguf")
UNREAD = {"Q8_K", "Q1_0"}
TYPES = sorted({dtype.name for dtype in BLOCKS} - UNREAD)


def stored_in(path: Path, values: np.ndarray, dtype: str) -> dict[str, StoredTensor]:
    """Write a file with one tensor by the package, and read it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w.weight", values, raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(open_weights(path).tensors)


def coded_in(path: Path, values: np.ndarray, dtype: str) -> CodedTensor:
    (coded,) = recognise(stored_in(path, values, dtype), Description()).values()
    return coded


def test_blocks_are_as_long_as_there() -> None:
    for dtype in BLOCKS:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype.name]] == dtype.block
    from loratool.files.gguf import TYPES as numbers

    known = {kind.name: kind.value for kind in gguf.GGMLQuantizationType}
    assert numbers == {name: value for name, value in known.items() if name != "Q8_1"}


@pytest.mark.parametrize("dtype", TYPES)
def test_blocks_are_decoded_as_there(dtype: str, tmp_path: Path) -> None:
    raw = blocks(dtype, 7, 3, seed=1)
    if dtype == "IQ1_M":  # its scale is in pieces
        raw.reshape(-1, 56)[:, 48:] &= 0x0F
        raw.reshape(-1, 56)[:, 55] |= 0x20
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[dtype])
    assert np.isfinite(expected).all() and expected.any()
    found = read_matrix(coded_in(tmp_path / "x.gguf", raw, dtype), InputFiles({}))
    np.testing.assert_array_equal(found.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", sorted(WRITTEN))
def test_blocks_are_written_as_there(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    values[1, :64] = 0
    values[2] *= 1e-4
    expected = gguf.quantize(values, gguf.GGMLQuantizationType[dtype])
    coded = coded_in(tmp_path / "x.gguf", expected, dtype)
    first, codes = coded.codec.encoder(coded).encode(2, 6, values[2:].astype(np.float64))["weight"]
    assert first == 2 and np.array_equal(codes, expected[2:])
    # What was read is written back to the same bytes, but for signs of zero and tiny scales.
    decoded = read_matrix(coded, InputFiles({}))
    again = coded.codec.encoder(coded).encode(0, 6, decoded)["weight"][1]
    assert np.array_equal(again[3:], expected[3:])


def test_what_the_package_has_no_formula_for_is_known() -> None:
    from gguf.quants import _type_traits

    read = {kind.name for kind in _type_traits}
    assert {dtype.name for dtype in BLOCKS} - read == UNREAD
    assert set(BY_LIBRARY) <= read
    assert set(codec_named("gguf").name) and DTYPES["Q1_0"].block == (128, 18)


def test_names_and_shapes_are_those_of_there(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("llama.rope.freq_base", 1e6)
    writer.add_token_list(["a", "ü", "c" * 300] * 40)
    writer.add_array("llama.attention.head_count_kv", [4, 2])
    writer.add_tensor("a.weight", np.zeros((2, 3, 5), np.float32))
    writer.add_tensor("b.weight", np.zeros((7,), np.float16))
    writer.add_tensor(
        "c.weight", np.zeros((3, 36), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_weights(path)
    assert [stored.spec for stored in found.tensors.values()] == [
        TensorSpec("a.weight", "F32", (2, 3, 5)),
        TensorSpec("b.weight", "F16", (7,)),
        TensorSpec("c.weight", "Q4_0", (3, 64)),
    ]
    there = {one.name: one.data_offset for one in gguf.GGUFReader(path).tensors}
    assert there == {name: stored.offset for name, stored in found.tensors.items()}
    assert found.metadata == {
        "general.architecture": "llama",
        "llama.rope.freq_base": "1000000.0",
        "llama.attention.head_count_kv": "[4, 2]",
    }
