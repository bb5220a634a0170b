"""Workers that are killed in every phase: nothing is lost, and at most one part is done again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.slow

SHARDS, SIZE, SMALL, RANK = 3, 64, 16, 2
KILLED = Path(__file__).parents[1] / "support" / "killed_worker.py"
DRIVER = """
import os, signal, sys
from pathlib import Path

moment, log = int(sys.argv[1]), open(sys.argv[2], "a")
calls = 0

def counted(name, real):
    def call(*arguments, **options):
        global calls
        calls += 1
        # Before the call or after it: what is between two of them is hit, too.
        if calls == moment:
            print("killed before", calls, name, arguments[:2], file=log, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

for name in ("replace", "rename", "link", "fsync", "mkdir", "pwrite", "copy_file_range", "unlink",
             "ftruncate", "rmdir"):
    setattr(os, name, counted(name, getattr(os, name)))

from loratool.shards import model
model.CUT_ABOVE, model.CUT_BYTES = int(sys.argv[3]), int(sys.argv[4])
from loratool.cli.main import main
try:
    main(sys.argv[5:])
finally:
    print("calls", calls, file=log, flush=True)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base in three files, and an adapter."""
    folder, numbers = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    names: dict[str, str] = {}
    factors = {}
    for number in range(1, SHARDS + 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        module = f"model.layers.{number}.self_attn.q_proj"
        tensors = {
            f"{module}.weight": numbers.normal(size=(SIZE, SIZE)),
            f"model.layers.{number}.mlp.up_proj.weight": numbers.normal(size=(SIZE, SIZE)),
        }
        factors[f"base_model.model.{module}.lora_A.weight"] = numbers.normal(size=(RANK, SIZE))
        factors[f"base_model.model.{module}.lora_B.weight"] = numbers.normal(size=(SIZE, RANK))
        arrays = {key: value.astype("f4") for key, value in tensors.items()}
        save_file(arrays, folder / "base" / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    arrays = {key: value.astype("f4") for key, value in factors.items()}
    save_file(arrays, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}'
    )
    (folder / "driver.py").write_text(DRIVER)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(output: Path) -> dict[str, bytes]:
    """Return the records of the parts that are done."""
    place = output.with_name(f"{output.name}.loratool-parts") / "records"
    found = {path.name: path.read_bytes() for path in place.glob("*.json")}
    return {name: data for name, data in found.items() if re.fullmatch(r"\d+\.json", name)}


VERB = ["merge", "base", "adapter", "-o"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_worker_and_keep_what_is_done(
    number: int, status: int, inputs: Path, tmp_path: Path
) -> None:
    """One comes while the second part is written; the first one stays."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, signal, sys\n"
        "from loratool.shards import job\n"
        "from loratool.plan import run\n"
        "from loratool.shards.folder import PartsFolder\n"
        "real, count = PartsFolder.keep, 0\n"
        "def keep(self, path, name):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 2:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        import time; time.sleep(5)\n"
        "    return real(self, path, name)\n"
        "PartsFolder.keep = keep\n"
        "from loratool.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    output = tmp_path / "out"
    line = [*VERB, str(output), "--shards", "auto"]
    done = subprocess.run(
        [sys.executable, driver, *line], cwd=inputs, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    kept = records(output)
    assert len(kept) == 1
    folder = output.with_name("out.loratool-parts")
    assert list((folder / "claims").iterdir()) == []
    assert list((folder / "work").iterdir()) == []
    subprocess.run([sys.executable, "-m", "loratool", *line, "-q"], cwd=inputs, check=True)
    after = records(output)
    assert len(after) == SHARDS and {name: after[name] for name in kept} == kept


def test_a_worker_that_is_killed_while_others_work(inputs: Path, tmp_path: Path) -> None:
    """Its part is taken over by one that waits."""
    output, log = tmp_path / "out", tmp_path / "log"
    python = [sys.executable, "-m", "loratool"]
    subprocess.run([*python, *VERB, tmp_path / "one", "-q"], cwd=inputs, check=True)
    driver = [sys.executable, "driver.py"]
    line = [*VERB, str(output), "--shards", "auto", "-q"]
    workers = [
        subprocess.Popen([*driver, str(moment), str(log), "1000", "9000", *line], cwd=inputs)
        for moment in (25, 40, 55)
    ]
    finish = subprocess.Popen(
        [*driver, "0", str(log), "1000", "9000", *line, "--finish", "--wait"], cwd=inputs
    )
    for worker in workers:
        worker.wait(60)
    assert finish.wait(60) == 0
    assert digests(output) == digests(tmp_path / "one")
    assert not output.with_name("out.loratool-parts").exists()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a folder with a base in several files, what it was tuned to, and an adapter."""
    numbers = np.random.default_rng(0)
    factors, index = {}, {}
    for folder in ("base", "tuned", "adapter"):
        (tmp_path / folder).mkdir()
    for layer in range(SHARDS):
        module = f"model.layers.{layer}.self_attn.q_proj"
        down, up = numbers.normal(size=(RANK, SMALL)), numbers.normal(size=(SMALL, RANK))
        weight = numbers.normal(size=(SMALL, SMALL))
        file = f"model-{layer + 1:05}-of-{SHARDS:05}.safetensors"
        index[f"{module}.weight"] = file
        for folder, values in (("base", weight), ("tuned", weight + up @ down)):
            tensors = {f"{module}.weight": values.astype("f4")}
            save_file(tensors, tmp_path / folder / file, {"format": "pt"})
        factors[f"base_model.model.{module}.lora_A.weight"] = down.astype("f4")
        factors[f"base_model.model.{module}.lora_B.weight"] = up.astype("f4")
    for folder in ("base", "tuned"):
        content = {"metadata": {"total_size": 4 * SHARDS * SMALL**2}, "weight_map": index}
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(content))
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "times", "cut"), [("merge", 8, ()), ("merge", 8, (100, 1500)), ("extract", 5, ())]
)
def test_the_next_worker_goes_on(
    verb: str, times: int, cut: tuple[int, ...], small: Path, pytestconfig: pytest.Config
) -> None:
    kills = times * pytestconfig.getoption("--kills")
    before = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
    made = subprocess.run(
        [sys.executable, KILLED, verb, small, str(kills), *map(str, cut)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert not told["wrong"], made.stderr
    assert told["killed"] >= min(kills, told["steps"]) // 2
    assert told["steps"] > 10 * SHARDS  # else something is not counted any more
    assert all(path.read_bytes() == data for path, data in before.items())
    shutil.rmtree(small)
