"""What every codec of quantised weights has to keep, and samples of each, ragged edges included."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.codecs import codec as codecs
from loratool.codecs.codec import CodedTensor, Read, claims, codec_named, recognise
from loratool.codecs.numbers import decode, number
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

MODULE = "model.layers.0.mlp.up_proj"


@dataclass
class Sample:
    """One coded weight in memory.

    Attributes:
        codec: The file of its codec.
        tensors: Dtype, shape and bytes by name.
        config: ``config.json``.
        truth: The numbers that it stands for, by the formula.
    """

    codec: str
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
    config: dict[str, Any]
    truth: np.ndarray

    def stored(self) -> dict[str, StoredTensor]:
        return {
            name: StoredTensor(TensorSpec(name, dtype, shape), Path("memory"), 0)
            for name, (dtype, shape, _) in self.tensors.items()
        }

    def coded(self) -> CodedTensor:
        found = recognise(self.stored(), self.config)
        assert list(found) == [MODULE]
        return found[MODULE]

    def read(self, stored: StoredTensor, start: int, stop: int) -> memoryview:
        return rows_of(self.tensors[stored.spec.name][2], stored, start, stop)


def rows_of(data: bytes, stored: StoredTensor, start: int, stop: int) -> memoryview:
    rows = stored.spec.shape[0] if stored.spec.shape else 1
    assert 0 <= start <= stop <= rows
    size = len(data) // rows
    return memoryview(data)[start * size : stop * size]


def fp8_block_samples() -> Iterator[Sample]:
    random = np.random.default_rng(0)
    for (out, into), block, scale in (
        ((256, 384), (128, 128), "F32"),
        ((200, 150), (128, 128), "F32"),
        ((200, 150), (128, 128), "BF16"),
        ((37, 50), (16, 8), "F8_E8M0"),
        ((37, 50), (16, 8), "U8"),
        ((3, 5), (128, 128), "F32"),
    ):
        grid = (-(-out // block[0]), -(-into // block[1]))
        codes = random.integers(0, 0x7F, (out, into), dtype=np.uint8)
        codes |= random.integers(0, 2, (out, into), dtype=np.uint8) << 7
        kind = "F8_E8M0" if scale == "U8" else scale
        scales = random.integers(100, 130, grid) if kind == "F8_E8M0" else random.random(grid)
        raw = scales.astype("u1") if kind == "F8_E8M0" else (scales * 1e-3).astype("<f4")
        if scale == "BF16":
            raw = (raw.view("<u4") >> 16).astype("<u2")
        values = decode(codes, "F8_E4M3", codes.shape)
        numbers = decode(raw, kind, grid)
        spread = np.repeat(np.repeat(numbers, block[0], axis=0), block[1], axis=1)
        yield Sample(
            "fp8_block",
            {
                f"{MODULE}.weight": ("F8_E4M3", (out, into), codes.tobytes()),
                f"{MODULE}.weight_scale_inv": (scale, grid, raw.tobytes()),
                "model.norm.weight": ("BF16", (8,), bytes(16)),
            },
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}},
            values * spread[:out, :into],
        )


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {"fp8_block": fp8_block_samples}
ALL = [sample for samples in SAMPLES.values() for sample in samples()]
every_sample = pytest.mark.parametrize("sample", ALL, ids=lambda s: f"{s.codec}-{s.truth.shape}")


def test_every_codec_has_samples() -> None:
    assert {claim.codec for claim in claims()} == set(SAMPLES)


def encoded(coded: CodedTensor, values: np.ndarray, cuts: list[int]) -> dict[str, bytes]:
    """Encode by blocks of rows and put the parts together."""
    parts = {
        role: np.zeros(stored.spec.shape, number(stored.spec.dtype).code)
        for role, stored in coded.parts.items()
    }
    for start, stop in zip([0, *cuts], [*cuts, coded.rows], strict=True):
        made = coded.codec.encode_rows(coded, start, stop, values[start:stop])
        for role, (first, rows) in made.items():
            parts[role][first : first + len(rows)] = rows
    return {coded.parts[role].spec.name: array.tobytes() for role, array in parts.items()}


def reader_of(parts: dict[str, bytes]) -> Read:
    return lambda stored, start, stop: rows_of(parts[stored.spec.name], stored, start, stop)


@every_sample
def test_it_is_recognised_and_decoded_by_the_formula(sample: Sample) -> None:
    coded = sample.coded()
    assert coded.codec is codec_named(sample.codec)
    assert coded.spec == TensorSpec(f"{MODULE}.weight", "BF16", sample.truth.shape)
    found = coded.codec.decode_rows(coded, 0, coded.rows, sample.read)
    assert np.array_equal(found, sample.truth)
    single = coded.codec.decode_rows(coded, 0, coded.rows, sample.read, np.float32)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, sample.truth, rtol=2.0**-22)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
@every_sample
def test_rows_of_any_cut_are_rows_of_the_whole(sample: Sample, data: st.DataObject) -> None:
    coded = sample.coded()
    start = data.draw(st.integers(0, coded.rows))
    stop = data.draw(st.integers(start, coded.rows))
    found = coded.codec.decode_rows(coded, start, stop, sample.read)
    assert np.array_equal(found, sample.truth[start:stop])


@every_sample
def test_encoding_what_was_decoded_changes_nothing_any_more(sample: Sample) -> None:
    coded = sample.coded()
    random = np.random.default_rng(1)
    values = random.standard_normal(sample.truth.shape) * np.exp(random.standard_normal())
    values[: coded.codec.row_step(coded)] *= 1e-3
    values[-1] = 0
    for _ in range(2):
        read = reader_of(encoded(coded, values, []))
        before, values = values, coded.codec.decode_rows(coded, 0, coded.rows, read)
    assert np.array_equal(before, values)


@every_sample
def test_encoding_by_blocks_is_encoding_the_whole(sample: Sample) -> None:
    coded = sample.coded()
    step = coded.codec.row_step(coded)
    whole = encoded(coded, sample.truth, [])
    assert encoded(coded, sample.truth, list(range(step, coded.rows, step))) == whole
    if coded.rows > 1 and step > 1:
        with pytest.raises(ValueError, match="rows"):
            coded.codec.encode_rows(coded, 0, 1, sample.truth[:1])
    with pytest.raises(ValueError, match="finite"):
        coded.codec.encode_rows(coded, 0, coded.rows, np.full_like(sample.truth, np.inf))


def test_a_codec_is_imported_only_once_its_claim_matches() -> None:
    code = (
        "import sys; from loratool.codecs.codec import recognise; "
        "assert recognise({'a.weight': None, 'a.scale': None}, {'model_type': 'x'}) == {}; "
        "print([name for name in sys.modules if name.endswith('fp8_block')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("roles", "expected"),
    [(("weight",), "fp8-block"), (("weight", "scale"), None), (("weight", "scale", "x"), "other")],
)
def test_the_codec_that_explains_most_is_right_and_a_tie_is_an_error(
    roles: tuple[str, ...], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ALL[0]
    coded = sample.coded()

    class Other:
        name = "other"

        def recognise(self, tensors: Any, config: Any) -> dict[str, CodedTensor]:
            parts = {role: coded.parts.get(role, coded.parts["scale"]) for role in roles}
            return {MODULE: CodedTensor(self, parts, coded.spec)}

    monkeypatch.setattr(codecs, "_claimed", lambda *_: [coded.codec, Other()])
    if expected is None:
        with pytest.raises(UnsupportedError, match=r"fp8-block.*other"):
            recognise(sample.stored(), sample.config)
    else:
        found = recognise(sample.stored(), sample.config)
        assert found[MODULE].codec.name == expected


def test_block_fp8_needs_a_grid_that_fits() -> None:
    sample = ALL[0]
    wrong = {"quantization_config": {"weight_block_size": [64, 64]}}
    with pytest.raises(FileFormatError, match="64 × 64"):
        recognise(sample.stored(), wrong)
    (inferred,) = recognise(sample.stored(), {}).values()
    assert inferred.settings["block"] == (128, 128)
    nested = {"text_config": {**sample.config, "dtype": "float16"}}
    (found,) = recognise(sample.stored(), nested).values()
    assert found.spec.dtype == "F16"


@pytest.mark.parametrize("given", ["16", 16, [16], [0, 16], [-16, 16], [16.0, 16], [16, 16, 16]])
def test_block_fp8_refuses_a_size_that_is_none(given: object) -> None:
    with pytest.raises(FileFormatError, match="weight_block_size: is"):
        recognise(ALL[0].stored(), {"quantization_config": {"weight_block_size": given}})


def test_block_fp8_does_not_guess_between_sizes_that_make_the_same_grid() -> None:
    ragged = next(s for s in ALL if s.config["quantization_config"]["weight_block_size"] == [16, 8])
    assert recognise(ragged.stored(), ragged.config)
    with pytest.raises(FileFormatError, match="several sizes") as caught:
        recognise(ragged.stored(), {})
    assert "weight_block_size" in str(caught.value.hint)


def test_block_fp8_scales_are_the_largest_number_over_448() -> None:
    sample = ALL[1]
    coded = sample.coded()
    parts = encoded(coded, sample.truth, [])
    scales = decode(parts[f"{MODULE}.weight_scale_inv"], "F32", (2, 2))
    expected = [
        [np.abs(sample.truth[i : i + 128, j : j + 128]).max() / 448 for j in (0, 128)]
        for i in (0, 128)
    ]
    assert np.array_equal(scales, np.array(expected, dtype=np.float32))
    codes = decode(parts[f"{MODULE}.weight"], "F8_E4M3", coded.spec.shape)
    assert np.abs(codes[:128, :128]).max() == 448
