"""Whole numbers in words: what tells the layouts apart, what is refused, and what is damaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded import MODULE, Sample, Tensor
from coded.awq import samples as awq_samples
from coded.compressed_int import samples as int_samples
from coded.compressed_pack import samples as pack_samples
from coded.gptq import integers, made, said
from coded.gptq import samples as gptq_samples

from loratool.codecs.codec import Description, recognise
from loratool.codecs.words import unpack
from loratool.errors import FileFormatError, UnsupportedError

WEIGHT = f"{MODULE}.weight"


def one(samples: Iterable[Sample], label: str) -> Sample:
    return next(sample for sample in samples if sample.label == label)


def changed(sample: Sample, told: dict[str, Any] | None = None, **tensors: Tensor) -> Sample:
    """Return a sample with other tensors, and more in its configuration."""
    new = {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}
    quantization = {**sample.said.quantization, **(told or {})}
    return replace(
        sample,
        tensors={**sample.tensors, **new},
        said=replace(sample.said, quantization=quantization),
    )


def shaped(dtype: str, *shape: int) -> Tensor:
    size = {"I32": 4, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I16": 2}.get(dtype, 1)
    return (dtype, shape, bytes(int(np.prod(shape)) * size))


def refused(sample: Sample, folder: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        recognise(sample.stored(folder), sample.said)
    assert MODULE in str(caught.value)
    assert error is not UnsupportedError or caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33, 64])
def test_codes_come_out_of_a_stream_of_bits(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, count))
    rows = []
    for row in codes:
        stream = sum(int(code) << (bits * n) for n, code in enumerate(row))
        rows.append(list(stream.to_bytes(4 * -(-count * bits // 32), "little")))
    assert np.array_equal(unpack(np.array(rows, np.uint8), bits, count), codes)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "'gptq_p'"),
        ({"is_marlin_format": True}, "Marlin"),
        ({"packing_format": "auto_round:gptq:marlin"}, "marlin"),
    ],
)
def test_gptq_in_another_order_is_refused(told: dict[str, Any], words: str, tmp_path: Path) -> None:
    sample = changed(one(gptq_samples(), "4bits-v1"), told)
    refused(sample, tmp_path, UnsupportedError, words)


def test_gptq_in_other_words_is_refused(tmp_path: Path) -> None:
    sample = changed(one(gptq_samples(), "4bits-v1"), qweight=shaped("I16", 24, 64))
    refused(sample, tmp_path, UnsupportedError, "packed into I16")


def test_tensors_of_awq_win_over_a_configuration_of_gptq(tmp_path: Path) -> None:
    sample = replace(one(awq_samples(), "gemm"), said=said(4, 32))
    coded = sample.coded(tmp_path)
    assert coded.codec.name == "awq"
    other = replace(
        one(gptq_samples(), "4bits-act-order"), said=Description({"quant_method": "awq"})
    )
    (tmp_path / "other").mkdir()
    assert other.coded(tmp_path / "other").codec.name == "gptq"


def test_marlin_is_known_by_its_tensors(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.B": shaped("I32", 4, 64), f"{MODULE}.s": shaped("F16", 2, 32)}
    sample = Sample("gptq", "marlin", tensors, Description(), np.zeros(0))
    refused(sample, tmp_path, UnsupportedError, "Marlin")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"qzeros": shaped("I32", 2, 8)}, "no one width"),
        ({"qzeros": shaped("I32", 3, 5)}, "no one width"),
        ({"qzeros": shaped("F16", 3, 8)}, "qzeros: is F16"),
        ({"scales": shaped("I32", 3, 64)}, "scales: is I32"),
        ({"scales": shaped("F16", 3, 63)}, "no one width"),
        ({"g_idx": shaped("F32", 96)}, "g_idx: is F32"),
        ({"g_idx": shaped("I32", 50)}, "no one width"),
        ({"qweight": shaped("I32", 13, 64), "g_idx": shaped("I32", 96)}, "no one width"),
        ({"qweight": shaped("I32", 13, 64)}, "104 inputs"),
    ],
)
def test_gptq_that_does_not_fit_together_is_damaged(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    sample = changed(one(gptq_samples(), "4bits-v1"), **tensors)
    refused(sample, tmp_path, FileFormatError, words)


@pytest.mark.parametrize("group", [-1, 4])
def test_a_group_that_is_none_is_damaged(group: int, tmp_path: Path) -> None:
    sample = one(gptq_samples(), "4bits-act-order")
    index = np.zeros(64, "<i4")
    index[5] = group
    sample = changed(sample, g_idx=("I32", (64,), index.tobytes()))
    coded = sample.coded(tmp_path)
    with pytest.raises(FileFormatError, match=rf"g_idx: names group {group}, expected 0 to 3"):
        coded.codec.decode_rows(coded, 0, coded.rows, sample.parts())


def test_bits_of_a_module_are_those_of_its_shapes(tmp_path: Path) -> None:
    tensors, truth = made((64, 64), 8, 2)
    sample = Sample("gptq", "", tensors, said(4, 32), truth, dtype="F16")
    coded = sample.coded(tmp_path)
    assert coded.settings["bits"] == 8
    assert np.array_equal(coded.codec.decode_rows(coded, 0, 64, sample.parts()), truth)


def test_zeros_of_ones_borrow_where_gptqmodel_wrote_them(tmp_path: Path) -> None:
    """The others add in each code, where what is too large begins with 0 again."""
    tensors, _ = made((32, 32), 4, 1, index=np.zeros(32, int))
    stored = np.full((1, 4), 0xFFFFFFF0, "<u4")
    tensors[f"{MODULE}.qzeros"] = integers(stored)
    whole = (stored + np.uint32(0x11111111)).astype("<u4")
    for meta, words in ((["gptqmodel:1.4.0"], whole), (["auto-gptq"], None)):
        told = said(4, -1, meta={"quantizer": meta})
        sample = Sample("gptq", "", tensors, told, np.zeros((32, 32)), dtype="F16")
        coded = sample.coded(tmp_path)
        second = changed(sample, {"checkpoint_format": "gptq_v2"})
        if words is None:
            words = np.full((1, 4), 0x00000001, "<u4")
        second = changed(second, qzeros=integers(words))
        expected = second.coded(tmp_path)
        assert np.array_equal(
            coded.codec.decode_rows(coded, 0, 32, sample.parts()),
            coded.codec.decode_rows(expected, 0, 32, second.parts()),
        )


def test_an_order_of_activations_is_needed_where_there_is_one(tmp_path: Path) -> None:
    sample = one(gptq_samples(), "4bits-act-order").without(f"{MODULE}.g_idx")
    refused(sample, tmp_path, FileFormatError, "no 'g_idx'")


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"version": "gemv_fast"}, "'gemv_fast'"),
        ({"version": "marlin"}, "'marlin'"),
        ({"version": "exllama"}, "'exllama'"),
        ({"backend": "llm-awq"}, "llm-awq"),
    ],
)
def test_awq_in_another_order_is_refused(told: dict[str, Any], words: str, tmp_path: Path) -> None:
    refused(changed(one(awq_samples(), "gemm"), told), tmp_path, UnsupportedError, words)


def test_awq_of_16_bit_words_is_refused(tmp_path: Path) -> None:
    sample = changed(one(awq_samples(), "gemm"), qweight=shaped("I16", 24, 64))
    refused(sample, tmp_path, UnsupportedError, "gemv_fast")


@pytest.mark.parametrize(
    ("label", "tensors", "words"),
    [
        ("gemm", {"qzeros": shaped("I32", 2, 8)}, "do not fit together"),
        ("gemm", {"scales": shaped("F16", 3, 63)}, "do not fit together"),
        ("gemm", {"scales": shaped("I32", 3, 64)}, "scales: is I32"),
        ("gemm", {"qzeros": shaped("I32", 8)}, "qzeros: is I32 of shape"),
        ("gemv-64", {"qzeros": shaped("I32", 24, 1), "scales": shaped("F16", 24, 8)}, "fit"),
    ],
)
def test_awq_that_does_not_fit_together_is_damaged(
    label: str, tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    refused(changed(one(awq_samples(), label), **tensors), tmp_path, FileFormatError, words)


def test_turned_awq_needs_no_size_of_groups(tmp_path: Path) -> None:
    sample = one(awq_samples(), "gemv-64")
    alone = replace(sample, said=Description({"quant_method": "awq", "version": "gemv"}))
    assert alone.coded(tmp_path).settings == {"layout": "gemv", "group_size": 64}
    small = one(awq_samples(), "gemv-32")
    assert replace(small, said=Description()).coded(tmp_path).settings["layout"] == "gemv"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight_shape": ("I64", (2,), np.array([12, 0], "<i8").tobytes())}, r"says \[12, 0\]"),
        ({"weight_shape": ("I64", (2,), np.array([12, -4], "<i8").tobytes())}, "says"),
        ({"weight_shape": ("I64", (2,), np.array([13, 96], "<i8").tobytes())}, "13 rows"),
        ({"weight_shape": ("I64", (2,), np.array([12, 1 << 40], "<i8").tobytes())}, "12 rows"),
        ({"weight_shape": ("I64", (3,), bytes(24))}, "expected outputs and inputs"),
        ({"weight_shape": ("F32", (2,), bytes(8))}, "weight_shape: is F32"),
        ({"weight_scale": shaped("BF16", 12, 5)}, "each group of inputs"),
        ({"weight_scale": shaped("BF16", 11, 3)}, "each group of inputs"),
        ({"weight_scale": shaped("I32", 12, 3)}, "weight_scale: is I32"),
        ({"weight_zero_point": shaped("I32", 3, 3)}, r"expected I32 of \[2, 3\]"),
        ({"weight_zero_point": shaped("I8", 12, 2)}, r"expected I32 of \[2, 3\]"),
        ({"weight_g_idx": shaped("I32", 95)}, "each of 96 inputs"),
        ({"weight_g_idx": shaped("F32", 96)}, "each of 96 inputs"),
    ],
)
def test_packed_codes_that_do_not_fit_together_are_damaged(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    sample = changed(one(pack_samples(), "int4"), **tensors)
    refused(sample, tmp_path, FileFormatError, words)


def test_a_width_that_shapes_leave_open_is_the_configured_one(tmp_path: Path) -> None:
    tensors = {
        f"{MODULE}.weight_packed": integers(np.full((1, 1), 0x87, "<u4")),
        f"{MODULE}.weight_scale": ("F32", (1, 1), np.ones(1, "<f4").tobytes()),
        f"{MODULE}.weight_shape": ("I64", (2,), np.array([1, 2], "<i8").tobytes()),
    }
    weights = {"num_bits": 4, "type": "int"}
    told = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}
    sample = Sample("compressed_pack", "", tensors, Description(told), np.zeros((1, 2)))
    coded = sample.coded(tmp_path)
    assert coded.codec.decode_rows(coded, 0, 1, sample.parts()).tolist() == [[-1, 0]]
    refused(replace(sample, said=Description()), tmp_path, FileFormatError, "of some bits")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"scale_packed": shaped("F16", 2, 4)}, "marlin-24"),
        ({"bitmask": shaped("U8", 4, 4), "compressed": shaped("F16", 9)}, "sparse"),
        ({"weight_packed": shaped("I32", 2, 12, 12)}, "stack"),
    ],
)
def test_what_compressed_tensors_has_besides_is_refused(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    sample = changed(one(pack_samples(), "int4"), **tensors)
    refused(sample, tmp_path, UnsupportedError, words)


@pytest.mark.parametrize(
    "tensors",
    [
        {"SCB": shaped("F32", 21)},
        {"comfy_quant": shaped("U8", 30)},
        {"weight_scale": shaped("F8_E8M0", 21, 5)},
        {"weight_scale": shaped("U8", 21, 5)},
    ],
)
def test_bytes_of_others_are_left_alone(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    from loratool.codecs.compressed_int import CODEC

    sample = changed(one(int_samples(), "channel"), **tensors)
    assert not CODEC.recognise(sample.stored(tmp_path), sample.said)
    marked = replace(sample.said, metadata={"_quantization_metadata": "{}"})
    plain = one(int_samples(), "channel")
    assert not CODEC.recognise(plain.stored(tmp_path), marked)


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"weight_scale": shaped("F32", 3, 5)}, UnsupportedError, "scales blocks"),
        ({"pre_quant_scale": shaped("F32", 40)}, UnsupportedError, "pre_quant_scale"),
        ({"weight": shaped("I8", 2, 21, 40)}, UnsupportedError, "stack"),
        ({"weight_scale": shaped("F32", 21, 7)}, FileFormatError, "each group"),
        ({"weight_scale": shaped("F32", 20)}, FileFormatError, "each output"),
        ({"weight_zero_point": shaped("I8", 21, 5)}, FileFormatError, "expected I8"),
        ({"weight_zero_point": shaped("I32", 21, 1)}, FileFormatError, "expected I8"),
        ({"weight_g_idx": shaped("I32", 41)}, FileFormatError, "each of 40 inputs"),
    ],
)
def test_bytes_that_do_not_fit_together_are_refused(
    tensors: dict[str, Tensor], error: type[Exception], words: str, tmp_path: Path
) -> None:
    refused(changed(one(int_samples(), "channel"), **tensors), tmp_path, error, words)


def test_zeros_that_two_writers_store_otherwise_are_told(tmp_path: Path) -> None:
    sample = one(gptq_samples(), "4bits-v1")
    coded = sample.coded(tmp_path)
    dtype, shape, data = sample.tensors[f"{MODULE}.qzeros"]
    words = np.frombuffer(data, "<u4").copy()
    words &= np.uint32(0x77777777)  # no zero of 16 - 1
    sure = changed(sample, qzeros=(dtype, shape, words.tobytes()))
    assert coded.codec.doubt(coded, sure.parts()) is None
    words[0] |= np.uint32(0xF)
    unsure = changed(sample, qzeros=(dtype, shape, words.tobytes()))
    assert "meta.quantizer" in coded.codec.doubt(coded, unsure.parts())
    second = one(gptq_samples(), "4bits-v2").coded(tmp_path)
    assert second.codec.doubt(second, sample.parts()) is None
