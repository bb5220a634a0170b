"""``metadata``: what a file says of itself changes, and nothing else does."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from samples import FIXTURES, lora

import loratool
from loratool.cli.main import cli
from loratool.errors import (
    FileFormatError,
    LoratoolError,
    OptionError,
    OutputError,
    UnsupportedError,
)
from loratool.files.container import read_bytes
from loratool.files.containers import open_weights

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
KEYS = TEXTS.filter(lambda key: key and not key.startswith("sshs_"))


def saved(path: Path, metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(lora("a.b", 8, 6), path, metadata)
    return path


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def data_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@settings(max_examples=60, deadline=None)
@given(
    before=st.dictionaries(KEYS, TEXTS, max_size=4),
    wanted=st.dictionaries(KEYS, TEXTS, min_size=1, max_size=4),
    data=st.data(),
)
def test_what_is_asked_for_is_said_and_tensors_keep_their_bytes(
    before: dict[str, str],
    wanted: dict[str, str],
    data: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("m")
    source = saved(folder / "a.safetensors", before)
    gone = data.draw(st.sets(st.sampled_from(sorted(before)))) if before else set()
    loratool.metadata(source, folder / "b.safetensors", set=wanted, remove=sorted(gone))
    expected = {k: v for k, v in before.items() if k not in gone} | wanted
    assert said(folder / "b.safetensors") == expected
    assert data_of(folder / "b.safetensors") == data_of(source)


def test_the_file_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = lora("a.b", 8, 6)
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    safetensors.torch.save_file(tensors, paths[0])
    loratool.metadata(paths[0], paths[1], set={"k": "v\n"})
    assert paths[1].read_bytes() == safetensors.torch.save(tensors, {"k": "v\n"})
    loratool.metadata(paths[1], paths[2], remove=["k"])
    assert paths[2].read_bytes() == paths[0].read_bytes()


def test_in_place_keeps_permissions_and_is_one_rename(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors")
    path.chmod(0o640)
    inode = path.stat().st_ino
    report = loratool.metadata(path, set={"k": "v"}, in_place=True)
    assert report.is_written and said(path) == {"k": "v"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.stat().st_ino != inode
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors")
    (tmp_path / "l.safetensors").symlink_to(path)
    with pytest.raises(OutputError, match="is a link"):
        loratool.metadata(tmp_path / "l.safetensors", set={"k": "v"}, in_place=True)
    assert said(path) == {}


def test_a_folder_keeps_its_other_files(tmp_path: Path) -> None:
    source = tmp_path / "one"
    shutil.copytree(FIXTURES / "adapters" / "lora-linear", source)
    (source / "sub").mkdir()
    (source / "sub" / "x.txt").write_text("x")
    (tmp_path / "secret").write_text("secret")
    (source / "stray").symlink_to(tmp_path / "secret")
    report = loratool.metadata(source, tmp_path / "out", set={"k": "v"})
    assert any("stray" in note for note in report.notes)
    names = {str(path.relative_to(source)) for path in source.rglob("*")} - {"stray"}
    assert {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")
    } == names
    weights = "adapter_model.safetensors"
    assert said(tmp_path / "out" / weights)["k"] == "v"
    for name in names - {weights, "sub"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    loratool.metadata(source, set={"k": "w"}, in_place=True)
    assert said(source / weights)["k"] == "w"


def test_all_shards_of_a_model_say_it(tmp_path: Path) -> None:
    base = FIXTURES / "bases" / "llama-untied"
    report = loratool.metadata(base, tmp_path / "out", set={"k": "v"})
    assert len(report.files) == 2
    assert all(said(path)["k"] == "v" for path in (tmp_path / "out").glob("*.safetensors"))


def kohya_hashes(path: Path) -> tuple[str, str]:
    """Return what sd-scripts computes: of a file with the training metadata alone."""
    with safe_open(path, "pt") as file:
        kept = {k: v for k, v in file.metadata().items() if k.startswith("ss_")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    written = io.BytesIO(safetensors.torch.save(tensors, kept))
    length = int.from_bytes(written.read(8), "little")
    written.seek(8 + length)
    whole = hashlib.sha256(written.read()).hexdigest()
    written.seek(0x100000)
    return whole, hashlib.sha256(written.read(0x10000)).hexdigest()[:8]


def test_hashes_of_the_tensors_stay_right(tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{module}.lora_down.weight": torch.randn(64, 3200).half(),
        f"{module}.lora_up.weight": torch.randn(6400, 64).half(),
        f"{module}.alpha": torch.tensor(4.0),
    }
    source = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, source, {"ss_note": "x"})
    loratool.convert(source, "kohya", tmp_path / "k.safetensors", family="sdxl")
    before = said(tmp_path / "k.safetensors")
    assert (before["sshs_model_hash"], before["sshs_legacy_hash"]) == kohya_hashes(
        tmp_path / "k.safetensors"
    )
    edits: list[dict[str, Any]] = [
        {"set": {"modelspec.author": "me"}},
        {"set": {"ss_note": "y" * 999}},
        {"remove": ["ss_note"]},
    ]
    for number, edit in enumerate(edits):
        out = tmp_path / f"{number}.safetensors"
        loratool.metadata(tmp_path / "k.safetensors", out, **edit)
        after = said(out)
        assert (after["sshs_model_hash"], after["sshs_legacy_hash"]) == kohya_hashes(out)
        is_other = after["sshs_legacy_hash"] != before["sshs_legacy_hash"]
        assert is_other == (number > 0)
    with pytest.raises(OptionError, match="computed from the tensors"):
        loratool.metadata(source, set={"sshs_model_hash": "0"}, in_place=True)
    loratool.metadata(tmp_path / "k.safetensors", remove=["sshs_model_hash"], in_place=True)
    assert "sshs_model_hash" not in said(tmp_path / "k.safetensors")


def test_another_file_is_followed_but_for_its_tensors(tmp_path: Path) -> None:
    other = {
        "ss_tag_frequency": "{}",
        "ss_network_dim": "99",
        "sshs_model_hash": "f" * 64,
        "format": "np",
        "loratool": "{}",
        "title": "theirs",
        "gone": "x",
    }
    source = saved(tmp_path / "a.safetensors", {"title": "ours", "mine": "kept", "format": "pt"})
    report = loratool.metadata(
        source,
        tmp_path / "b.safetensors",
        source=saved(tmp_path / "o.safetensors", other),
        remove=["gone"],
        set={"new": "1"},
    )
    assert said(tmp_path / "b.safetensors") == {
        "ss_tag_frequency": "{}",
        "title": "theirs",
        "mine": "kept",
        "format": "pt",
        "new": "1",
    }
    assert "4 keys are about its own tensors" in report.notes[0]


def test_key_values_of_gguf_keep_their_types(tmp_path: Path) -> None:
    path = write_gguf_file(tmp_path / "a.gguf")
    before = open_weights(path)
    report = loratool.metadata(
        path,
        tmp_path / "b.gguf",
        set={"general.name": "other", "my.note": "x" * 77, "general.quantization_version": "3"},
    )
    import gguf

    fields = gguf.GGUFReader(tmp_path / "b.gguf").fields
    assert fields["general.name"].contents() == "other"
    assert fields["my.note"].contents() == "x" * 77
    assert fields["general.quantization_version"].contents() == 3
    after = open_weights(tmp_path / "b.gguf")
    assert list(after.tensors) == list(before.tensors)
    for name, stored in after.tensors.items():
        assert stored.offset % 32 == 0
        assert read_bytes(stored) == read_bytes(before.tensors[name])
    assert report.files[0].metadata == after.metadata
    loratool.metadata(tmp_path / "b.gguf", remove=["my.note"], in_place=True)
    assert "my.note" not in open_weights(tmp_path / "b.gguf").metadata
    for key, value, match in (
        ("general.quantization_version", "many", "has to be u32"),
        ("general.alignment", "64", "laid out"),
        ("general.architecture", "x", "laid out"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            loratool.metadata(path, set={key: value}, in_place=True)


def write_gguf_file(path: Path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("mine")
    writer.add_quantization_version(2)
    writer.add_array("tokens", ["a", "b"])
    writer.add_tensor("x", np.arange(7, dtype="f4"))
    writer.add_tensor("y", np.arange(64, dtype="f2").reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_has_no_place_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(lora("a.b", 8, 6), tmp_path / "a.bin")
    with pytest.raises(UnsupportedError, match="torch pickle") as failure:
        loratool.metadata(tmp_path / "a.bin", set={"k": "v"}, in_place=True)
    assert "convert" in str(failure.value.hint)
    assert loratool.metadata(tmp_path / "a.bin").files[0].metadata == {}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"in_place": True}, "what to change"),
        ({"set": {"a": "b"}}, "where the result goes"),
        ({"set": {"a": "b"}, "in_place": True, "output": "x.safetensors"}, "both say"),
        ({"remove": ["b"], "in_place": True}, "says nothing under 'b'"),
        ({"set": {"": "b"}, "in_place": True}, "have to be text"),
        ({"set": {"a": "\ud800"}, "in_place": True}, "have to be text"),
        ({"set": {"a": "b"}, "output": "x.gguf"}, r"end the name in \.safetensors"),
    ],
)
def test_options_that_make_no_sense_are_said(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(LoratoolError, match=match):
        loratool.metadata(path, **options)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": "1"})
    report = loratool.metadata(path, set={"a": "2"}, dry_run=True)
    assert list(report.files[0].changed()) == [("a", "1", "2")] and said(path) == {"a": "1"}


def test_the_command_line_reads_values_and_hides_images(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors")
    image = base64.b64encode(b"\xff\xd8\xff" + bytes(30_000)).decode()
    (tmp_path / "image").write_text(f"data:image/jpeg;base64,{image}")
    run = CliRunner().invoke
    values = [f"modelspec.thumbnail=@{tmp_path / 'image'}", "a=-", "b=@@x", "c=d=e", "h=\x1b[31m"]
    words = [word for value in values for word in ("--set", value)]
    done = run(cli, ["metadata", str(path), "--in-place", *words], input="from stdin")
    assert done.exit_code == 0, done.output
    assert said(path) | {"modelspec.thumbnail": ""} == {
        "a": "from stdin",
        "b": "@x",
        "c": "d=e",
        "h": "\x1b[31m",
        "modelspec.thumbnail": "",
    }
    shown = run(cli, ["metadata", str(path)])
    assert "image (jpeg), 30 kB" in shown.output
    assert image[:50] not in shown.output and "\x1b[31m" not in shown.output
    document = json.loads(run(cli, ["metadata", str(path), "--json"]).output)
    assert document["schema"] == 1 and document["metadata"] == said(path)
    for words in (["--set", "a"], ["--set", "a=1", "--set", "a=2"]):
        assert run(cli, ["metadata", str(path), "--in-place", *words]).exit_code != 0
    with pytest.raises(FileFormatError, match="cannot be read"):
        cli.main(["metadata", str(path), "--set", "a=@nothing"], standalone_mode=False)
