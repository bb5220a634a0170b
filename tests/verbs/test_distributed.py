"""PyTorch's distributed checkpoints: adapters are gathered from them, and nothing is executed."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import loratool
from loratool.errors import FileFormatError, LoratoolError
from loratool.files.container import read_bytes
from loratool.files.containers import open_weights

NAME = "base_model.model.model.layers.{}.{}.lora_{}.weight"


def state() -> dict[str, torch.Tensor]:
    """Return an adapter of two layers, one of them in half the bits."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for layer, dtype in enumerate((torch.float32, torch.bfloat16)):
        for leaf, (out, into) in {"q_proj": (10, 6), "down_proj": (6, 13)}.items():
            for side, shape in (("A", (3, into)), ("B", (out, 3))):
                values = torch.randn(shape, generator=draw).to(dtype)
                found[NAME.format(layer, leaf, side)] = values
    return found


def save(values: dict[str, Any], folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(values, checkpoint_id=str(folder), no_dist=True, **options)
    return folder


def _rank(rank: int, world: int, folder: Path, axis: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + axis)}
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    model = {k: distribute_tensor(v, mesh, [Shard(axis)]) for k, v in state().items()}
    dcp.save({"model": model, "step": 3}, checkpoint_id=str(folder))
    dist.destroy_process_group()


def check(folder: Path, tmp_path: Path) -> None:
    """Compare everything with what was saved."""
    file = open_weights(folder / ".metadata")
    assert set(file.tensors) == set(state())
    for name, value in state().items():
        stored = file.tensors[name]
        assert stored.spec.shape == tuple(value.shape)
        assert read_bytes(stored) == value.view(torch.uint8).numpy().tobytes()
    out = tmp_path / "out.safetensors"
    loratool.convert(folder, "module-path", out, alpha=3.0)
    found = loratool.open_adapter(out).tensors
    for name, value in state().items():
        plain = name.removeprefix("base_model.model.")
        assert read_bytes(found[plain]) == value.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_one_process_wrote(wrapped: bool, tmp_path: Path) -> None:
    moments = {"state": {"exp_avg": torch.ones(3)}}
    whole = {"model": state(), "optimizer": moments, "step": 5} if wrapped else state()
    folder = save(whole, tmp_path / "step-5")
    check(folder, tmp_path)
    adapter = loratool.open_adapter(folder)
    assert ("optimizer.state.exp_avg" in " ".join(adapter.notes)) is wrapped
    info = loratool.inspect(folder).as_json()
    assert info["kind"] == "adapter" and len(info["modules"]) == 4


def test_a_file_for_each_tensor(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path / "x", single_file_per_rank=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state(), storage_writer=writer, no_dist=True)
    check(tmp_path / "x", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_shards_of_two_processes(axis: int, tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, tmp_path / "x", axis), nprocs=2)
    check(tmp_path / "x", tmp_path)
    (tmp_path / "x" / "__1_0.distcp").unlink()
    with pytest.raises(FileFormatError, match=r"__1_0\.distcp: is missing"):
        loratool.open_adapter(tmp_path / "x")


