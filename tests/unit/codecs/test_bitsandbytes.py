"""What of bitsandbytes' codes is refused: descriptions that lie, tiles, wrong sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded import Sample, Tensor
from coded.bitsandbytes_4bit import sample as four_bits
from coded.bitsandbytes_8bit import samples as eight_bits

from loratool.codecs.codec import Description, recognise
from loratool.errors import FileFormatError, UnsupportedError

PLAIN = four_bits((8, 16))
NESTED = four_bits((8, 16), blocksize=4, nested=8)
STATE = f"{PLAIN.name}.quant_state.bitsandbytes__nf4"
(INT8, *_) = eight_bits()


def with_tensors(sample: Sample, **changed: Tensor) -> Sample:
    """Return it with tensors replaced, by what comes after the weight's name."""
    named = {f"{sample.name}.{leaf}": value for leaf, value in changed.items()}
    return replace(sample, tensors={**sample.tensors, **named})


def saying(sample: Sample, **changed: Any) -> Sample:
    """Return it with another description; ``None`` leaves a key out."""
    said = json.loads(sample.tensors[STATE][2]) | changed
    text = json.dumps({key: value for key, value in said.items() if value is not None}).encode()
    return replace(sample, tensors={**sample.tensors, STATE: ("U8", (len(text),), text)})


def refused(sample: Sample, folder: Path, match: str) -> None:
    with pytest.raises(FileFormatError, match=match) as caught:
        recognise(sample.stored(folder), sample.said)
    assert sample.module in str(caught.value)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"shape": [8, 17]}, r"64 bytes of codes, expected 68 .* \[8, 17\]"),
        ({"shape": [16, 8, 2]}, "64 bytes of codes, expected 128"),
        ({"shape": [8, -16]}, "which is none"),
        ({"shape": [8, True]}, "which is none"),
        ({"shape": [8.0, 16]}, "which is none"),
        ({"shape": []}, "which is none"),
        ({"shape": "8x16"}, "which is none"),
        ({"shape": None}, "which is none"),
        ({"shape": [1 << 40, 1 << 40]}, "expected"),
        ({"blocksize": 32}, r"F32 \[2\], expected 4 of"),
        ({"blocksize": 0}, "blocksize 0"),
        ({"blocksize": True}, "blocksize True"),
        ({"blocksize": "64"}, "blocksize '64'"),
        ({"blocksize": None}, "blocksize None"),
        ({"quant_type": "fp4"}, "says 'fp4' of itself, named 'nf4'"),
        ({"nested_offset": 1.0}, "scales that are codes"),
    ],
)
def test_a_description_that_lies_is_refused(
    said: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(saying(PLAIN, **said), tmp_path, match)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"nested_blocksize": 4}, r"F32 \[4\], expected 8 of"),
        ({"nested_blocksize": -1}, "nested_blocksize -1"),
        ({"nested_blocksize": None}, "scales that are codes"),
        ({"nested_offset": None}, "scales that are codes"),
        ({"nested_offset": "0"}, "expected a number"),
        ({"nested_offset": True}, "expected a number"),
    ],
)
def test_a_description_of_nested_scales_that_lies_is_refused(
    said: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(saying(NESTED, **said), tmp_path, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"quant_type": "nf4", "blocksize"', "not valid JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"shape": [8, 16], "shape": [8, 16]}', "occurs twice"),
        (
            b'{"nested_offset": 1e999, "nested_blocksize": 8, "blocksize": 4, "shape": [8, 16]}',
            "inf",
        ),
        (b'{"nested_offset": NaN}', "NaN is not JSON"),
        (b"[" * 16000, "nested too deeply"),
        (b" " * 20000, "expected a short text"),
    ],
)
def test_a_description_that_is_damaged_is_refused(text: bytes, match: str, tmp_path: Path) -> None:
    state: Tensor = ("U8", (len(text),), text)
    refused(replace(NESTED, tensors={**NESTED.tensors, STATE: state}), tmp_path, match)


def test_a_description_is_bytes_and_there_is_one(tmp_path: Path) -> None:
    words = replace(PLAIN, tensors={**PLAIN.tensors, STATE: ("F32", (2,), bytes(8))})
    refused(words, tmp_path, "expected a short text")
    other = {STATE.replace("nf4", "fp4"): PLAIN.tensors[STATE]}
    refused(replace(PLAIN, tensors=PLAIN.tensors | other), tmp_path, "has 2 descriptions")


