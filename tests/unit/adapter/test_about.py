"""What an adapter says of itself: in metadata, in files of model sites, on its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from samples import lora

from loratool.adapter.about import About, about, without_pictures
from loratool.schemes.opening import open_adapter

PICTURE = "data:image/jpeg;base64,/9j/4AAQSkZJRg=="
TRAINED = {
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_output_name": "mychar",
    "ss_tag_frequency": json.dumps(
        {"10_a": {"solo": 3, " red hair": 5}, "2_b": {"solo": 4, "no": "x"}}
    ),
    "ss_bucket_info": json.dumps(
        {"buckets": {"0": {"resolution": [832, 1216], "count": 10}, "1": {"count": 3}}}
    ),
    "ss_resolution": "(1024, 1024)",
    "ss_num_train_images": "40",
    "ss_steps": "1600",
    "ss_epoch": "8",
    "ss_num_epochs": "10",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "ss_learning_rate": "0.0001",
    "sshs_model_hash": "ab" * 32,
    "sshs_legacy_hash": "e3b0c442",
    "modelspec.title": "My character",
    "modelspec.author": "somebody",
    "modelspec.license": "CC-BY",
    "modelspec.trigger_phrase": "mychar, red dress",
    "modelspec.thumbnail": PICTURE,
}


def adapter_with(folder: Path, metadata: dict[str, str], name: str = "a.v1.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(lora("model.layers.0.q_proj", 6, 5), folder / name, metadata=metadata)
    return folder / name


def said_at(path: Path) -> About:
    return about(open_adapter(path))


def test_the_metadata_of_a_trainer(tmp_path: Path) -> None:
    said = said_at(adapter_with(tmp_path, TRAINED))
    assert said == About(
        base="sd_xl_base_1.0.safetensors",
        architecture="sdxl_base_v1-0",
        title="My character",
        author="somebody",
        license="CC-BY",
        triggers=("mychar", "red dress"),
        tags=(("solo", 7), ("red hair", 5)),
        resolution="1024x1024",
        buckets=(("832x1216", 10),),
        images=40,
        steps=1600,
        epochs=8,
        optimizer="bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
        learning_rate="0.0001",
        hashes={"sshs_model_hash": "ab" * 32, "sshs_legacy_hash": "e3b0c442"},
    )
    assert PICTURE not in json.dumps(said.as_json())


def test_several_data_sets_are_one(tmp_path: Path) -> None:
    sets = [
        {"resolution": [512, 512], "tag_frequency": {"x": {"cat": 2}}},
        {
            "resolution": [768, 768],
            "tag_frequency": {"x": {"cat": 1}},
            "bucket_info": {"buckets": {"0": {"resolution": [640, 896], "count": 2}}},
        },
    ]
    said = said_at(adapter_with(tmp_path, {"ss_datasets": json.dumps(sets)}))
    assert said.tags == (("cat", 3),)
    assert said.resolution == "512x512, 768x768"
    assert said.buckets == (("640x896", 2),)


def test_files_of_model_sites_and_interfaces(tmp_path: Path) -> None:
    path = adapter_with(tmp_path, {})
    version: dict[str, Any] = {
        "name": "v1",
        "baseModel": "SDXL 1.0",
        "trainedWords": ["mychar, smile", "mychar"],
        "model": {"name": "Character"},
        "creator": {"username": "maker"},
        "files": [{"type": "Model", "hashes": {"AutoV2": "ABCDEF0123", "CRC32": "00000000"}}],
    }
    (tmp_path / "a.v1.civitai.info").write_text(json.dumps(version))
    (tmp_path / "a.v1.json").write_text(
        json.dumps({"activation text": "smile, hat", "sd version": "SD1", "preferred weight": 0.8})
    )
    said = said_at(path)
    assert (said.base, said.title, said.author) == ("SDXL 1.0", "Character v1", "maker")
    assert said.triggers == ("mychar", "smile", "hat")
    assert said.hashes == {"AutoV2": "abcdef0123"}
    assert said.sources == ("a.v1.civitai.info", "a.v1.json")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".cm-info.json", {"ModelName": "C", "BaseModel": "Pony", "TrainedWords": ["x"]}),
        (
            ".metadata.json",
            {"model_name": "C", "base_model": "Pony", "civitai": {"trainedWords": ["x"]}},
        ),
    ],
)
def test_files_of_model_managers(tmp_path: Path, suffix: str, content: dict[str, Any]) -> None:
    path = adapter_with(tmp_path, {})
    (tmp_path / f"a.v1{suffix}").write_text(json.dumps(content))
    said = said_at(path)
    assert (said.title, said.base, said.triggers) == ("C", "Pony", ("x",))


def test_the_card_of_an_adapter_that_has_a_folder(tmp_path: Path) -> None:
    card = "---\nbase_model:\n- org/base\nlicense: mit\ninstance_prompt: sks dog\n---\n# Text\n"
    path = adapter_with(tmp_path, {}, "adapter_model.safetensors")
    (tmp_path / "README.md").write_text(card)
    said = said_at(tmp_path)
    assert (said.base, said.license, said.triggers) == ("org/base", "mit", ("sks dog",))
    assert said_at(path).base is None  # a file among others, which the card is not about


def test_what_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    path = adapter_with(tmp_path, {})
    (tmp_path / "a.v1.json").write_text("{")
    said = said_at(path)
    assert said.sources == ()
    assert said.notes[0].startswith("a.v1.json beside it is not read: ")


def test_pictures_are_counted_and_not_shown() -> None:
    metadata = {"modelspec.thumbnail": PICTURE, "covers": '["iVBORw0KGgoAAA"]', "title": "data"}
    assert without_pictures(metadata) == {
        "modelspec.thumbnail": f"(a picture, {len(PICTURE)} characters)",
        "covers": "(a picture, 18 characters)",
        "title": "data",
    }


TEXT = st.text("ax1,[é\x1b", max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(st.fixed_dictionaries(dict.fromkeys(sorted(TRAINED), JSON | st.just("{"))))
def test_nothing_that_metadata_may_hold_is_an_error(tmp_path_factory: Any, said: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "said"
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in said.items()}
    texts["ss_datasets"] = texts["ss_tag_frequency"]
    found = said_at(adapter_with(folder, texts))
    json.dumps(found.as_json())
    assert all(isinstance(count, int) for _, count in found.tags)


def test_alphas_are_no_parameters(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 6),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(6, 2),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert open_adapter(tmp_path / "a.safetensors").parameters == 24
