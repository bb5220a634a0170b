"""FP4 in bytes that claim to be whole numbers: what does not fit together, and what it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from coded.fp4_int8 import samples

from loratool.codecs.codec import Description, recognise
from loratool.errors import FileFormatError

ONE = next(samples())
CODES, SCALE = ONE.tensors


@pytest.mark.parametrize("shape", [(9, 1), (9, 3), (8, 2), (18,), (9, 2, 1)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    dtype, _, data = ONE.tensors[SCALE]
    cut = replace(ONE, tensors={**ONE.tensors, SCALE: (dtype, shape, data)})
    with pytest.raises(FileFormatError, match=r"one for each 32 inputs"):
        recognise(cut.stored(), ONE.said)


def test_scales_that_are_floats_are_of_whole_numbers() -> None:
    module = ONE.module
    tensors = {CODES: ONE.tensors[CODES], f"{module}.weight_scale": ("F32", (9, 1), bytes(36))}
    (found,) = recognise(replace(ONE, tensors=tensors).stored(), Description()).values()
    assert found.codec.name == "compressed-tensors-int"
