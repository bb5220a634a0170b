"""Outputs beside other people's files: nothing is lost, whatever leads where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from samples import lora

import loratool
from loratool.errors import LoratoolError, OutputError
from loratool.files.atomic import check_output, hidden_name, staged

Make = Callable[..., Path]


@pytest.fixture
def pair(make_base: Make, make_adapter: Make) -> tuple[Path, Path]:
    """Return a base and an adapter of it."""
    base = make_base({"a.q.weight": torch.randn(6, 5)}, {"model_type": "llama"})
    return base, make_adapter(lora("a.q", 6, 5))


@pytest.mark.parametrize(
    "stranger", ["thesis.txt", "src/main.rs", ".git/HEAD", "train.py", "data/labels.json"]
)
def test_force_spares_what_is_no_model(
    stranger: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    (work / stranger).parent.mkdir(parents=True)
    (work / stranger).write_text("the only copy")
    (work / "model.safetensors").write_bytes(b"")
    for write in (
        lambda: loratool.merge(pair[0], [pair[1]], work, force=True),
        lambda: loratool.convert(pair[1], "peft", work, force=True),
        lambda: loratool.truncate(pair[1], rank=1, output=work, force=True),
    ):
        with pytest.raises(OutputError) as caught:
            write()
        assert stranger in str(caught.value)
    assert (work / stranger).read_text() == "the only copy"


def test_force_spares_folders_without_weights_and_files_of_other_kinds(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    project, thesis = tmp_path / "project", tmp_path / "thesis.docx"
    project.mkdir()
    (project / "README.md").write_text("mine")
    thesis.write_text("mine")
    for output in (project, thesis):
        for write in (
            lambda to: loratool.merge(pair[0], [pair[1]], to, force=True),
            lambda to: loratool.convert(pair[1], "peft", to, force=True),
            lambda to: loratool.convert(pair[1], "kohya", to, force=True),
        ):
            with pytest.raises(LoratoolError):
                write(output)
    assert (project / "README.md").read_text() == thesis.read_text() == "mine"


def test_force_spares_what_links_beside_the_weights_lead_to(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A configuration in the output's folder that an input's link leads to is an input."""
    base, adapter = pair
    kept = tmp_path / "kept"
    kept.mkdir()
    (adapter / "adapter_config.json").rename(kept / "adapter_config.json")
    (adapter / "adapter_config.json").symlink_to(kept / "adapter_config.json")
    (base / "config.json").rename(kept / "config.json")
    (base / "config.json").symlink_to(kept / "config.json")
    for write in (
        lambda: loratool.merge(base, [adapter], kept, force=True),
        lambda: loratool.truncate(adapter, rank=1, output=kept, force=True),
        lambda: loratool.extract(base, base, kept, rank=1, force=True),
    ):
        with pytest.raises(LoratoolError):
            write()
    assert sorted(path.name for path in kept.iterdir()) == ["adapter_config.json", "config.json"]


def test_force_replaces_what_a_run_has_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (base / "extra").mkdir()
    (base / "extra" / "notes.xyz").write_text("of the model")  # carried over, so replaced again
    (base / "tokenizer.model").write_bytes(b"t")
    for _ in range(2):
        loratool.merge(base, [adapter], tmp_path / "out", force=True)
    assert (tmp_path / "out" / "extra" / "notes.xyz").exists()
    for _ in range(2):
        loratool.convert(adapter, "mlx", tmp_path / "mlx", force=True)


