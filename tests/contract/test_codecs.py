"""What every codec of quantised weights has to keep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded import MODULE, MemoryParts, Sample, all_samples
from coded.fp8_block import samples as fp8_block_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.codecs import codec as codecs
from loratool.codecs.codec import (
    CodedTensor,
    Encoder,
    claims,
    codec_named,
    recognise,
)
from loratool.codecs.numbers import number
from loratool.codecs.weights import read_matrix, rows_of
from loratool.errors import FileFormatError, LoratoolError, UnsupportedError
from loratool.files.dtypes import DTYPES
from loratool.files.inputs import InputFiles
from loratool.files.spec import TensorSpec

ALL = list(all_samples())
BLOCKS = list(fp8_block_samples())
every_sample = pytest.mark.parametrize("sample", ALL, ids=str)


def test_every_codec_has_samples() -> None:
    assert {claim.codec for claim in claims()} == {sample.codec for sample in ALL}
    assert len({str(sample) for sample in ALL}) == len(ALL)


def encoder_of(coded: CodedTensor) -> Encoder:
    try:
        return coded.codec.encoder(coded)
    except UnsupportedError as error:
        hint = error.hint
    assert hint
    pytest.skip("it is not written again")


def elements(data: bytes, spec: TensorSpec) -> np.ndarray:
    """Return the elements of a part; rows of bytes, where they are in blocks."""
    if DTYPES[spec.dtype].block:
        return np.frombuffer(data, np.uint8).reshape(spec.elements // spec.shape[-1], -1)
    return np.frombuffer(data, number(spec.dtype).code).reshape(spec.shape)


def encoded(coded: CodedTensor, values: np.ndarray, cuts: list[int], sample: Sample) -> MemoryParts:
    """Encode by blocks of rows and put the parts together."""
    parts = {
        role: elements(sample.tensors[stored.spec.name][2], stored.spec)
        for role, stored in coded.parts.items()
    }
    encoder = encoder_of(coded)
    largest = float(np.abs(values).max()) if encoder.needs_largest else None
    written = {}
    for start, stop in zip([0, *cuts], [*cuts, coded.rows], strict=True):
        for role, (first, rows) in encoder.encode(start, stop, values[start:stop], largest).items():
            assert role in encoder.roles
            array = written.setdefault(role, np.full_like(parts[role], 0))
            if array.ndim:
                array[first : first + len(rows)] = rows
            else:
                array[...] = rows.reshape(())
    assert not values.size or set(written) == set(encoder.roles)
    made = parts | written
    return MemoryParts({coded.parts[role].spec.name: a.tobytes() for role, a in made.items()})


def decoded(sample: Sample, folder: Path) -> np.ndarray:
    coded = sample.coded(folder)
    return coded.codec.decode_rows(coded, 0, coded.rows, sample.parts())


def matrix(sample: Sample, coded: CodedTensor) -> np.ndarray:
    return sample.truth.reshape(coded.rows, coded.width)


@every_sample
def test_it_is_recognised_and_decoded_by_the_formula(sample: Sample, tmp_path: Path) -> None:
    coded = sample.coded(tmp_path)
    assert coded.codec is codec_named(sample.codec)
    assert coded.spec == TensorSpec(sample.name, sample.dtype, sample.truth.shape)
    found = coded.codec.decode_rows(coded, 0, coded.rows, sample.parts())
    assert found.dtype == np.float64
    assert np.array_equal(found, matrix(sample, coded))
    single = coded.codec.decode_rows(coded, 0, coded.rows, sample.parts(), np.float32)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, matrix(sample, coded), rtol=2.0**-21, atol=1e-30)


@every_sample
def test_it_is_read_from_files(sample: Sample, tmp_path: Path) -> None:
    coded = sample.coded(tmp_path)
    files = InputFiles({})
    assert np.array_equal(read_matrix(coded, files), sample.truth)
    source = rows_of(coded, coded.width, files)
    single = np.frombuffer(source.read(0, coded.rows), np.float32)
    expected = coded.codec.decode_rows(coded, 0, coded.rows, sample.parts(), np.float32)
    assert np.array_equal(single, expected.reshape(-1))
    files.close()


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@every_sample
def test_rows_of_any_cut_are_rows_of_the_whole(
    sample: Sample, data: st.DataObject, tmp_path: Path
) -> None:
    coded = sample.coded(tmp_path)
    start = data.draw(st.integers(0, coded.rows))
    stop = data.draw(st.integers(start, coded.rows))
    found = coded.codec.decode_rows(coded, start, stop, sample.parts())
    assert np.array_equal(found, matrix(sample, coded)[start:stop])


@every_sample
def test_encoding_what_was_decoded_changes_nothing_any_more(sample: Sample, tmp_path: Path) -> None:
    coded = sample.coded(tmp_path)
    step = encoder_of(coded).step
    random = np.random.default_rng(1)
    values = random.standard_normal((coded.rows, coded.width)) * np.exp(random.standard_normal())
    values[:step] *= 1e-3
    values[-1] = 0
    for _ in range(3):
        parts = encoded(coded, values, [], sample)
        before, values = values, coded.codec.decode_rows(coded, 0, coded.rows, parts)
    assert np.array_equal(before, values)


@every_sample
def test_encoding_by_blocks_is_encoding_the_whole(sample: Sample, tmp_path: Path) -> None:
    coded = sample.coded(tmp_path)
    encoder = encoder_of(coded)
    step, truth = encoder.step, matrix(sample, coded)
    whole = encoded(coded, truth, [], sample)
    assert encoded(coded, truth, list(range(step, coded.rows, step)), sample) == whole
    if coded.rows > 1 and step > 1:
        with pytest.raises(ValueError, match="rows"):
            encoder.encode(0, 1, truth[:1], 1.0)
    with pytest.raises(ValueError, match="finite"):
        encoder.encode(0, coded.rows, np.full_like(truth, np.inf), np.inf)


@every_sample
def test_one_that_is_not_whole_is_refused_or_not_recognised(sample: Sample, tmp_path: Path) -> None:
    coded = sample.coded(tmp_path)
    for part in coded.parts.values():
        if part.spec.name in sample.optional:
            continue
        rest = sample.without(part.spec.name)
        message = ""
        found: dict[str, CodedTensor] = {}
        try:
            found = recognise(rest.stored(tmp_path), rest.said)
        except LoratoolError as error:
            message = str(error)
        assert sample.module not in found, part.spec.name
        assert not message or sample.module in message or sample.name in message


@every_sample
def test_a_scale_that_is_none_is_refused(sample: Sample, tmp_path: Path) -> None:
    for name in sample.scales:
        with pytest.raises(FileFormatError, match="NaN"):
            decoded(sample.with_nan(name), tmp_path)


def test_a_codec_is_imported_only_once_its_claim_matches() -> None:
    code = (
        "import sys; from loratool.codecs.codec import Description, recognise; "
        "from loratool.files.spec import StoredTensor, TensorSpec; "
        "w = StoredTensor(TensorSpec('a', 'F32', (1,)), None, 0); "
        "assert recognise(dict.fromkeys(('a.weight', 'a.scale'), w), Description()) == {}; "
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
    roles: tuple[str, ...], expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sample = BLOCKS[0]
    coded = sample.coded(tmp_path)

    class Other:
        name = "other"

        def recognise(self, tensors: Any, said: Any) -> dict[str, CodedTensor]:
            parts = {role: coded.parts.get(role, coded.parts["scale"]) for role in roles}
            return {MODULE: CodedTensor(self, parts, coded.spec)}

    monkeypatch.setattr(codecs, "_claimed", lambda *_: [coded.codec, Other()])
    if expected is None:
        with pytest.raises(UnsupportedError, match=r"fp8-block.*other"):
            recognise(sample.stored(), sample.said)
    else:
        found = recognise(sample.stored(), sample.said)
        assert found[MODULE].codec.name == expected
