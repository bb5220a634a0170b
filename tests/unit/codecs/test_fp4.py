"""Floats of four bits: rounding, scales that are kept or chosen, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded import MODULE, Sample, Tensor, tensor
from coded.compressed_int import samples as int_samples
from coded.compressed_pack import samples as pack_samples
from coded.mxfp4 import E2M1, PARAMETER
from coded.mxfp4 import samples as mxfp4_samples
from coded.nvfp4 import samples as nvfp4_samples

from loratool.codecs.codec import CodedTensor, Description, recognise
from loratool.codecs.fp4 import in_bytes, nearest
from loratool.codecs.nvfp4 import CODEC as NVFP4
from loratool.errors import FileFormatError, UnsupportedError

NVFP4S = {sample.label: sample for sample in nvfp4_samples()}
MXFP4S = {sample.label: sample for sample in mxfp4_samples()}


def with_tensors(sample: Sample, **tensors: Tensor) -> Sample:
    new = {f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return replace(sample, tensors={**sample.tensors, **new})


def shaped(dtype: str, *shape: int) -> Tensor:
    return (dtype, shape, bytes(int(np.prod(shape)) * (4 if dtype == "F32" else 1)))


def refused(sample: Sample, folder: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        recognise(sample.stored(folder), sample.said)
    assert sample.module in str(caught.value)
    assert caught.value.hint or error is FileFormatError  # type: ignore[attr-defined]


def test_a_number_becomes_the_nearest_code_and_a_tie_the_even_one() -> None:
    values = np.concatenate([E2M1[:8], [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 99, 0.2500001]])
    expected = [*range(8), 0, 2, 2, 4, 4, 6, 6, 7, 1]
    assert nearest(values).tolist() == expected
    signed = [code | 8 if value else 0 for code, value in zip(expected, values, strict=True)]
    assert nearest(-values).tolist() == signed
    dense = np.linspace(-7, 7, 20001)
    distances = np.abs(dense[:, None] - E2M1[None])
    found = np.abs(dense - E2M1[nearest(dense)])
    assert np.allclose(found, distances.min(axis=1))
    assert in_bytes(np.array([[1, 2, 3, 15]], np.uint8)).tolist() == [[0x21, 0xF3]]


def written(coded: CodedTensor, values: np.ndarray) -> dict[str, np.ndarray]:
    encoder = coded.codec.encoder(coded)
    largest = float(np.abs(values).max())
    return {k: rows for k, (_, rows) in encoder.encode(0, coded.rows, values, largest).items()}


def test_a_power_of_two_is_the_better_of_two(tmp_path: Path) -> None:
    coded = MXFP4S["pack"].coded(tmp_path)
    values = np.zeros((coded.rows, coded.width))
    values[0, :32] = 7.5  # 6 at the lower power, 8 at the next one
    values[1, :32] = [6.6] + 31 * [0.5]  # the small ones would be lost at the next one
    values[2, :32] = 3 * 2.0**-140
    values[3, :32] = 2.0**127
    made = written(coded, values)
    assert made["scales"][:4, 0].tolist() == [128, 127, 0, 127 + 125]
    assert made["codes"][0, 0] == 0x66 and made["codes"][1, 0] == 0x17
    assert made["scales"][4, 0] == 0 and not made["codes"][4].any()


@pytest.mark.parametrize("label", ["modelopt", "compressed"])
@pytest.mark.parametrize(
    ("shared", "factor", "is_kept"), [(True, 0.9, True), (True, 1.1, False), (False, 0.9, False)]
)
def test_a_scale_that_siblings_share_stays_while_it_suffices(
    label: str, shared: bool, factor: float, is_kept: bool, tmp_path: Path
) -> None:
    sample = NVFP4S[label]
    leaf = "weight_scale_2" if label == "modelopt" else "weight_global_scale"
    other = f"{MODULE.rpartition('.')[0]}.gate_proj"
    dtype, shape, data = sample.tensors[f"{MODULE}.{leaf}"]
    new = data if shared else (np.frombuffer(data, "<f4") * np.float32(2)).tobytes()
    pair = {f"{other}.{leaf}": (dtype, shape, new)}
    coded = replace(sample, tensors=sample.tensors | pair).stored(tmp_path)
    weight = NVFP4.recognise(coded, sample.said)[MODULE]
    one = float(np.frombuffer(data, "<f4")[0])
    top = 2688 * (one if label == "modelopt" else 1 / one)
    values = np.random.default_rng(0).uniform(-1, 1, (weight.rows, weight.width)) * 0.1 * top
    values[0, 0] = factor * top
    found = written(weight, values)[leaf].reshape(())
    assert (found.tobytes() == data) is is_kept
    wanted = factor * top / 2688
    fresh = wanted if label == "modelopt" else 1 / wanted
    assert is_kept or float(found) == pytest.approx(fresh, rel=1e-6)


def test_a_weight_of_zeros_is_written(tmp_path: Path) -> None:
    for sample in (*NVFP4S.values(), MXFP4S["pack"]):
        coded = sample.coded(tmp_path)
        made = written(coded, np.zeros((coded.rows, coded.width)))
        assert not made[coded.codec.encoder(coded).roles[0]].any()


@pytest.mark.parametrize(
    ("label", "tensors", "error", "words"),
    [
        ("modelopt", {"weight_scale": shaped("F8_E4M3", 33, 2)}, FileFormatError, "each 16 inputs"),
        ("modelopt", {"weight_scale_2": shaped("F32", 2)}, FileFormatError, "expected one float"),
        ("modelopt", {"weight_scale_2": shaped("U8", 1)}, FileFormatError, "expected one float"),
        ("modelopt", {"pre_quant_scale": shaped("F32", 48)}, UnsupportedError, "pre_quant_scale"),
        ("compressed", {"weight_packed": shaped("U8", 2, 33, 24)}, UnsupportedError, "stack"),
        ("compressed", {"weight_packed": shaped("U8", 33, 25)}, FileFormatError, "each 16 inputs"),
    ],
)
def test_nvfp4_that_does_not_fit_together_is_refused(
    label: str, tensors: dict[str, Tensor], error: type[Exception], words: str, tmp_path: Path
) -> None:
    refused(with_tensors(NVFP4S[label], **tensors), tmp_path, error, words)


def test_scales_in_an_order_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    sample = replace(NVFP4S["modelopt-tiles"], said=Description())
    refused(sample, tmp_path, UnsupportedError, "modelopt's order or in ComfyUI's")
    assert NVFP4S["modelopt-unsaid"].coded(tmp_path)


@pytest.mark.parametrize("mark", ["tensor", "metadata"])
def test_files_of_comfyui_are_left_alone(mark: str, tmp_path: Path) -> None:
    sample = NVFP4S["modelopt"]
    told: Any = sample.said
    if mark == "tensor":
        sample = with_tensors(sample, comfy_quant=("U8", (2,), b"{}"))
    else:
        told = replace(told, metadata={"_quantization_metadata": "{}"})
    assert not NVFP4.recognise(sample.stored(tmp_path), told)


def test_nothing_is_divided_by_zero(tmp_path: Path) -> None:
    sample = with_tensors(NVFP4S["compressed"], weight_global_scale=tensor(np.zeros(1), "F32")[0])
    coded = sample.coded(tmp_path)
    with pytest.raises(FileFormatError, match=r"weight_global_scale: is 0"):
        coded.codec.decode_rows(coded, 0, 1, sample.parts())


def test_six_bits_are_refused(tmp_path: Path) -> None:
    six = shaped("U8", 11, 72)
    refused(with_tensors(MXFP4S["pack"], weight_packed=six), tmp_path, UnsupportedError, "MXFP6")


@pytest.mark.parametrize(
    ("label", "tensors", "words"),
    [
        ("pack", {f"{MODULE}.weight_scale": shaped("U8", 11, 4)}, "each 32 inputs"),
        ("stack", {f"{PARAMETER}_scales": shaped("U8", 3, 10, 3)}, "expected U8"),
        ("stack", {f"{PARAMETER}_scales": shaped("F32", 3, 10, 2)}, "expected U8"),
        ("stack", {f"{PARAMETER}_blocks": shaped("U8", 3, 10, 2, 8)}, "expected U8"),
    ],
)
def test_mxfp4_that_does_not_fit_together_is_damaged(
    label: str, tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    sample = MXFP4S[label]
    refused(replace(sample, tensors=sample.tensors | tensors), tmp_path, FileFormatError, words)


def test_other_tensors_of_bytes_are_left_alone(tmp_path: Path) -> None:
    sample = Sample("mxfp4", "", {"m.num_blocks": shaped("U8", 4)}, Description(), np.zeros(0))
    assert not recognise(sample.stored(tmp_path), sample.said)


def test_a_stack_is_read_from_any_row_to_any_other(tmp_path: Path) -> None:
    sample = MXFP4S["stack"]
    coded = sample.coded(tmp_path)
    truth = sample.truth.reshape(coded.rows, coded.width)
    for start in range(0, coded.rows, 7):
        for stop in range(start, coded.rows + 1, 11):
            found = coded.codec.decode_rows(coded, start, stop, sample.parts(), np.float32)
            assert np.array_equal(found, truth[start:stop])


def test_an_expert_is_written_as_a_whole(tmp_path: Path) -> None:
    sample = MXFP4S["stack"]
    coded = sample.coded(tmp_path)
    encoder = coded.codec.encoder(coded)
    assert encoder.step == 64
    with pytest.raises(ValueError, match="no experts of 64"):
        encoder.encode(0, 32, np.zeros((32, coded.width)))


@pytest.mark.parametrize(
    "sample",
    [
        *(NVFP4S["compressed"], MXFP4S["pack"]),
        *(next(samples()) for samples in (pack_samples, int_samples)),
    ],
    ids=str,
)
def test_weights_that_were_rotated_are_refused(sample: Sample, tmp_path: Path) -> None:
    told = {**sample.said.quantization, "transform_config": {"config_groups": {"R1": {}}}}
    rotated = replace(sample, said=replace(sample.said, quantization=told))
    refused(rotated, tmp_path, UnsupportedError, "rotated")
    none = {**sample.said.quantization, "transform_config": {"config_groups": {}}}
    assert replace(sample, said=replace(sample.said, quantization=none)).coded(tmp_path)
