"""ComfyUI's formats: what its files say of layers, padding, codes as its kernels make them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coded import Sample
from coded.comfy_int8 import samples as int8
from coded.comfy_mxfp8 import samples as mxfp8
from coded.comfy_nvfp4 import METADATA, MODULE, marks, tiled
from coded.comfy_nvfp4 import samples as nvfp4
from coded.fp8_scaled import COMFY
from coded.fp8_scaled import samples as fp8
from samples import FIXTURES

from loratool.codecs.codec import CodedTensor, Description, recognise
from loratool.codecs.numbers import number
from loratool.codecs.swizzled import swizzled, unswizzled
from loratool.codecs.weights import read_matrix
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.containers.safetensors import CONTAINER
from loratool.files.inputs import InputFiles

ONE = {"nvfp4": next(nvfp4()), "mxfp8": next(mxfp8()), "int8_tensorwise": next(int8())}
PLAIN = next(sample for sample in fp8() if sample.label == "comfy-tensor")


def marked(sample: Sample, mark: object, module: str = MODULE) -> Sample:
    data = json.dumps(mark).encode() if not isinstance(mark, bytes) else mark
    name = f"{module}.comfy_quant"
    return replace(sample, tensors={**sample.tensors, name: ("U8", (len(data),), data)})


def with_tensor(sample: Sample, name: str) -> Sample:
    return replace(sample, tensors={**sample.tensors, name: ("F32", (1,), bytes(4))})


def found_in(sample: Sample, folder: Path) -> dict[str, CodedTensor]:
    return recognise(sample.stored(folder), sample.said)


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"format": "convrot_w4a4"}, "'convrot_w4a4'"),
        ({"format": "asym_w4a8_int8"}, "'asym_w4a8_int8'"),
        ({"format": "awq_w4a16"}, "'awq_w4a16'"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "rotated"),
    ],
)
@pytest.mark.parametrize("kind", [*ONE, "float8_e4m3fn"])
def test_other_formats_are_refused_by_name(
    kind: str, mark: object, words: str, tmp_path: Path
) -> None:
    one = marked(ONE[kind], mark) if kind in ONE else marked(PLAIN, mark, COMFY)
    with pytest.raises(UnsupportedError, match=words) as caught:
        found_in(one, tmp_path)
    assert caught.value.hint and one.module in str(caught.value)


@pytest.mark.parametrize(
    "mark", [b'{"format": "nvf', b"", {"kind": "nvfp4"}, ["nvfp4"], {"format": 4}, b"x" * 70000]
)
def test_a_damaged_mark_is_refused(mark: object, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="comfy_quant"):
        found_in(marked(ONE["nvfp4"], mark), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"layers": []}'])
def test_damaged_metadata_are_refused(text: str, tmp_path: Path) -> None:
    one = replace(ONE["nvfp4"], said=Description(metadata={METADATA: text}))
    with pytest.raises(FileFormatError, match=METADATA):
        found_in(one, tmp_path)


@pytest.mark.parametrize("kind", ["nvfp4", "float8_e4m3fn"])
def test_smoothed_weights_are_refused(kind: str, tmp_path: Path) -> None:
    one = ONE.get(kind, PLAIN)
    with pytest.raises(UnsupportedError, match="pre_quant_scale"):
        found_in(with_tensor(one, f"{one.module}.pre_quant_scale"), tmp_path)


def test_fp4_that_modelopt_wrote_for_comfy_is_refused(tmp_path: Path) -> None:
    _, metadata = marks("nvfp4", "metadata")
    said = Description(metadata={**metadata, "quantization_config": "{}"})
    with pytest.raises(UnsupportedError, match="modelopt"):
        found_in(replace(ONE["nvfp4"], said=said), tmp_path)


def test_metadata_of_another_layer_is_not_of_this_one(tmp_path: Path) -> None:
    """A name without the model's prefix that is another tensor's own means that one."""
    one = next(sample for sample in mxfp8() if sample.label.startswith("short names"))
    assert found_in(one, tmp_path)[MODULE].codec.name == "comfy-mxfp8"
    short = MODULE.removeprefix("model.diffusion_model.")
    found = recognise(with_tensor(one, f"{short}.weight").stored(tmp_path), Description())
    assert MODULE not in found or found[MODULE].codec.name != "comfy-mxfp8"


def test_a_weight_that_is_no_code_any_more_needs_no_mark(tmp_path: Path) -> None:
    one = marked(ONE["nvfp4"], {"format": "convrot_w4a4"})
    weight = ("BF16", (2, 2), bytes(8))
    mark = f"{MODULE}.comfy_quant"
    plain = {f"{MODULE}.weight": weight, mark: one.tensors[mark]}
    assert found_in(replace(one, tensors=plain), tmp_path) == {}


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_scales_that_are_no_tiles_are_refused(kind: str, tmp_path: Path) -> None:
    one = ONE[kind]
    name = f"{MODULE}.weight_scale"
    dtype, _, data = one.tensors[name]
    cut = replace(one, tensors={**one.tensors, name: (dtype, (16, 4), data[:64])})
    with pytest.raises(FileFormatError, match=r"expected .* of \[128, 4\]"):
        found_in(cut, tmp_path)


@pytest.mark.parametrize("shape", [(1, 1), (33, 3), (128, 4), (130, 9), (300, 5)])
def test_tiles(shape: tuple[int, int]) -> None:
    scales = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    stored = swizzled(scales)
    assert np.array_equal(stored, tiled(scales))
    assert np.array_equal(unswizzled(stored)[: shape[0], : shape[1]], scales)


@pytest.mark.parametrize(("library", "case"), [("comfy-fp4", "nvfp4"), ("comfy-fp8", "mxfp8")])
def test_codes_are_those_of_its_kernels(library: str, case: str) -> None:
    file = CONTAINER.open(FIXTURES / "quantised" / f"{library}.safetensors")
    prefix = f"{case}-f32/stored/"
    told = json.loads(file.metadata[f"{case}-f32"])
    stored = {
        name.removeprefix(prefix): replace(
            part, spec=replace(part.spec, name=name.removeprefix(prefix))
        )
        for name, part in file.tensors.items()
        if name.startswith(prefix)
    }
    (coded,) = recognise(stored, Description(metadata=told["metadata"])).values()
    files = InputFiles({})
    given = read_matrix(file.tensors[f"{case}-f32/input"], files)
    made = coded.codec.encoder(coded).encode(0, coded.rows, given, float(np.abs(given).max()))
    different = {}
    for role, (first, rows) in made.items():
        part = coded.parts[role]
        data = part.path.read_bytes()[part.offset : part.offset + part.spec.nbytes]
        theirs = np.frombuffer(data, number(part.spec.dtype).code).reshape(part.spec.shape)
        assert first == 0 and rows.shape == theirs.shape
        different[role] = int((np.asarray(rows).view(theirs.dtype) != theirs).sum())
    files.close()
    assert not any(different.values()), different
