"""What only FP8 in blocks has: grids, sizes that are told or inferred, and its scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coded.fp8_block import samples

from loratool.codecs.codec import Description, recognise
from loratool.codecs.numbers import decode
from loratool.errors import FileFormatError

BLOCKS = list(samples())


def test_block_fp8_needs_a_grid_that_fits() -> None:
    sample = BLOCKS[0]
    wrong = Description({"weight_block_size": [64, 64]})
    with pytest.raises(FileFormatError, match="64 × 64"):
        recognise(sample.stored(), wrong)
    (inferred,) = recognise(sample.stored(), Description()).values()
    assert (inferred.settings["blocks"].height, inferred.settings["blocks"].breadth) == (128, 128)
    (found,) = recognise(sample.stored(), Description(dtype="F16")).values()
    assert found.spec.dtype == "F16"


@pytest.mark.parametrize("given", ["16", 16, [16], [0, 16], [-16, 16], [16.0, 16], [16, 16, 16]])
def test_block_fp8_refuses_a_size_that_is_none(given: object) -> None:
    with pytest.raises(FileFormatError, match="weight_block_size: is"):
        recognise(BLOCKS[0].stored(), Description({"weight_block_size": given}))


def test_block_fp8_does_not_guess_between_sizes_that_make_the_same_grid() -> None:
    ragged = next(s for s in BLOCKS if s.said.quantization["weight_block_size"] == [16, 8])
    assert recognise(ragged.stored(), ragged.said)
    with pytest.raises(FileFormatError, match="several sizes") as caught:
        recognise(ragged.stored(), Description())
    assert "weight_block_size" in str(caught.value.hint)


def test_block_fp8_scales_are_the_largest_number_over_448(tmp_path: Path) -> None:
    sample = BLOCKS[1]
    coded = sample.coded(tmp_path)
    parts = coded.codec.encoder(coded).encode(0, coded.rows, sample.truth)
    expected = [
        [np.abs(sample.truth[i : i + 128, j : j + 128]).max() / 448 for j in (0, 128)]
        for i in (0, 128)
    ]
    assert np.array_equal(parts["scale"][1], np.array(expected, dtype=np.float32))
    codes = decode(parts["weight"][1], "F8_E4M3", coded.spec.shape)
    assert np.abs(codes[:128, :128]).max() == 448