def test_an_input_by_another_path(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    other = tmp_path / "other.safetensors"
    os.link(base / "model.safetensors", other)
    before = other.read_bytes()
    with pytest.raises(OutputError, match="overwrite the input"):
        loratool.merge(base / "model.safetensors", [adapter], other, force=True)
    assert other.read_bytes() == before


def test_an_input_through_a_mount(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    again = tmp_path / "again"
    again.mkdir()
    if os.geteuid() or subprocess.run(["mount", "--bind", base, again], check=False).returncode:
        pytest.skip("may not mount")
    try:
        for source, output in (
            (base / "model.safetensors", again / "model.safetensors"),
            (base, again),
            (base, again / "inside"),
        ):
            with pytest.raises(OutputError, match="overwrite the input"):
                loratool.merge(source, [adapter], output, force=True)
    finally:
        subprocess.run(["umount", again], check=True)


@pytest.mark.parametrize("name", [".out.loratool-partial-00000000", ".out.loratool-old-0"])
def test_what_is_planted_beside_the_output(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A pipe, a link or a file of such a name is passed over, and stays."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    for kind in ("pipe", "link", "file"):
        planted = tmp_path / name
        if kind == "pipe":
            os.mkfifo(planted)
        elif kind == "link":
            planted.symlink_to(precious)
        else:
            planted.write_text("x")
        loratool.merge(pair[0], [pair[1]], tmp_path / "out", force=True)
        assert (precious / "x").exists()
        planted.unlink()


def test_a_signal_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "model.safetensors").write_text("old")
    rename, count = Path.rename, 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        staged(output, folder=True, force=True, sync=False) as place,
    ):
        (place / "model.safetensors").write_text("new")
    assert (output / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_killed_there_is_mended_by_the_next(tmp_path: Path) -> None:
    output, aside = tmp_path / "out", tmp_path / ".out.loratool-old-12345678"
    aside.mkdir()
    (aside / "model.safetensors").write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        check_output(output, force=False, inputs=[])
    assert (output / "model.safetensors").read_text() == "old"
    aside.mkdir()  # and one that was killed a moment later
    with pytest.raises(OutputError, match="exists already"):
        check_output(output, force=False, inputs=[])
    assert aside.exists()
    check_output(output, force=True, inputs=[])
    assert not aside.exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_that_a_killed_run_has_moved_aside_comes_back(
    kind: str, tmp_path: Path
) -> None:
    """A folder takes its place; no call of the system exchanges the two."""
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.write_text("old")
    output.symlink_to(elsewhere) if kind == "link" else output.write_text("old")

    def killed(path: Path, target: Path) -> Path:
        os.replace(path, target)  # noqa: PTH105 - Path's own calls this
        os._exit(9)

    child = os.fork()
    if not child:
        Path.rename = killed  # type: ignore[method-assign]
        with staged(output, folder=True, force=True, sync=False) as place:
            (place / "model.safetensors").write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not os.path.lexists(output)
    with pytest.raises(OutputError, match="exists already"):
        check_output(output, force=False, inputs=[])
    assert output.read_text() == "old"
    assert output.is_symlink() == (kind == "link")


@pytest.mark.parametrize("length", [201, 255])
def test_a_name_as_long_as_names_may_be(
    length: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / ("é" * (length // 2) + "x" * (length % 2))
    stale = tmp_path / f"{hidden_name(output, 'loratool-partial')}-00000000"
    stale.mkdir()
    loratool.merge(pair[0], [pair[1]], output)
    loratool.merge(pair[0], [pair[1]], output, force=True)
    assert {path.name for path in tmp_path.iterdir()} >= {output.name}
    assert not [path for path in tmp_path.iterdir() if "loratool" in path.name]


def test_links_to_nothing_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "tokenizer.json").symlink_to("nowhere")
    os.mkfifo(pair[0] / "vocab.json")
    report = loratool.merge(pair[0], [pair[1]], tmp_path / "out")
    assert "tokenizer.json was not carried over: a link to nothing" in report.notes
    assert "vocab.json was not carried over: no regular file" in report.notes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_imports_is_a_signal(
    number: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Python wraps what a signal raises in some places of an import."""
    code = (
        "import sys, signal, os\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job has none
        "from loratool.cli import main as module\n"
        "class Named:\n"
        "    def __set_name__(self, owner, name):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "def broken(*_, **__):\n"
        "    type('Owner', (), {'x': Named()})\n"
        "module.cli.main = broken\n"
        "module.main(['schemes'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert "(a bug)" not in done.stderr


def extracted(base: Path, tuned: Path, output: Path) -> object:
    return loratool.extract(base, tuned, output, rank=2, resume=True)


@pytest.fixture
def tuned(pair: tuple[Path, Path], make_base: Make) -> Path:
    """Return what the base was tuned to."""
    return make_base({"a.q.weight": torch.randn(6, 5)}, {"model_type": "llama"}, name="tuned")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_planted_where_an_extraction_is_resumed(
    kind: str, pair: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    victim, spool = tmp_path / "victim", tmp_path / ".out.loratool-unfinished"
    victim.write_text("mine")
    spool.mkdir()
    for name in ("run.partial", "0.partial"):
        if kind == "link":
            (spool / name).symlink_to(victim)
        else:
            os.mkfifo(spool / name)
    extracted(pair[0], tuned, tmp_path / "out")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "tensors",
    [
        {"floor": torch.zeros(0)},
        {"floor": torch.zeros(1), "up.0": torch.zeros(3)},
        {"floor": torch.zeros(2, 2), "up.0": torch.zeros(3, 1), "down.0": torch.zeros(1, 3)},
    ],
    ids=["empty", "vector", "matrix"],
)
def test_a_damaged_spool_is_computed_again(
    tensors: dict[str, torch.Tensor], pair: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    loratool.extract(pair[0], tuned, tmp_path / "whole", rank=2)
    spool = tmp_path / ".out.loratool-unfinished"
    spool.mkdir()
    save_file(tensors, spool / "0.safetensors")
    extracted(pair[0], tuned, tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    spool.mkdir()
    (spool / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(LoratoolError, match="other inputs or options"):
        loratool.extract(pair[0], tuned, tmp_path / "out", rank=2, resume=True, force=True)


def test_a_spectrum_is_an_input_and_no_other_file_becomes_one(
    pair: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    out, notes = tmp_path / "out", tmp_path / "notes.txt"
    out.mkdir()
    spectrum = out / "spectrum.json"
    loratool.extract(pair[0], tuned, tmp_path / "ex", rank=3, save_spectrum=spectrum)
    before = spectrum.read_bytes()
    with pytest.raises(LoratoolError, match="overwrite the input"):
        loratool.truncate(tmp_path / "ex", rank=1, output=out, spectrum=spectrum, force=True)
    assert spectrum.read_bytes() == before
    notes.write_text("mine")
    with pytest.raises(LoratoolError, match="another kind of file"):
        loratool.extract(pair[0], tuned, tmp_path / "ex2", rank=3, save_spectrum=notes, force=True)
    assert notes.read_text() == "mine"
