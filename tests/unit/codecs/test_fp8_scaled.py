"""What only FP8 with few scales has: shapes that tell, and those that do not; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coded import MODULE, MemoryParts, Sample, Tensor, tensor
from coded.fp8_scaled import EXPERTS, FBGEMM, codes, samples

from loratool.codecs.codec import CodedTensor, Description, recognise
from loratool.codecs.numbers import decode
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

SAID = Description()
ROWS = next(sample for sample in samples() if sample.label.startswith("weight_scale-200x1-"))


def stored(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(TensorSpec(name, dtype, shape), Path("memory"), 0)
        for name, (dtype, shape) in tensors.items()
    }


def found_in(
    weight: tuple[int, ...],
    scale: tuple[int, ...],
    said: Description = SAID,
    module: str = MODULE,
    leaf: str = "weight_scale",
    dtype: str = "F32",
) -> CodedTensor:
    is_parameter = module.startswith(EXPERTS)
    names = (
        (module, f"{module}_{leaf}") if is_parameter else (f"{module}.weight", f"{module}.{leaf}")
    )
    found = recognise(stored({names[0]: ("F8_E4M3", weight), names[1]: (dtype, scale)}), said)
    return found[module]


@pytest.mark.parametrize("shape", [(3,), (4,), (2,)])
def test_scales_of_several_matrices_in_one_are_not_guessed(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="nothing tells the rows") as caught:
        found_in((48, 8), shape)
    assert caught.value.hint and MODULE in str(caught.value)


def test_those_of_gate_and_up_are_halves() -> None:
    blocks = found_in((48, 8), (2,), module="a.mlp.gate_up_proj").settings["blocks"]
    assert (blocks.height, blocks.grid) == (24, (2, 1))
    with pytest.raises(UnsupportedError):
        found_in((49, 8), (2,), module="a.mlp.gate_up_proj")


def test_square_experts_are_not_guessed_but_those_of_fbgemm_are_known() -> None:
    module = f"{EXPERTS}.down_proj"
    with pytest.raises(UnsupportedError, match="of rows or of columns"):
        found_in((2, 6, 6), (2, 6, 1), module=module, leaf="scale")
    known = found_in((2, 6, 6), (2, 6, 1), FBGEMM, module, "scale")
    assert known.settings["blocks"].breadth == 1


@pytest.mark.parametrize("dtype", ["I32", "F64", "I8", "F8_E4M3"])
def test_a_scale_is_a_float(dtype: str) -> None:
    with pytest.raises(FileFormatError, match=f"is {dtype}, expected one of"):
        found_in((4, 4), (), dtype=dtype)


def test_two_scales_contradict_each_other() -> None:
    names = {f"{MODULE}.weight": ("F8_E4M3", (4, 4))}
    names |= {f"{MODULE}.{leaf}": ("F32", ()) for leaf in ("weight_scale", "scale_weight")}
    with pytest.raises(FileFormatError, match="several scales"):
        recognise(stored(names), Description())


def test_smoothed_weights_are_refused() -> None:
    names = {f"{MODULE}.weight": ("F8_E4M3", (4, 4)), f"{MODULE}.weight_scale": ("F32", ())}
    names[f"{MODULE}.pre_quant_scale"] = ("F32", (4,))
    with pytest.raises(UnsupportedError, match="pre_quant_scale"):
        recognise(stored(names), Description())


def test_rotated_weights_are_refused() -> None:
    said = Description({"transform_config": {"config_groups": {"R1": {}}}})
    with pytest.raises(UnsupportedError, match="rotated"):
        found_in((4, 4), (4, 1), said)


def decoded(sample: Sample, folder: Path, kind: type = np.float64) -> np.ndarray:
    coded = sample.coded(folder)
    return coded.codec.decode_rows(coded, 0, coded.rows, sample.parts(), kind)


def scaled_by(weight: Tensor, scale: Tensor) -> Sample:
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale": scale}
    return replace(ROWS, tensors=tensors)


def test_a_scale_of_minus_zero_makes_zeros(tmp_path: Path) -> None:
    weight, _ = codes(np.random.default_rng(0), (4, 4))
    scale, _ = tensor(np.array(-0.0), "F32")
    found = decoded(scaled_by(weight, scale), tmp_path)
    assert (found == 0).all()


def test_codes_that_are_nan_stay_so(tmp_path: Path) -> None:
    """It is the merge that refuses them, where it would change them."""
    scale, _ = tensor(np.array(2.0), "F32")
    weight = ("F8_E4M3", (2, 2), b"\x7f\xff\x38\xb8")
    found = decoded(scaled_by(weight, scale), tmp_path, np.float32)
    assert np.isnan(found[0]).all() and found[1].tolist() == [2.0, -2.0]


def test_products_are_not_rounded_to_the_dtype_of_the_scale(tmp_path: Path) -> None:
    scale, number = tensor(np.array(1 + 2.0**-7), "BF16")
    weight = ("F8_E4M3", (1, 2), b"\x39\x3b")  # 1.125 and 1.375
    found = decoded(scaled_by(weight, scale), tmp_path, np.float32)
    assert found.tolist() == [[1.125 * number, 1.375 * number]]


def test_rows_have_their_own_largest_number(tmp_path: Path) -> None:
    coded = ROWS.coded(tmp_path)
    values = np.random.default_rng(1).standard_normal((200, 70)) * np.logspace(-6, 2, 200)[:, None]
    made = coded.codec.encoder(coded).encode(0, 200, values)
    names = {"weight": f"{MODULE}.weight", "scale": f"{MODULE}.weight_scale"}
    parts = MemoryParts({names[role]: rows.tobytes() for role, (_, rows) in made.items()})
    back = coded.codec.decode_rows(coded, 0, 200, parts)
    largest = np.abs(values).max(axis=1, keepdims=True)
    # Half a step of four bits, and what a scale in bfloat16 makes of the largest one.
    assert (np.abs(back - values) <= np.abs(values) / 16 + largest * 2.0**-9).all()
    scales = decode(made["scale"][1], "BF16", (200, 1))
    np.testing.assert_allclose(scales, largest / 448, rtol=2.0**-8)


def test_one_scale_for_all_rows_needs_the_largest_of_all(tmp_path: Path) -> None:
    sample = next(samples())
    coded = sample.coded(tmp_path)
    encoder = coded.codec.encoder(coded)
    assert encoder.needs_largest and encoder.step == 1
    with pytest.raises(ValueError, match="finite"):
        encoder.encode(0, 1, np.full((1, 17), 3.0), 2.0)  # that is not the largest
    first = encoder.encode(0, 2, np.full((2, 17), 1.0), 448.0)
    assert first["scale"][1].shape == () and first["scale"][1] == 1.0
    assert set(first["weight"][1].reshape(-1).tolist()) == {0x38}
