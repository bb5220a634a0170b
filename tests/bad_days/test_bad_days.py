"""Killed, interrupted, out of space, inputs that change: nothing half-done, nothing harmed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import FileFormatError, OutputError
from loratool.plan.plan import write_at
from loratool.plan.run import Run

pytestmark = pytest.mark.slow

Make = Callable[..., Path]
LAYERS, SIZE = 12, 1024


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 50 MB and an adapter on all of it: long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "base").mkdir()
    tensors = {f"layers.{i}.q.weight": torch.randn(SIZE, SIZE) for i in range(LAYERS)}
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    factors: dict[str, torch.Tensor] = {}
    for index in range(LAYERS):
        factors |= lora(f"layers.{index}.q", SIZE, SIZE)
    (folder / "adapter").mkdir()
    save_file(
        {f"base_model.model.{k}": v for k, v in factors.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    return folder / "base", folder / "adapter"


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(base: Path, adapter: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loratool", "merge", base, adapter, "-o", output, *more]
    return subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_until_writing(process: subprocess.Popen[str], folder: Path) -> None:
    """Return as soon as the child has begun to compute tensors."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for file in folder.glob(".*loratool-partial*/*.safetensors"):
            if file.stat().st_blocks * 512 > SIZE * SIZE:
                return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name
)
def test_a_run_that_is_ended_leaves_nothing_finished(
    number: signal.Signals, large: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = large
    before = digest(base.parent)
    output = tmp_path / "out"
    process = start(base, adapter, output)
    wait_until_writing(process, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert digest(base.parent) == before
    if process.returncode == 0:
        pytest.skip("the machine was faster than the signal")
    assert not output.exists()
    left = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGKILL:
        assert all("loratool-partial" in name for name in left)
    else:
        assert left == []
        assert process.returncode == 128 + number
        word = "interrupted" if number == signal.SIGINT else "terminated"
        assert errors == f"error: loratool: {word}; nothing was written\n"
    loratool.merge(base, [adapter], output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert loratool.verify(output, base=base, adapters=[adapter]) == ()


@pytest.mark.slow
def test_an_existing_output_survives_a_killed_run(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    output = tmp_path / "out"
    output.mkdir()
    (output / "keep.txt").write_text("precious")
    process = start(base, adapter, output, "--force")
    wait_until_writing(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    if process.returncode != 0:
        assert (output / "keep.txt").read_text() == "precious"


@pytest.mark.slow
def test_a_living_run_is_not_disturbed_by_a_second_one(
    large: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = large
    processes = [start(base, adapter, tmp_path / "out", "--force") for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert loratool.verify(tmp_path / "out", base=base, adapters=[adapter]) == ()


@pytest.mark.slow
def test_a_full_disk_in_the_middle_of_writing(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    code = (
        "import resource, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20)); "
        "from loratool.cli.main import main; "
        f"main(['merge', {str(base)!r}, {str(adapter)!r}, '-o', {str(tmp_path / 'out')!r}])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 30 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_seen_beforehand(
    large: tuple[Path, Path], small_disk: Path
) -> None:
    base, adapter = large
    with pytest.raises(OutputError, match="free there"):
        loratool.merge(base, [adapter], small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(
    large: tuple[Path, Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = large
    monkeypatch.setattr(
        "loratool.files.atomic.shutil.disk_usage",
        lambda path: os.statvfs("/") and type("Usage", (), {"free": 1 << 60}),
    )
    with pytest.raises(OutputError, match="No space left"):
        loratool.merge(base, [adapter], small_disk / "out")
    assert list(small_disk.iterdir()) == []


def damage(kind: str, file: Path) -> None:
    match kind:
        case "deleted":
            file.unlink()
        case "truncated":
            os.truncate(file, file.stat().st_size // 2)
        case _:
            with file.open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(b"\1\2\3\4")


@pytest.mark.parametrize("kind", ["deleted", "truncated"])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_inputs_that_vanish_after_planning(
    kind: str, which: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(60, 50), "b": torch.randn(100)})
    adapter = make_adapter(lora("a.q", 60, 50))
    plan = loratool.plan_merge(base, [adapter])
    damage(
        kind,
        (base if which == "base" else adapter)
        / f"{'adapter_' * (which != 'base')}model.safetensors",
    )
    (tmp_path / "place").mkdir()
    with pytest.raises(FileFormatError):
        write_at(plan, tmp_path / "place")


def test_a_base_that_is_written_to_during_the_run(
    make_base: Make, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base({"a.q.weight": torch.randn(60, 50), "b": torch.randn(100)})
    adapter = make_adapter(lora("a.q", 60, 50))
    original = Run.count

    def count(self: Run, size: int) -> None:
        damage("changed", base / "model.safetensors")
        original(self, size)

    monkeypatch.setattr(Run, "count", count)
    with pytest.raises(FileFormatError, match="was changed"):
        loratool.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_finds_a_single_flipped_bit(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    skip = [r"layers\.3\."]
    loratool.merge(base, [adapter], tmp_path / "out", skip=skip)
    file = tmp_path / "out" / "model.safetensors"
    from loratool.files.safetensors import read_header

    for module, code in (("layers.3.q", "LT104"), ("layers.4.q", "LT105")):
        stored = read_header(file).tensors[f"{module}.weight"]
        position = stored.offset + 4 * 77_777 + 3
        with file.open("r+b") as stream:
            stream.seek(position)
            byte = stream.read(1)[0]
            stream.seek(position)
            stream.write(bytes([byte ^ 0x40]))
            stream.flush()
            found = loratool.verify(tmp_path / "out", base=base, adapters=[adapter], skip=skip)
            assert [(item.code, item.where) for item in found] == [(code, f"{module}.weight")]
            stream.seek(position)
            stream.write(bytes([byte]))


def test_verify_names_missing_and_surplus_tensors(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    loratool.merge(base, [adapter], tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["layers.0.q.weight"]
    tensors["surplus"] = torch.ones(1)
    tensors["layers.1.q.weight"] = tensors["layers.1.q.weight"][:, :5].contiguous()
    save_file(tensors, file, {"format": "pt"})
    found = loratool.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert {item.code for item in found} == {"LT101", "LT102", "LT103"}
    file.write_bytes(file.read_bytes()[:-1])
    (broken,) = loratool.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert broken.code == "LT109"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_base(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    code = (
        "import loratool, resource, torch; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"loratool.merge({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / 'out')!r}, threads=2); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    grown = int(result.stdout) * 1024
    assert grown < 40e6  # a block for each thread, not the 50 MB of the base


def test_a_shard_that_is_exchanged_after_planning(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(60, 50)})
    adapter = make_adapter(lora("a.q", 60, 50))
    for which, name in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        plan = loratool.plan_merge(base, [adapter], dtype="float16")
        other = tmp_path / "other.safetensors"
        other.write_bytes((which / name).read_bytes())
        other.replace(which / name)
        place = tmp_path / f"place-{name}"
        place.mkdir()
        with pytest.raises(FileFormatError, match="was changed"):
            write_at(plan, place)


def test_an_output_that_appears_meanwhile_is_kept(
    make_base: Make, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base({"a.q.weight": torch.randn(60, 50), "b": torch.randn(100)})
    adapter = make_adapter(lora("a.q", 60, 50))
    original = Run.count

    def count(self: Run, size: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious").write_text("x")
        original(self, size)

    monkeypatch.setattr(Run, "count", count)
    with pytest.raises(OutputError, match="meanwhile"):
        loratool.merge(base, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_force_does_not_reach_inputs_through_links(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(60, 50)}, {"model_type": "x"}, name="real")
    adapter = make_adapter(lora("a.q", 60, 50))
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in base.iterdir():
        (linked / file.name).symlink_to(file)
    before = digest(base)
    with pytest.raises(OutputError, match="would overwrite"):
        loratool.merge(linked, [adapter], base, force=True)
    assert digest(base) == before
    loratool.merge(linked, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("stream", [">&-", "2>&-", ">/dev/full"])
def test_standard_streams_that_are_closed_or_full(stream: str, large: tuple[Path, Path]) -> None:
    command = f"{sys.executable} -m loratool inspect {large[1]} {stream}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "bug" not in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == (2 if "full" in stream else 0)
