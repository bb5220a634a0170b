"""What is not read is said by name, with what makes of it something that is."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import LoratoolError

FILES: Final = {
    "weights.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "Keras"),
    "adapter_model.safetensors": (b"\x89HDF\r\n\x1a\n" + bytes(64), "Keras"),
    "model.keras": (b"PK\x03\x04", "Keras"),
    "adapter.msgpack": (b"\x81", "Flax"),
    "adapter.onnx": (b"\x08", "ONNX"),
    "__0_0.distcp": (b"x", "DCP"),
    "adapter_model.bin": (b"\x1f\x8b" + bytes(64), "gzip"),
    "adapter.pt": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "7z"),
    "adapter.pkl": (b"\x80\x04.", "pickle"),
}
FOLDERS: Final = {
    "DCP": (["__0_0.distcp", "__1_0.distcp"], "dcp_to_torch"),
    "FSDP": (["pytorch_model_fsdp_0/.metadata", "README.md"], "accelerate merge-weights"),
    "DeepSpeed": (
        [
            "zero_to_fp32.py",
            "latest",
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "mp_rank_00_model_states.pt",
        ],
        "zero_to_fp32.py",
    ),
    "DeepSpeed's step": (
        ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"],
        "zero_to_fp32.py",
    ),
    "DeepSpeed's run": (["global_step100/x.pt", "latest"], "zero_to_fp32.py"),
    "Orbax": (["_CHECKPOINT_METADATA", "d/x", "manifest.ocdbt"], "Orbax"),
    "Keras": (["gemma.lora.h5"], "Keras"),
}


def test_one_step_of_deepspeed_is_joined_from_above(tmp_path: Path) -> None:
    step = tmp_path / "a run" / "global_step100"
    step.mkdir(parents=True)
    (step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(LoratoolError) as caught:
        loratool.open_adapter(step)
    run = f"'{step.parent}'"
    command = f"python {run}/zero_to_fp32.py {run} OUT --tag global_step100 "
    assert command in str(caught.value.hint)


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    data, words = FILES[name]
    (tmp_path / name).write_bytes(data)
    for use in (loratool.open_adapter, loratool.inspect):
        with pytest.raises(LoratoolError, match=words) as caught:
            use(tmp_path / name)
        assert caught.value.hint


def test_an_archive_of_nemo(tmp_path: Path) -> None:
    """What it is, and that what is in it is read once it is unpacked."""
    name = "model.decoder.layers.0.self_attention.adapter_layer.lora_dense_attention_adapter"
    weights = io.BytesIO()
    torch.save(
        {
            f"{name}.linear_in.weight": torch.randn(2, 8),
            f"{name}.linear_out.weight": torch.randn(8, 2),
        },
        weights,
    )
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        entry = tarfile.TarInfo("./model_weights.ckpt")
        entry.size = len(weights.getvalue())
        archive.addfile(entry, io.BytesIO(weights.getvalue()))
    with pytest.raises(LoratoolError, match="NeMo") as caught:
        loratool.open_adapter(tmp_path / "a.nemo")
    assert "model_weights.ckpt" in str(caught.value.hint)
    (tmp_path / "model_weights.ckpt").write_bytes(weights.getvalue())
    adapter = loratool.open_adapter(tmp_path / "model_weights.ckpt")
    assert [site.module for site in adapter.sites] == ["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, tmp_path: Path) -> None:
    names, words = FOLDERS[kind]
    for name in names:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for use in (loratool.open_adapter, loratool.inspect):
        with pytest.raises(LoratoolError, match="it is not read") as caught:
            use(tmp_path / "run")
        assert words in f"{caught.value.what} {caught.value.hint}"


def test_parts_are_named(tmp_path: Path) -> None:
    name = "adapter_model-00001-of-00002.safetensors"
    save_file(lora("model.layers.0.self_attn.q_proj", 8, 8), tmp_path / name)
    adapter = loratool.open_adapter(tmp_path / name)
    assert any("part 1 of 2" in note for note in adapter.notes)
    save_file(
        lora("model.layers.1.self_attn.q_proj", 8, 8), tmp_path / name.replace("00001", "00002", 1)
    )
    with pytest.raises(LoratoolError, match="in 2 parts"):
        loratool.open_adapter(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "_fsdp_wrapped_module.{}._checkpoint_wrapped_module.self_attn.q_proj._orig_mod",
        "module.{}._fsdp_wrapped_module.self_attn.q_proj",
        "pipe.dit.{}.self_attn.q_proj",
        "_orig_mod.base_model.model.{}.self_attn.orig_module.q_proj",
    ],
)
def test_wrappers_are_stripped(key: str, tmp_path: Path) -> None:
    save_file(lora(key.format("model.layers.0"), 8, 8), tmp_path / "a.safetensors")
    (site,) = loratool.open_adapter(tmp_path / "a.safetensors").sites
    assert site.module == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("wrapper", ["lora", "adapter", "state_dict", "module", "weights"])
def test_containers_inside_a_pickle(wrapper: str, tmp_path: Path) -> None:
    tensors = lora("model.layers.0.self_attn.q_proj", 8, 8)
    torch.save({wrapper: tensors, "epoch": 3}, tmp_path / "a.pt")
    loratool.convert(tmp_path / "a.pt", "module-path", tmp_path / "a.safetensors")
    made = load_file(tmp_path / "a.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[key], tensors[key]) for key in made)


OWN = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("kind", "tensors", "hint"),
    [
        (
            "UNILORA",
            {"base_model.model.unilora_theta_d": torch.ones(16)},
            "if its own tool can merge it, do that there",
        ),
        ("SUPERTUNING", {f"{OWN}supertuning_values": torch.ones(5)}, "merge_and_unload"),
    ],
)
def test_what_peft_can_make_again_is_left_to_it(
    kind: str, tensors: dict[str, torch.Tensor], hint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = f'{{"peft_type": "{kind}", "target_modules": ["q_proj"]}}'
    (folder / "adapter_config.json").write_text(said)
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{OWN[17:]}weight": torch.ones(8, 8)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(LoratoolError) as caught:
        loratool.merge(base, [folder], tmp_path / "out")
    assert hint in str(caught.value.hint)
