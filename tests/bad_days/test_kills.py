"""Runs that are killed at any moment: the old output or the new one, whole; inputs as they were.

``--kills N`` kills each verb so often.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.slow

LAYERS, SIZE, RANK = 4, 512, 4
START = 0.1
"""Seconds that the interpreter takes before it can have done anything."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, what it was tuned to, and two adapters."""
    folder, numbers = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
    weights = {f"{name}.weight": numbers.normal(size=(SIZE, SIZE)) for name in names}
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = numbers.normal(size=(RANK, SIZE))
        factors[f"base_model.model.{name}.lora_B.weight"] = numbers.normal(size=(SIZE, RANK))
    tuned = {
        f"{name}.weight": weights[f"{name}.weight"]
        + factors[f"base_model.model.{name}.lora_B.weight"]
        @ factors[f"base_model.model.{name}.lora_A.weight"]
        for name in names
    }
    for name, tensors in (("base", weights), ("tuned", tuned)):
        (folder / name).mkdir()
        arrays = {key: value.astype("f4") for key, value in tensors.items()}
        save_file(arrays, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    for name in ("one", "two"):
        (folder / name).mkdir()
        arrays = {key: value.astype("f4") for key, value in factors.items()}
        save_file(arrays, folder / name / "adapter_model.safetensors", {"format": "pt"})
        (folder / name / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}'
        )
    return folder


VERBS: dict[str, list[str]] = {
    "merge": ["base", "one"],
    "convert": ["one", "--to", "mlx"],
    "compose": ["one", "two", "--rank", "2"],
    "truncate": ["one", "--rank", "2"],
    "rescale": ["one", "--scale", "2"],
    "extract": ["base", "tuned", "--rank", "4"],
}


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_is_the_old_one_or_the_new_one(
    verb: str,
    inputs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    command = [sys.executable, "-m", "loratool", verb, *VERBS[verb], "-q", "--force", "-o"]

    def start(output: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(output)], cwd=inputs)

    expected, output = tmp_path / "expected", tmp_path / "out"
    begun = time.monotonic()
    assert start(expected).wait(60) == 0
    duration = time.monotonic() - begun
    new, before = digest(expected), digest(inputs)
    moments, killed = random.Random(verb), 0
    for number in range(request.config.getoption("--kills")):
        if number % 2:
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            save_file({"x": np.ones(3)}, output / "model.safetensors")
        old = digest(output)
        process = start(output)
        time.sleep(moments.uniform(min(START, duration / 2), duration))
        process.kill()
        killed += process.wait(60) != 0
        # What was moved aside when it was killed comes back with the next run.
        aside = list(tmp_path.glob(".out.loratool-old-*"))
        assert digest(output if output.exists() or not aside else aside[0]) in (old, new)
        assert digest(inputs) == before
    assert start(output).wait(60) == 0
    assert digest(output) == new
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}
    record_property("killed", killed)


def test_the_umask_says_who_may_read_an_output(inputs: Path, tmp_path: Path) -> None:
    """A folder or a file that is replaced, and what was said of it, has no say."""
    output = tmp_path / "out"
    for mask in (0o022, 0o077):
        command = [sys.executable, "-m", "loratool", "rescale", "one", "--scale", "2", "-q"]
        subprocess.run([*command, "--force", "-o", output], cwd=inputs, check=True, umask=mask)
        assert output.stat().st_mode & 0o777 == 0o777 & ~mask
        for path in output.iterdir():
            assert path.stat().st_mode & 0o7777 == 0o666 & ~mask
            assert path.stat().st_uid == os.geteuid()
            path.chmod(0o4777)
        output.chmod(0o700)


def test_names_that_a_folder_takes_for_one(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on disks that do not tell A from a: two files of a model are not written as one."""
    import loratool
    from loratool.errors import OutputError

    (base := tmp_path / "base").mkdir()
    files = {"model-A.safetensors": "a.q.weight", "model-a.safetensors": "b.q.weight"}
    for name, key in files.items():
        save_file({key: np.ones((4, 4), "f4")}, base / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, key in files.items()}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    factors = {"a.q.lora_A.weight": np.ones((1, 4)), "a.q.lora_B.weight": np.ones((4, 1))}
    save_file(factors, tmp_path / "adapter.safetensors")
    real = os.open

    def folded(path: os.PathLike[str] | str, flags: int, mode: int = 0o777, **more: int) -> int:
        place = Path(path)
        if flags & (os.O_CREAT | os.O_RDWR):
            place = place.with_name(place.name.lower())
        return real(place, flags, mode, **more)

    monkeypatch.setattr(os, "open", folded)
    with pytest.raises(OutputError, match=r"model-a\.safetensors"):
        loratool.merge(base, [tmp_path / "adapter.safetensors"], tmp_path / "out", alpha=1)
    assert not (tmp_path / "out").exists()
