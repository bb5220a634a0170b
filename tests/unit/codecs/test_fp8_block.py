"""What only FP8 in blocks has: grids, sizes that are told or inferred, and its scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coded.fp8_block import samples

from loratool.codecs.codec import CodedTensor, Description, recognise
from loratool.codecs.numbers import decode
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

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


def recognised(
    weight: tuple[int, ...],
    grid: tuple[int, ...],
    *,
    name: str = "experts.gate_up_proj",
    block: list[int] | None = None,
    dtype: str = "F32",
) -> CodedTensor:
    names = (name, f"{name}_scale_inv")
    if name.endswith(".weight"):
        names = (name, f"{name}_scale")
    specs = (("F8_E4M3", weight), (dtype, grid))
    stored = {
        key: StoredTensor(TensorSpec(key, *spec), Path("memory"), 0)
        for key, spec in zip(names, specs, strict=True)
    }
    said = Description({"weight_block_size": block} if block else {})
    return recognise(stored, said)[name.removesuffix(".weight")]


def test_gate_and_up_begin_anew_where_their_grids_do() -> None:
    blocks = recognised((2, 36, 20), (2, 6, 2), block=[8, 16]).settings["blocks"]
    assert (blocks.period, blocks.height, blocks.step) == (18, 8, 18)
    ends = [16, 18, 26, 34, 36, 40]
    assert list(blocks.runs(16, 40)) == list(zip(ends, ends[1:], range(2, 7), strict=False))
    even = recognised((2, 32, 20), (2, 4, 2), block=[8, 16]).settings["blocks"]
    assert even.step == 8


def test_where_both_halves_and_the_whole_would_have_such_a_grid_nothing_is_guessed() -> None:
    """13 rows twice: two blocks of 8 each, or four of them in all 26."""
    with pytest.raises(UnsupportedError, match="gate and up") as caught:
        recognised((2, 26, 16), (2, 4, 1), block=[8, 16])
    assert caught.value.hint
    assert recognised((2, 26, 16), (2, 4, 1), block=[8, 16], name="experts.down_proj")


@pytest.mark.parametrize(
    ("weight", "grid", "name"),
    [
        ((2, 32, 20), (3, 4, 2), "experts.down_proj"),
        ((2, 32, 20), (2, 5, 2), "experts.down_proj"),
        ((2, 32, 20), (4, 2), "experts.down_proj"),
        ((8, 4, 3, 3), (2, 1), "conv.weight"),
        ((32, 20), (4, 2, 1), "m.weight"),
        ((32, 20), (5, 2), "m.weight"),
    ],
)
def test_what_is_no_grid_of_a_weight_is_refused(
    weight: tuple[int, ...], grid: tuple[int, ...], name: str
) -> None:
    with pytest.raises(FileFormatError, match=name):
        recognised(weight, grid, name=name, block=[8, 16])


@pytest.mark.parametrize("given", ["128", "axb", [128], {"group": 128}])
def test_a_block_structure_that_is_none_is_refused(given: object) -> None:
    groups = {"group_0": {"weights": {"block_structure": given}}}
    with pytest.raises(FileFormatError, match="block"):
        recognise(BLOCKS[0].stored(), Description({"config_groups": groups}))


def test_groups_that_differ_tell_nothing_that_the_shapes_do_not() -> None:
    groups = {str(n): {"weights": {"block_structure": [n, n]}} for n in (64, 128)}
    (found,) = recognise(BLOCKS[0].stored(), Description({"config_groups": groups})).values()
    assert found.settings["blocks"].height == 128


def test_a_scale_has_one_value_in_a_checkpoint_of_blocks() -> None:
    """Without blocks transformers stores one scale for all, under the same name."""
    one = recognised((32, 20), (1, 1), name="m.weight")
    assert one.codec.name == "fp8"
    assert recognised((3, 5), (1, 1), name="m.weight", block=[8, 16]).codec.name == "fp8-block"
