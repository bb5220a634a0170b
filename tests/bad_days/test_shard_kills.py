"""Workers that are killed at each of their steps on the disk: nothing is lost, nothing done twice.

``--kills N`` kills more of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.slow

LAYERS, SIZE, RANK = 4, 16, 2
DRIVER = Path(__file__).parents[1] / "support" / "killed_worker.py"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Return a folder with a base in several files, what it was tuned to, and an adapter."""
    numbers = np.random.default_rng(0)
    factors, index = {}, {}
    for folder in ("base", "tuned", "adapter"):
        (tmp_path / folder).mkdir()
    for layer in range(LAYERS):
        module = f"model.layers.{layer}.self_attn.q_proj"
        down, up = numbers.normal(size=(RANK, SIZE)), numbers.normal(size=(SIZE, RANK))
        weight = numbers.normal(size=(SIZE, SIZE))
        file = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        index[f"{module}.weight"] = file
        for folder, values in (("base", weight), ("tuned", weight + up @ down)):
            tensors = {f"{module}.weight": values.astype("f4")}
            save_file(tensors, tmp_path / folder / file, {"format": "pt"})
        factors[f"base_model.model.{module}.lora_A.weight"] = down.astype("f4")
        factors[f"base_model.model.{module}.lora_B.weight"] = up.astype("f4")
    for folder in ("base", "tuned"):
        content = {"metadata": {"total_size": 4 * LAYERS * SIZE**2}, "weight_map": index}
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(content))
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}'
    )
    return tmp_path


@pytest.mark.parametrize(("verb", "times"), [("merge", 8), ("extract", 5)])
def test_the_next_worker_goes_on(
    verb: str, times: int, inputs: Path, pytestconfig: pytest.Config
) -> None:
    kills = times * pytestconfig.getoption("--kills")
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    made = subprocess.run(
        [sys.executable, DRIVER, verb, inputs, str(kills)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert not told["wrong"], made.stderr
    assert told["killed"] >= min(kills, told["steps"]) // 2
    assert told["steps"] > 10 * LAYERS  # else something is not counted any more
    assert all(path.read_bytes() == data for path, data in before.items())
    shutil.rmtree(inputs)
