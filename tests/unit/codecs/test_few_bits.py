"""What of MLX's, HQQ's, Quanto's and torchao's codes is refused, or told from the configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded import Sample, Tensor, hqq, mlx, quanto
from coded import torchao as torchao_samples

from loratool.codecs.codec import CodedTensor, Description, recognise
from loratool.errors import FileFormatError, LoratoolError, UnsupportedError

Kind = type[LoratoolError]
MLX = mlx.sample((5, 128), 4, 64)
HQQ = hqq.sample((16, 64), 4, 1, 32)
GROUPS = quanto.in_groups((6, 256), 4, 128, "BF16", "BF16")
BYTES = quanto.of_bytes((9, 14), "I8", "BF16", (9, 1))
TORCHAO = torchao_samples.sample("Int8Tensor", (9, 64), (9, 2), shift="I8")
FLOAT8 = torchao_samples.sample("Float8Tensor", (8, 12), (4, 3), codes="F8_E4M3")


def changed(sample: Sample, **tensors: Tensor | None) -> Sample:
    """Return it with tensors of its module replaced, or left out; ``__`` stands for a dot."""
    named = {f"{sample.module}.{leaf.replace('__', '.')}": t for leaf, t in tensors.items()}
    made = {k: t for k, t in {**sample.tensors, **named}.items() if t is not None}
    return replace(sample, tensors=made)


def found(sample: Sample, folder: Path, said: Description | None = None) -> CodedTensor:
    return recognise(sample.stored(folder), said or sample.said)[sample.module]


def refused(
    sample: Sample,
    folder: Path,
    match: str,
    kind: Kind = FileFormatError,
    said: Description | None = None,
) -> LoratoolError:
    with pytest.raises(kind, match=match) as caught:
        recognise(sample.stored(folder), said or sample.said)
    assert sample.module in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"bits": 4, "group_size": 32}, "4 bits in groups of 32, as config.json says"),
        ({"bits": 7, "group_size": 64}, "7 bits in groups of 64"),
        ({"bits": 4.0, "group_size": 64}, "4.0 bits"),
        ({}, "several bits and sizes of groups"),
        ({"bits": 3}, "no bits and sizes of groups"),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "its mode is 'mxfp4'"),
    ],
)
def test_mlx_needs_bits_and_groups_that_fit(
    said: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(MLX, tmp_path, match, said=Description(said))


@pytest.mark.parametrize(
    ("said", "sample"),
    [
        ({"bits": 4}, MLX),
        ({"group_size": 64}, MLX),
        ({"bits": 4, "group_size": 64, MLX.module: False}, MLX),
        ({}, mlx.sample((5, 128), 5, 32)),  # 160 bits are five words of nothing else
        ({}, mlx.sample((5, 96), 4, 32, mode="mxfp4")),
        ({}, mlx.sample((5, 96), 8, 32, mode="mxfp8")),
        ({}, mlx.sample((5, 96), 4, 16, mode="nvfp4")),
    ],
)
def test_mlx_tells_what_only_one_layout_makes(
    said: dict[str, Any], sample: Sample, tmp_path: Path
) -> None:
    coded = found(sample, tmp_path, Description(said))
    assert np.array_equal(coded.codec.decode_rows(coded, 0, 5, sample.parts()), sample.truth)


@pytest.mark.parametrize("group", [16, "64", 256])
def test_mlx_has_no_groups_but_its_own(group: object, tmp_path: Path) -> None:
    said = Description({"bits": 4, "group_size": group})
    refused(MLX, tmp_path, "quantised by MLX in groups of", UnsupportedError, said=said)


@pytest.mark.parametrize(
    ("tensors", "match", "kind"),
    [
        ({"biases": ("BF16", (5, 1), bytes(10))}, r"expected floats like the scales", None),
        ({"biases": ("I32", (5, 2), bytes(40))}, r"is I32", None),
        ({"scales": ("I8", (5, 2), bytes(10))}, "no scale of MLX", None),
        ({"scales": ("BF16", (4, 2), bytes(16))}, "each of the rows", FileFormatError),
        ({"scales": ("U8", (5, 2), bytes(10))}, "no biases", None),
        ({"global_scale": ("F32", (), bytes(4))}, "scale of a whole weight", UnsupportedError),
        ({"weight": None}, "no 'weight'", None),
    ],
)
def test_mlx_refuses_what_does_not_fit(
    tensors: dict[str, Tensor | None], match: str, kind: Kind | None, tmp_path: Path
) -> None:
    if "scales" in tensors and tensors["scales"] is not None and "rows" in match:
        tensors = tensors | {"biases": tensors["scales"]}
    refused(changed(MLX, **tensors), tmp_path, match, kind or FileFormatError)


def test_mlx_refuses_modes_by_name(tmp_path: Path) -> None:
    said = Description({"mode": "ternary", "bits": 2, "group_size": 64})
    refused(MLX, tmp_path, "mode 'ternary'", UnsupportedError, said)
    listed = Description({"mode": ["affine"]})
    refused(MLX, tmp_path, r"mode \['affine'\]", UnsupportedError, listed)
    sample = mlx.sample((5, 96), 4, 32, mode="mxfp4")
    refused(sample, tmp_path, "nvfp4", said=Description({"mode": "nvfp4"}))
    refused(sample, tmp_path, "'affine' by config", said=Description({"mode": "affine"}))


def word(text: str) -> Tensor:
    return hqq.word(text)


@pytest.mark.parametrize(
    ("tensors", "match", "kind"),
    [
        ({"quant_zero": hqq.scalar(1, "U8")}, "'quant_zero'", UnsupportedError),
        ({"zero_q": ("U8", (4,), bytes(4)), "zero": None}, "'zero_q'", UnsupportedError),
        ({"packing": word("3bit_32")}, "packed as '3bit_32'", UnsupportedError),
        ({"nbits": hqq.scalar(7, "I32")}, "is 7, which HQQ", None),
        ({"nbits": hqq.scalar(float("nan"), "F32")}, "expected one number", None),
        ({"nbits": ("I32", (20,), bytes(80))}, "one or two numbers", None),
        ({"nbits": ("C64", (), bytes(8))}, "is C64", None),
        ({"axis": hqq.scalar(2, "I32")}, "is 2, expected 0 or 1", None),
        ({"axis": hqq.scalar(0, "I32")}, "along axis 0", None),
        ({"group_size": hqq.scalar(64, "I32")}, "is 64, but there are 32 scales", None),
        ({"shape": ("I64", (3,), bytes(24))}, "expected two sides", None),
        ({"shape": ("I64", (2,), bytes(16))}, "expected two sides", None),
        ({"shape": ("F32", (2,), bytes(8))}, "expected two sides", None),
        ({"W_q": ("U8", (16, 31), bytes(496))}, "expected 16 rows of 32 bytes", None),
        ({"W_q": ("I32", (16, 8), bytes(512))}, "expected 16 rows", None),
        ({"scale": ("F32", (31, 1), bytes(124))}, "one float for each group", None),
        ({"zero": ("U8", (32, 1), bytes(32))}, "one float for each group", None),
        ({"scale": ("F32", (), bytes(4))}, "one float for each group", None),
        ({"packing": ("F32", (2,), bytes(8))}, "a word in bytes", None),
    ],
)
def test_hqq_refuses_what_does_not_fit(
    tensors: dict[str, Tensor | None], match: str, kind: Kind | None, tmp_path: Path
) -> None:
    refused(changed(HQQ, **tensors), tmp_path, match, kind or FileFormatError)


def test_quanto_refuses_groups_of_a_weight_whose_rows_nothing_tells(tmp_path: Path) -> None:
    error = refused(changed(GROUPS, bias=None), tmp_path, "no bias to tell", UnsupportedError)
    assert "16-bit" in str(error.hint)


@pytest.mark.parametrize(
    ("sample", "tensors", "match"),
    [
        (GROUPS, {"bias": ("BF16", (5,), bytes(10))}, "has 5 numbers, and the weight 12 groups"),
        (GROUPS, {"bias": ("BF16", (0,), b"")}, "has 0 numbers"),
        (GROUPS, {"weight___shift": None}, "no 'weight._shift'"),
        (GROUPS, {"weight___scale": None}, "no 'weight._scale'"),
        (GROUPS, {"weight___scale": ("BF16", (11, 1), bytes(22))}, "one number for each group"),
        (GROUPS, {"weight___shift": ("I32", (12, 1), bytes(48))}, "is I32"),
        (GROUPS, {"weight___data___data": ("U8", (7, 128), bytes(896))}, "has 7 rows for 12"),
        (GROUPS, {"weight___data___data": ("I8", (6, 128), bytes(768))}, "a matrix of U8"),
        (BYTES, {"weight___scale": ("I8", (9, 1), bytes(9))}, "is no scale"),
        (BYTES, {"weight___scale": ("F32", (8, 1), bytes(32))}, "a scale for each row"),
        (BYTES, {"weight___data": ("I16", (9, 14), bytes(252))}, "a matrix of codes"),
        (BYTES, {"weight___data": None}, "no 'weight._data'"),
    ],
)
def test_quanto_refuses_what_does_not_fit(
    sample: Sample, tensors: dict[str, Tensor | None], match: str, tmp_path: Path
) -> None:
    refused(changed(sample, **tensors), tmp_path, match)


def described(sample: Sample, text: str | None) -> Sample:
    metadata = {key: value for key, value in sample.said.metadata.items() if key != sample.name}
    if text is not None:
        metadata[sample.name] = text
    return replace(sample, said=replace(sample.said, metadata=metadata))


def told(sample: Sample, **changes: Any) -> Sample:
    said = json.loads(sample.said.metadata[sample.name]) | changes
    return described(sample, json.dumps(said))


@pytest.mark.parametrize(
    ("sample", "match", "kind"),
    [
        (described(TORCHAO, None), "no metadata", FileFormatError),
        (described(TORCHAO, '{"_type": '), "not valid JSON", FileFormatError),
        (described(TORCHAO, "[1]"), "do not say which", FileFormatError),
        (told(TORCHAO, _data=1), "do not say which", FileFormatError),
        (told(TORCHAO, _tensor_data_names=[1]), "do not say which", FileFormatError),
        (told(TORCHAO, _tensor_data_names=["x"]), "no '_weight_x'", FileFormatError),
        (told(TORCHAO, _type="Int4TilePackedTo4dTensor"), "Int4TilePacked", UnsupportedError),
        (told(TORCHAO, _type="NVFP4Tensor"), "NVFP4Tensor", UnsupportedError),
        (told(TORCHAO, _type="Float8Tensor"), "expected F8_E4M3", FileFormatError),
        (
            changed(TORCHAO, _weight_scale=("F32", (9, 3), bytes(108))),
            "for each block of codes",
            FileFormatError,
        ),
        (
            changed(TORCHAO, _weight_scale=("F32", (18,), bytes(72))),
            "for each block of codes",
            FileFormatError,
        ),
        (
            changed(TORCHAO, _weight_zero_point=("F32", (9, 2), bytes(72))),
            "is F32",
            FileFormatError,
        ),
        (
            changed(
                told(TORCHAO, _tensor_data_names=["qdata", "scale", "act_pre_scale"]),
                _weight_act_pre_scale=("F32", (64,), bytes(256)),
            ),
            "its inputs are scaled",
            UnsupportedError,
        ),
    ],
)
def test_torchao_refuses_what_is_not_read(
    sample: Sample, match: str, kind: Kind, tmp_path: Path
) -> None:
    refused(sample, tmp_path, match, kind)


def test_torchao_does_without_a_dtype_in_the_metadata(tmp_path: Path) -> None:
    for data in ({}, {"dtype": None}, {"dtype": {"_data": "no_float"}}):
        assert found(told(FLOAT8, _data=data), tmp_path).spec.dtype == "BF16"
