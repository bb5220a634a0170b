"""What files say of themselves stays true: joined in a sum, kept where ranks and scales change."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from samples import lora

import loratool

MODULE = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OF_MODEL = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.prediction_type": "epsilon",
}
OF_TRAINING = {
    "modelspec.title": "Ink wash",
    "modelspec.author": "somebody",
    "modelspec.license": "CC-BY-4.0",
    "modelspec.resolution": "1024x1024",
    "modelspec.date": "2024-01-01T00:00:00",
    "modelspec.trigger_phrase": "ink wash",
    "modelspec.tags": "style, ink",
    "ss_tag_frequency": '{"10_ink": {"ink": 10, "tree": 2}}',
    "ss_training_comment": "night run",
    "ss_learning_rate": "0.0001",
}
STALE = {"sshs_model_hash": "f" * 64, "modelspec.hash_sha256": "0x00", "ss_network_dim": "99"}


def write(path: Path, metadata: dict[str, str], module: str = MODULE) -> Path:
    tensors = {
        f"{module}.lora_down.weight": torch.randn(2, 8),
        f"{module}.lora_up.weight": torch.randn(8, 2),
        f"{module}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, path, metadata=metadata)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def composed(tmp_path: Path, *metadata: dict[str, str]) -> dict[str, str]:
    paths = [write(tmp_path / f"{n}.safetensors", each) for n, each in enumerate(metadata)]
    loratool.compose(paths, tmp_path / "sum.safetensors", force=True)
    return metadata_of(tmp_path / "sum.safetensors")


@pytest.mark.parametrize("verb", ["truncate", "rescale", "weighed"])
def test_one_adapter_keeps_what_it_says(tmp_path: Path, verb: str) -> None:
    path = write(tmp_path / "a.safetensors", OF_MODEL | OF_TRAINING | STALE)
    out = tmp_path / "out.safetensors"
    if verb == "truncate":
        loratool.truncate(path, out, rank=1)
    elif verb == "rescale":
        loratool.rescale(path, out, scale=0.5)
    else:
        loratool.rescale(path, out, weights=["unet=0.5"])
    found = metadata_of(out)
    assert found | OF_MODEL | OF_TRAINING == found
    assert "modelspec.hash_sha256" not in found
    assert found["ss_network_dim"] == ("1" if verb == "truncate" else "2")
    data = out.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert found["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()


def test_hashes_of_other_tensors_do_not_stay_in_a_file_that_is_changed_in_place(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(lora("a.b", 6, 5), path, metadata={"author": "somebody"} | STALE)
    loratool.rescale(path, tmp_path / "b.safetensors", scale=0.5)
    found = metadata_of(tmp_path / "b.safetensors")
    assert found["author"] == "somebody"
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & found.keys()


def test_a_sum_says_what_all_say_and_joins_words_and_tags(tmp_path: Path) -> None:
    other = OF_TRAINING | {
        "modelspec.title": "Woodcut",
        "modelspec.author": "somebody else",
        "modelspec.trigger_phrase": "woodcut, ink wash",
        "modelspec.tags": "style,print",
        "ss_tag_frequency": '{"10_ink": {"ink": 5}, "3_wood": {"print": 3}}',
    }
    found = composed(tmp_path, OF_MODEL | OF_TRAINING | STALE, OF_MODEL | other | STALE)
    assert found | OF_MODEL == found
    assert found["modelspec.trigger_phrase"] == "ink wash, woodcut"
    assert found["modelspec.tags"] == "style, ink, print"
    assert json.loads(found["ss_tag_frequency"]) == {
        "10_ink": {"ink": 15, "tree": 2},
        "3_wood": {"print": 3},
    }
    assert found["modelspec.merged_from"] == "Ink wash, Woodcut"
    assert found["modelspec.title"] == "sum"
    assert found["modelspec.license"] == "CC-BY-4.0"
    assert not {"modelspec.author", "modelspec.date", "modelspec.hash_sha256"} & found.keys()
    inputs = json.loads(found["loratool"])["inputs"]
    assert [each["name"] for each in inputs] == ["0.safetensors", "1.safetensors"]


def test_who_says_nothing_objects_to_claims_about_training_only(tmp_path: Path) -> None:
    found = composed(tmp_path, OF_MODEL | OF_TRAINING, {})
    assert found | OF_MODEL == found
    assert found["modelspec.trigger_phrase"] == "ink wash"
    assert not {"modelspec.author", "ss_learning_rate", "ss_training_comment"} & found.keys()
    assert found["modelspec.merged_from"] == "Ink wash, 1"


def test_disagreement_about_the_model_says_nothing_of_it(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{version}.safetensors", {"ss_base_model_version": version})
        for version in ("pony", "sdxl_base_v1-0")
    ]
    report = loratool.compose(paths, tmp_path / "sum.safetensors")
    assert "ss_base_model_version" not in metadata_of(tmp_path / "sum.safetensors")
    assert any("different versions of a base: pony, sdxl_base_v1-0" in n for n in report.notes)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 100_000])
def test_tags_that_are_none_are_kept_where_all_say_them(tmp_path: Path, text: str) -> None:
    key = "ss_tag_frequency"
    assert composed(tmp_path, {key: text}, {key: text})[key] == text
    assert key not in composed(tmp_path, {key: text}, {key: "{}"})


TAGS = st.dictionaries(
    st.sampled_from(["1_a", "2_b"]),
    st.dictionaries(st.sampled_from(["x", "y"]), st.integers(0, 9), max_size=2),
    max_size=2,
)


@settings(deadline=None, max_examples=20)
@given(one=TAGS, other=TAGS)
def test_tags_of_both_orders_are_the_same(
    one: dict[str, dict[str, int]],
    other: dict[str, dict[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("law")
    texts = [{"ss_tag_frequency": json.dumps(each)} for each in (one, other)]
    first, second, same = (
        json.loads(composed(folder, *pair)["ss_tag_frequency"])
        for pair in (texts, texts[::-1], [texts[0]] * 2)
    )
    assert first == second
    assert same == one
    assert first.keys() == one.keys() | other.keys()