def described(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


def rewrite(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_descriptions_of_older_releases(tmp_path: Path) -> None:
    """As PyTorch 2.1 to 2.6 had them: classes elsewhere, and fewer fields."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as Older

    folder = save({"model": state(), "step": 5}, tmp_path / "x")
    metadata = described(folder)
    for name in ("storage_meta", "version"):
        vars(metadata).pop(name, None)
    for record in metadata.state_dict_metadata.values():
        if isinstance(record, TensorStorageMetadata):
            record.properties = Older(dtype=record.properties.dtype)
    for info in metadata.storage_data.values():
        vars(info).pop("transform_descriptors", None)
    for protocol in (2, 3, 4, 5):
        (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
        check(folder, tmp_path)
        (tmp_path / "out.safetensors").unlink()


def test_blocks_have_to_make_up_the_tensor(tmp_path: Path) -> None:
    folder = save(state(), tmp_path / "x")
    key = NAME.format(0, "q_proj", "A")
    shape = torch.Size([3, 6])
    two = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 6])),
        ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([1, 6])),
    ]
    for chunks, words in (
        (two[:1], "pieces of 6 of its elements are missing"),
        (two, "two pieces overlap"),
        ([ChunkStorageMetadata(torch.Size([1, 0]), shape)], "outside"),
        ([ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3]))], "outside"),
    ):
        metadata = described(folder)
        properties = TensorProperties(dtype=torch.float32)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, shape, chunks)
        rewrite(folder, metadata)
        with pytest.raises(FileFormatError, match=words):
            loratool.open_adapter(folder)
        save(state(), folder)


def test_shards_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    key = NAME.format(0, "q_proj", "A")
    place = MetadataIndex(key, torch.Size([0, 0]), 0)
    for change, words in (
        ({"relative_path": "../x/__0_0.distcp"}, "plain file"),
        ({"relative_path": "/etc/passwd"}, "plain file"),
        ({"relative_path": "__7_0.distcp"}, "is missing"),
        ({"length": 1 << 40}, "truncated"),
        ({"offset": 1}, "damaged"),
        ({"transform_descriptors": ["stream.zstd"]}, "extension"),
    ):
        folder = save(state(), tmp_path / "x")
        metadata = described(folder)
        for name, value in change.items():
            setattr(metadata.storage_data[place], name, value)
        rewrite(folder, metadata)
        with pytest.raises(LoratoolError, match=words):
            loratool.convert(folder, "module-path", tmp_path / "o.safetensors", alpha=1.0)
        assert not (tmp_path / "o.safetensors").exists()
    metadata = described(save(state(), folder))
    metadata.state_dict_metadata[key].properties.dtype = torch.float16
    rewrite(folder, metadata)
    with pytest.raises(FileFormatError, match="said to be F16"):
        loratool.convert(folder, "module-path", tmp_path / "o.safetensors", alpha=1.0)


def test_a_shard_elsewhere_is_not_followed(tmp_path: Path) -> None:
    folder = save(state(), tmp_path / "x")
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match="a link that leaves the folder"):
        loratool.open_adapter(folder)


def test_shards_are_no_files_that_stay_behind(tmp_path: Path) -> None:
    folder = save(state(), tmp_path / "x")
    report = loratool.convert(folder, "peft", tmp_path / "peft", alpha=3.0)
    assert not any("distcp" in name for name, _ in report.plan.dropped)


class Evil:
    """Something that a pickle would call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(tmp_path: Path) -> None:
    folder = save(state(), tmp_path / "x")
    metadata = described(folder)
    metadata.planner_data = Evil(tmp_path / "made")
    rewrite(folder, metadata)
    check(folder, tmp_path)
    for whole in (Evil(tmp_path / "made"), [Evil(tmp_path / "made")], 3, b"x"):
        rewrite(folder, whole)
        with pytest.raises(FileFormatError):
            loratool.open_adapter(folder)
    assert not (tmp_path / "made").exists()


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    folder = save(state(), tmp_path / "x")
    whole = (folder / ".metadata").read_bytes()
    for position in range(0, len(whole), 97):
        (folder / ".metadata").write_bytes(whole[:position])
        with pytest.raises(FileFormatError):
            loratool.open_adapter(folder)
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        (folder / ".metadata").write_bytes(broken)
        try:
            adapter = loratool.open_adapter(folder)
            for stored in adapter.tensors.values():
                read_bytes(stored)
        except LoratoolError:
            continue


def test_a_shard_by_itself_and_a_folder_around(tmp_path: Path) -> None:
    folder = save(state(), tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0")
    with pytest.raises(LoratoolError) as caught:
        loratool.open_adapter(folder / "__0_0.distcp")
    assert "the folder that it lies in" in str(caught.value.hint)
    with pytest.raises(LoratoolError) as caught:
        loratool.open_adapter(folder.parent)
    assert "pytorch_model_fsdp_0, where it holds an adapter" in str(caught.value.hint)
    (folder / ".metadata").unlink()
    with pytest.raises(LoratoolError, match="beside their"):
        loratool.open_adapter(folder)