@pytest.mark.parametrize(
    ("leaf", "made", "match"),
    [
        ("quant_map", ("F32", (15,), bytes(60)), "expected 16"),
        ("quant_map", ("U8", (16,), bytes(16)), "is U8"),
        ("absmax", ("F32", (3,), bytes(12)), r"F32 \[3\], expected 2"),
        ("absmax", ("U8", (2,), bytes(2)), "is U8"),
        ("absmax", ("F32", (1, 2), bytes(8)), r"\[1, 2\], expected 2"),
        ("nested_absmax", ("F32", (1,), bytes(4)), "scales that are codes"),
    ],
)
def test_scales_of_another_size_are_refused(
    leaf: str, made: Tensor, match: str, tmp_path: Path
) -> None:
    refused(with_tensors(PLAIN, **{leaf: made}), tmp_path, match)


def test_nested_scales_of_another_size_are_refused(tmp_path: Path) -> None:
    floats: Tensor = ("F32", (32,), bytes(128))
    refused(with_tensors(NESTED, absmax=floats), tmp_path, "expected 32 of U8")
    short: Tensor = ("F32", (255,), bytes(1020))
    refused(with_tensors(NESTED, nested_quant_map=short), tmp_path, "expected 256")


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (("F64", (8, 1), bytes(64)), "holds no 4-bit codes"),
        (("U8", (), bytes(1)), "holds no 4-bit codes"),
        (("BF16", (31, 1), bytes(62)), "62 bytes of codes, expected 64"),
    ],
)
def test_codes_of_another_size_are_refused(made: Tensor, match: str, tmp_path: Path) -> None:
    sample = replace(PLAIN, tensors={**PLAIN.tensors, PLAIN.name: made})
    refused(sample, tmp_path, match)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (8, 8)])
def test_codes_are_read_in_whatever_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    made: Tensor = ("U8", shape, PLAIN.tensors[PLAIN.name][2])
    sample = replace(PLAIN, tensors={**PLAIN.tensors, PLAIN.name: made})
    coded = sample.coded(tmp_path)
    found = coded.codec.decode_rows(coded, 3, 6, sample.parts())
    assert np.array_equal(found, PLAIN.truth[3:6])


def test_the_map_is_the_one_in_the_file(tmp_path: Path) -> None:
    values = np.linspace(-2, 2, 16).astype("<f4")
    sample = with_tensors(PLAIN, quant_map=("F32", (16,), values.tobytes()))
    coded = sample.coded(tmp_path)
    found = coded.codec.decode_rows(coded, 0, 8, sample.parts())
    assert np.abs(found).max() > np.abs(PLAIN.truth).max()


def test_the_configured_dtype_wins_over_that_of_the_weight(tmp_path: Path) -> None:
    half = four_bits((8, 16), dtype="float16")
    for dtype, expected in ((None, "F16"), ("BF16", "BF16"), ("F32", "BF16")):
        (found,) = recognise(half.stored(tmp_path), Description(dtype=dtype)).values()
        assert found.spec.dtype == expected


def with_eight(**changed: Tensor) -> Sample:
    named = {f"{INT8.module}.{leaf}": value for leaf, value in changed.items()}
    return replace(INT8, tensors={**INT8.tensors, **named})


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"weight": ("U8", (64, 32), bytes(2048))}, "expected a matrix of I8"),
        ({"weight": ("I8", (2048,), bytes(2048))}, "expected a matrix of I8"),
        ({"SCB": ("F32", (32,), bytes(128))}, "one float for each of 64 rows"),
        ({"SCB": ("I8", (64,), bytes(64))}, "one float for each"),
        ({"weight_format": ("F32", (), bytes(4))}, "expected one U8"),
        ({"weight_format": ("U8", (2,), bytes(2))}, "expected one U8"),
        ({"weight_format": ("U8", (), b"\x07")}, "is 7, expected 0 to 3"),
    ],
)
def test_eight_bits_that_do_not_fit_are_refused(
    changed: dict[str, Tensor], match: str, tmp_path: Path
) -> None:
    refused(with_eight(**changed), tmp_path, match)


@pytest.mark.parametrize(("number", "name"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere")])
def test_eight_bits_in_tiles_are_refused_by_name(number: int, name: str, tmp_path: Path) -> None:
    sample = with_eight(weight_format=("U8", (), bytes([number])))
    with pytest.raises(UnsupportedError, match=name) as caught:
        recognise(sample.stored(tmp_path), sample.said)
    assert "16-bit" in str(caught.value.hint)
