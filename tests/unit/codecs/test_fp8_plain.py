"""FP8 without scales: only where nothing speaks of any; else a weight without one is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coded.fp8_plain import samples

from loratool.codecs.codec import Description, recognise
from loratool.codecs.numbers import decode
from loratool.errors import FileFormatError, UnsupportedError
from loratool.files.spec import StoredTensor, TensorSpec

UNET = "model.diffusion_model.blocks"
T5 = "text_encoders.t5xxl.transformer.encoder.block"
METADATA = "_quantization_metadata"
LAYERS = '{"layers": {"model.diffusion_model.blocks.1": {"format": "nvfp4"}}}'
WEIGHT = ("F8_E4M3", (4, 4))


def stored(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(TensorSpec(name, dtype, shape), Path("memory"), 0)
        for name, (dtype, shape) in tensors.items()
    }


def formats(tensors: dict[str, tuple[str, tuple[int, ...]]], **said: object) -> dict[str, str]:
    found = recognise(stored(tensors), Description(**said))  # type: ignore[arg-type]
    return {module: coded.codec.name for module, coded in found.items()}


def test_everything_in_fp8_is_a_number() -> None:
    names = {"a.weight": WEIGHT, "a.bias": ("F8_E4M3", (4,)), "norm.scale": ("F8_E5M2", (4,))}
    names |= {"logit_scale": ("F8_E4M3", ()), "b.weight": ("BF16", (4, 4))}
    found = formats(names)
    assert found == dict.fromkeys(("a", "a.bias", "norm.scale", "logit_scale"), "fp8-plain")


def test_a_weight_without_a_scale_among_others_is_damaged() -> None:
    names = {f"{UNET}.0.weight": WEIGHT, f"{UNET}.1.weight": WEIGHT}
    names[f"{UNET}.0.weight_scale"] = ("F32", ())
    with pytest.raises(FileFormatError, match=rf"{UNET}\.1\.weight: .*no scale beside it, as"):
        formats(names)


@pytest.mark.parametrize("leaf", ["input_scale", "scale_input", "activation_scale"])
def test_what_only_scaled_weights_have_tells_that_one_is_damaged(leaf: str) -> None:
    with pytest.raises(FileFormatError, match="no scale beside it, but is said"):
        formats({"a.weight": WEIGHT, f"a.{leaf}": ("F32", ())})


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "modelopt"])
def test_a_configuration_of_scaled_weights_tells_too(method: str) -> None:
    with pytest.raises(FileFormatError, match="no scale beside it"):
        formats({"a.weight": WEIGHT}, quantization={"quant_method": method})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scaled_fp8": ("F8_E4M3", (0,))}, {}),
        ({"model.diffusion_model.scaled_fp8": ("F32", (2,))}, {}),
        ({f"{UNET}.1.comfy_quant": ("U8", (4,))}, {}),
        ({f"{UNET}.1.absmax": ("F32", (4,))}, {}),
        ({}, {"quantization": {"quant_method": "torchao"}}),
        ({f"{UNET}.1.weight": ("BF16", (4, 4))}, {"metadata": {METADATA: LAYERS}}),
    ],
)
def test_nothing_is_read_where_something_speaks_of_scales(
    more: dict[str, tuple[str, tuple[int, ...]]], said: dict[str, object]
) -> None:
    prefix = "" if "scaled_fp8" in more else "model.diffusion_model."
    assert formats({f"{prefix}a.weight": WEIGHT, **more}, **said) == {}


def test_each_model_of_a_file_is_judged_by_itself() -> None:
    names = {f"{UNET}.0.weight": WEIGHT, f"{UNET}.0.scale_weight": ("F32", ())}
    names |= {"model.diffusion_model.scaled_fp8": ("F8_E4M3", (0,)), f"{T5}.0.weight": WEIGHT}
    assert formats(names) == {f"{UNET}.0": "fp8", f"{T5}.0": "fp8-plain"}


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
def test_what_comfy_does_not_scale_is_cast(leaf: str) -> None:
    names = {f"{T5}.0.q.weight": WEIGHT, f"{T5}.0.q.{leaf}": ("F32", ())}
    table = "text_encoders.t5xxl.transformer.shared"
    others = (f"{table}.weight", f"{T5}.0.norm.weight", f"{T5}.0.bias", f"{T5}.0.conv.weight")
    shapes = ((9, 4), (4,), (4,), (4, 3, 1, 1))
    names |= {name: ("F8_E4M3", shape) for name, shape in zip(others, shapes, strict=True)}
    with pytest.raises(FileFormatError, match="no scale beside it"):
        formats(names)
    marker = {"text_encoders.t5xxl.transformer.scaled_fp8": ("F8_E4M3", (0,))}
    said = {
        METADATA: '{"layers": {"text_encoders.t5xxl.transformer.encoder.block.0.q": '
        '{"format": "float8_e4m3fn"}}}'
    }
    more = {"metadata": said} if leaf == "weight_scale" else {}
    found = formats(names if more else names | marker, **more)
    plain = dict.fromkeys((name.removesuffix(".weight") for name in others), "fp8-plain")
    assert found == {f"{T5}.0.q": "fp8", **plain}


def test_metadata_of_one_model_say_nothing_of_another() -> None:
    assert formats({f"{T5}.0.weight": WEIGHT}, metadata={METADATA: LAYERS}) == {
        f"{T5}.0": "fp8-plain"
    }


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "F8_E5M2FNUZ"])
@pytest.mark.parametrize("scale", [False, True])
def test_amds_fp8_is_refused_by_name(dtype: str, scale: bool) -> None:
    more = {"a.weight_scale": ("F32", ())} if scale else {}
    with pytest.raises(UnsupportedError, match=rf"a\.weight.*{dtype}") as caught:
        formats({"a.weight": (dtype, (4, 4)), **more})
    assert caught.value.hint


def test_scales_of_fp4_are_no_weights() -> None:
    names = {"a.weight_packed": ("U8", (4, 8)), "a.weight_scale": ("F8_E4M3", (4, 1))}
    names["a.weight_global_scale"] = ("F32", (1,))
    assert formats(names) == {"a": "nvfp4"}


def test_what_is_too_large_becomes_the_largest(tmp_path: Path) -> None:
    for sample in list(samples())[:2]:
        coded = sample.coded(tmp_path)
        values = np.zeros((coded.rows, coded.width), np.float32)
        values[0, :4] = 1e9, -1e9, 2.0**-9 * 0.5, 2.0**-9 * 0.51
        made = coded.codec.encoder(coded).encode(0, coded.rows, values)
        dtype = coded.parts["weight"].spec.dtype
        found = decode(made["weight"][1], dtype, values.shape)[0, :2]
        largest = {"F8_E4M3": 448, "F8_E5M2": 57344}[dtype]
        assert found.tolist() == [largest, -largest]
