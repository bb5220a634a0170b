"""What only the codec of GGUF's blocks has: stacks, what it refuses, and how it reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from coded.gguf import NAME, SCALES, blocks, samples, truth

from loratool.codecs.codec import CodedTensor, Description, recognise
from loratool.codecs.weights import read_matrix
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.dtypes import BLOCKS, DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor, TensorSpec

SAMPLES = {sample.label: sample for sample in samples()}


def coded(folder: Path, dtype: str, raw: np.ndarray, shape: tuple[int, ...]) -> CodedTensor:
    path = folder / "x"
    path.write_bytes(raw.tobytes())
    name = f"{NAME}.weight"
    stored = {name: StoredTensor(TensorSpec(name, dtype, shape), path, 0)}
    return recognise(stored, Description())[NAME]


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)


@pytest.mark.parametrize("dtype", sorted(SCALES))
def test_a_scale_of_a_block_that_is_none_is_refused(dtype: str, tmp_path: Path) -> None:
    raw = blocks(dtype, 3, 2)
    size = raw.shape[1] // 2
    if DTYPES[dtype].name.startswith(("IQ1", "IQ2", "IQ3", "TQ")):
        pytest.importorskip("gguf")
    for at in SCALES[dtype]:
        damaged = raw.copy()
        damaged[1, size + at : size + at + 2] = (0, 0x7C)  # infinity
        weight = coded(tmp_path, dtype, damaged, (3, 2 * (DTYPES[dtype].block or (0, 0))[0]))
        with pytest.raises(FileFormatError, match=r"blk\.0\.ffn_up\.weight: .*NaN or infinite"):
            read_matrix(weight, InputFiles({}))


def test_bytes_that_no_scale_of_fp4_has_are_refused(tmp_path: Path) -> None:
    for dtype, byte in (("MXFP4", 0xFF), ("NVFP4", 0x80), ("NVFP4", 0xFF)):
        raw = blocks(dtype, 2, 1)
        raw[1, 0] = byte
        weight = coded(tmp_path, dtype, raw, (2, (DTYPES[dtype].block or (0, 0))[0]))
        with pytest.raises(FileFormatError, match="NaN"):
            read_matrix(weight, InputFiles({}))


def test_rows_of_a_stack_are_read_across_experts(tmp_path: Path) -> None:
    raw = blocks("Q4_K", 15, 1)
    weight = coded(tmp_path, "Q4_K", raw, (3, 5, 256))
    assert (weight.rows, weight.width) == (15, 256)
    expected = truth(raw, "Q4_K")
    assert np.array_equal(read_matrix(weight, InputFiles({})).reshape(15, 256), expected)


def test_many_rows_are_decoded_in_pieces(tmp_path: Path) -> None:
    raw = blocks("Q8_0", 700, 8)
    weight = coded(tmp_path, "Q8_0", raw, (700, 256))
    expected = truth(raw[::233], "Q8_0")
    assert np.array_equal(read_matrix(weight, InputFiles({}))[::233], expected)


def test_common_types_are_read_without_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_package(monkeypatch)
    for sample in SAMPLES.values():
        found = read_matrix(sample.coded(tmp_path), InputFiles({}))
        assert np.array_equal(found, sample.truth)


def test_what_takes_the_package_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_package(monkeypatch)
    weight = coded(tmp_path, "IQ3_S", blocks("IQ3_S", 2, 1), (2, 256))
    with pytest.raises(UnsupportedError, match="IQ3_S; reading it takes the gguf") as caught:
        read_matrix(weight, InputFiles({}))
    assert caught.value.hint is not None and "pip install 'loratool[gguf]'" in caught.value.hint
    weight = coded(tmp_path, "Q8_0", blocks("Q8_0", 2, 1), (2, 32))
    with pytest.raises(UnsupportedError, match="Q8_0; writing it takes the gguf"):
        weight.codec.encoder(weight)


def test_what_is_not_written_again_is_refused_by_name(tmp_path: Path) -> None:
    for dtype in BLOCKS:
        if dtype.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"):
            continue
        assert dtype.block
        raw = np.zeros((2, dtype.block[1]), np.uint8)
        weight = coded(tmp_path, dtype.name, raw, (2, dtype.block[0]))
        with pytest.raises(UnsupportedError, match=f"is {dtype.name}, ") as caught:
            weight.codec.encoder(weight)
        assert caught.value.hint is not None and "llama-quantize" in caught.value.hint


def test_what_no_formula_is_known_for_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    weight = coded(tmp_path, "Q1_0", np.zeros((2, 18), np.uint8), (2, 128))
    with pytest.raises(UnsupportedError, match="Q1_0, which is not read"):
        read_matrix(weight, InputFiles({}))


def test_a_value_that_scales_cannot_span_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for dtype in ("Q4_0", "Q8_0", "Q5_1"):
        weight = coded(tmp_path, dtype, blocks(dtype, 1, 1), (1, 32))
        with pytest.raises(ValueError, match="finite"):
            weight.codec.encoder(weight).encode(0, 1, np.full((1, 32), 1e9))


def test_damaged_neighbours_are_refused() -> None:
    sample = SAMPLES["NVFP4-scale-3"]
    for dtype, shape in (("F16", (3,)), ("F32", (2,))):
        odd = {**sample.tensors, f"{NAME}.scale": (dtype, shape, b"")}
        with pytest.raises(FileFormatError, match=r"ffn_up\.scale: is F"):
            recognise({n: _stored(n, d, s) for n, (d, s, _) in odd.items()}, Description())
    with pytest.raises(UnsupportedError, match="a vector of Q8_0"):
        recognise({"x": _stored("x", "Q8_0", (32,))}, Description())
    key = f"comfy.gguf.orig_shape.{NAME}.weight"
    for text in ("[2, 16, 2]", "x", "[-1, -32]", "[]", "3", "[1.5]"):
        stored = {f"{NAME}.weight": _stored(f"{NAME}.weight", "Q8_0", (1, 32))}
        with pytest.raises(FileFormatError, match="says that it was"):
            recognise(stored, Description(metadata={key: text}))


def _stored(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(TensorSpec(name, dtype, shape), Path("memory"), 0)
