"""Reads that fail, inputs that change, limits of the system: one line, and nothing written."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import lora

import loratool
from loratool.errors import LoratoolError

Make = Callable[..., Path]
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]


@pytest.fixture
def inputs(make_base: Make, make_adapter: Make) -> tuple[Path, Path, Path]:
    """Return a base, what it was tuned to, and an adapter."""
    tensors = {f"{name}.weight": torch.randn(40, 30) for name in MODULES}
    base = make_base(tensors, {"model_type": "llama"})
    tuned = make_base(
        {n: w + torch.randn(40, 2) @ torch.randn(2, 30) for n, w in tensors.items()},
        {"model_type": "llama"},
        name="tuned",
    )
    factors: dict[str, Any] = {}
    for name in MODULES:
        factors |= lora(name, 40, 30)
    return base, tuned, make_adapter(factors, target_modules=["q_proj"])


VERBS: dict[str, Callable[[Path, Path, Path, Path], object]] = {
    "merge": lambda base, _, adapter, out: loratool.merge(base, [adapter], out),
    "convert": lambda _, __, adapter, out: loratool.convert(adapter, "mlx", out),
    "fold": lambda _, __, adapter, out: loratool.convert(adapter, "module-path", out),
    "compose": lambda _, __, a, out: loratool.compose([a, a], out, rank=2),
    "truncate": lambda _, __, a, out: loratool.truncate(a, output=out, rank=1),
    "rescale": lambda _, __, a, out: loratool.rescale(a, output=out, alpha=5, keep="delta"),
    "extract": lambda base, tuned, _, out: loratool.extract(base, tuned, out, rank=2),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_reads_that_fail(
    verb: str,
    fails_at: int,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk gives an error at one of the reads; the message names the input."""
    count = 0

    def failing(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > fails_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(*arguments)

        return call

    monkeypatch.setattr(os, "preadv", failing(os.preadv))
    monkeypatch.setattr(os, "pread", failing(os.pread))
    out = tmp_path / ("out.safetensors" if verb == "fold" else "out")
    with pytest.raises(LoratoolError, match="cannot be read: Input/output error") as caught:
        VERBS[verb](*inputs, out)
    assert any(str(path) in str(caught.value) for path in inputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "tuned"]


@pytest.mark.parametrize("verb", VERBS)
def test_inputs_that_change_meanwhile(
    verb: str,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loratool.files.inputs import InputFiles

    check = InputFiles.check_unchanged

    def changed(self: InputFiles) -> None:
        for folder in inputs:
            (path,) = folder.glob("*.safetensors")
            path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
            os.utime(path, ns=(1, 1))
        check(self)

    monkeypatch.setattr(InputFiles, "check_unchanged", changed)
    out = tmp_path / ("out.safetensors" if verb == "fold" else "out")
    with pytest.raises(LoratoolError, match="changed"):
        VERBS[verb](*inputs, out)
    assert not out.exists()


NOBODY = 65534
LIMITS: dict[str, tuple[int, int] | None] = {
    "few descriptors": (resource.RLIMIT_NOFILE, 32),
    "little memory": (resource.RLIMIT_AS, 600 << 20),
    "one core": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_limits_of_the_system(
    limit: str, locale: str, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, adapter = inputs
    commands: list[list[str | Path]] = [
        ["inspect", adapter, "--spectrum"],
        ["validate", adapter, "--base", base],
        ["merge", base, adapter, "-o", tmp_path / "merged"],
        ["verify", tmp_path / "merged", "--base", base, "--adapter", adapter],
        ["truncate", adapter, "--rank", "1", "-o", tmp_path / "t"],
        ["extract", base, tuned, "--rank", "2", "-o", tmp_path / "e"],
    ]

    def limited() -> None:
        found = LIMITS[limit]
        if found is None:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        else:
            resource.setrlimit(found[0], (found[1], found[1]))

    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "loratool", *command],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"LC_ALL": locale, "PYTHONIOENCODING": "ascii"},
            preexec_fn=limited,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_no_more_processes_for_this_user(
    inputs: tuple[Path, Path, Path], request: pytest.FixtureRequest
) -> None:
    """Threads count as such. The limit binds everybody but the superuser."""
    from loratool.cli.main import _run

    place = Path(tempfile.mkdtemp())  # not under a folder that only the superuser may enter
    request.addfinalizer(lambda: shutil.rmtree(place))
    base, adapter = place / "base", place / "adapter"
    shutil.copytree(inputs[0], base)
    shutil.copytree(inputs[2], adapter)
    outputs, said = place / "outputs", place / "said"
    outputs.mkdir()
    for path in (place, *place.rglob("*")):
        path.chmod(0o777)
    command = ["merge", str(base), str(adapter), "--threads", "4", "-q", "-o"]
    assert _run([*command, str(outputs / "first")], debug=False) == 0  # all is imported
    child = os.fork()
    if not child:
        os.chdir(outputs)
        sys.stderr = said.open("w")
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        status = _run([*command, "second"], debug=False)
        sys.stderr.flush()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2, said.read_text()
    assert said.read_text() == (
        "error: loratool: no more threads are allowed here\nhint: use --threads 1\n"
    )
    assert [path.name for path in outputs.iterdir()] == ["first"]


def test_too_few_threads_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loratool.cli import main as module

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module.cli, "main", failing)
    assert module._run(["schemes"], debug=False) == 2
    assert capsys.readouterr().err == (
        "error: loratool: no more threads are allowed here\nhint: use --threads 1\n"
    )
