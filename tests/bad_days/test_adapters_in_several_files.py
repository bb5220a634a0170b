"""Adapters whose weights lie in several files: all of them are watched, hashed and left alone."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

import loratool
from loratool.cli.main import cli
from loratool.errors import LoratoolError
from loratool.files.inputs import InputFiles

MODULE = "model.layers.0.self_attn.o_proj"
OWN = "decoder.layers.0.self_attention.linear_proj.adapter"


def ranks(folder: Path) -> list[Path]:
    """Write two tensor-parallel ranks; return their files, the first one last."""
    for rank in range(2):
        place = folder / f"mp_rank_0{rank}" / "model.safetensors"
        place.parent.mkdir(parents=True)
        factors = {"linear_in.weight": torch.randn(2, 6), "linear_out.weight": torch.randn(4, 2)}
        save_file({f"{OWN}.{name}": value for name, value in factors.items()}, place)
    return sorted(folder.glob("*/*"), reverse=True)


def distributed(folder: Path) -> list[Path]:
    """Write a distributed checkpoint with a file for each tensor; return shards, then the rest."""
    factors = {"A": torch.randn(2, 12), "B": torch.randn(8, 2)}
    state = {f"base_model.model.{MODULE}.lora_{s}.weight": v for s, v in factors.items()}
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer, no_dist=True)
    return [*sorted(folder.glob("*.distcp")), folder / ".metadata"]


KINDS: dict[str, Callable[[Path], list[Path]]] = {"ranks": ranks, "distributed": distributed}
VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda base, adapter, out: loratool.merge(base, [adapter], out, alpha=2.0),
    "convert": lambda base, a, out: loratool.convert(a, "peft", out, base=base, alpha=2.0),
    "compose": lambda base, a, out: loratool.compose(
        [a, a], out, to="peft", base=base, rank=2, alpha=2.0
    ),
    "rescale": lambda _, a, out: loratool.rescale(a, output=out, scale=0.5),
}


OUT = {"rescale": "out.safetensors"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"{MODULE}.weight": torch.randn(8, 12)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("which", [0, 1])
def test_any_file_that_changes_meanwhile(
    kind: str, verb: str, which: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = KINDS[kind](tmp_path / "adapter")[which]
    check = InputFiles.check_unchanged

    def changed(self: InputFiles) -> None:
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
        os.utime(path, ns=(1, 1))
        check(self)

    monkeypatch.setattr(InputFiles, "check_unchanged", changed)
    with pytest.raises(LoratoolError, match="changed while") as caught:
        VERBS[verb](base, tmp_path / "adapter", tmp_path / OUT.get(verb, "out"))
    assert str(path) in str(caught.value)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "base"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_an_input_is_replaced(kind: str, base: Path, tmp_path: Path) -> None:
    files = KINDS[kind](tmp_path / "adapter")
    before = {path: path.read_bytes() for path in files}
    for path in files:
        link = tmp_path / "link.safetensors"
        link.hardlink_to(path)
        for target in (link, path):
            with pytest.raises(LoratoolError):
                loratool.convert(
                    tmp_path / "adapter", "module-path", target, base=base, alpha=2.0, force=True
                )
        link.unlink()
    assert {path: path.read_bytes() for path in files} == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_of_all_files_and_a_recipe_holds_to_it(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is what ``sha256sum`` prints of the files, hashed."""
    folder = tmp_path / "adapter"
    files = sorted(KINDS[kind](folder), key=lambda path: str(path.relative_to(folder)))
    out = tmp_path / "out.safetensors"
    loratool.convert(folder, "module-path", out, base=base, alpha=2.0)
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in files
    )
    with safe_open(out, "pt") as file:
        (source,) = json.loads(file.metadata()["loratool"])["inputs"]
    assert source["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["recipe", "out.safetensors"])
    assert done.exit_code == 0, done.output
    Path("recipe.toml").write_text(done.stdout)
    before = out.read_bytes()
    options = ["run", "recipe.toml", "--into", "again"]
    Path("again").mkdir()
    done = CliRunner().invoke(cli, options)
    assert done.exit_code == 0, done.output
    assert Path("again", out.name).read_bytes() == before
    shard = files[-1]
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\1")
    done = CliRunner().invoke(cli, [*options, "--force"])
    assert done.exit_code != 0
    assert "is not what the recipe was made with" in str(done.exception)
