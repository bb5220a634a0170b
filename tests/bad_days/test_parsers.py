"""Every parser of what comes from strangers, fuzzed with an eye on which of its lines are reached.

``--fuzz SECONDS`` tries each longer. What is found is kept under ``crashers/`` as a case.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import save

from loratool.files.containers import FILES

FUZZER = Path(__file__).parents[1] / "support" / "fuzz_target.py"
SHORTEST, LARGEST = 1.0, 8192
"""Seconds for one parser, where none are given; bytes of an input."""


def safetensors() -> Iterator[bytes]:
    yield save({"a.lora_A.weight": np.ones((2, 3), "f4"), "b": np.ones(3, "f2")}, {"format": "pt"})
    yield save({})


def saved(value: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def pickles() -> Iterator[bytes]:
    whole = torch.arange(12.0).reshape(3, 4)
    value = {"a": whole, "b": whole.T, "c": whole[1:].bfloat16(), "d": {"e": [torch.tensor(1)]}}
    yield saved(value)
    yield saved(value, _use_new_zipfile_serialization=False)
    yield saved({"weights": torch.nn.Parameter(whole), "n": 3, "s": "x"})


def gguf() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "x.gguf", "llama")
        writer.add_block_count(1)
        writer.add_token_list(["a", "b"])
        writer.add_tensor("output.weight", np.ones((2, 32), np.float32))
        codes = quantize(np.ones((2, 32), np.float32), GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.attn_q.weight", codes, raw_dtype=GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        yield (Path(folder) / "x.gguf").read_bytes()


def arrays() -> Iterator[bytes]:
    for value in (np.ones((2, 3), "f4"), np.ones((3, 2), "f8").T, np.zeros((), "i8")):
        file = io.BytesIO()
        np.save(file, value)
        yield file.getvalue()


def archives() -> Iterator[bytes]:
    for write in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        write(file, a=np.ones((2, 3), "f4"), b=np.arange(3))
        yield file.getvalue()


def texts() -> Iterator[bytes]:
    yield b'{"r": 8, "target_modules": ["q_proj"], "rank_pattern": {"^a.*b$": 4}, "x": null}'
    yield b'r: 8\nalpha: 1.5  # here\nname: "a b"\nlist:\n  - 1\nnested:\n  a: 1\n'


def patterns() -> Iterator[bytes]:
    yield rb".*\.(q|v)_proj"
    yield rb"(a?){20}a{20}|model\.layers\.(1|2)[0-9]*\.[^.]+\.\w+$"
    yield rb"(?:x|y)*?(?=z)[a-f\d]{2,3}\b(?i:q)"


def descriptions() -> Iterator[bytes]:
    """What describes a distributed checkpoint, whose shards are not there."""
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(2, 3), "b": {"c": [1]}}, checkpoint_id=folder, no_dist=True)
        yield (Path(folder) / ".metadata").read_bytes()


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "safetensors": safetensors,
    "pt": pickles,
    "gguf": gguf,
    "npy": arrays,
    "npz": archives,
    "metadata": descriptions,
    "json": texts,
    "yaml": texts,
    "pattern": patterns,
}


def test_every_container_is_fuzzed() -> None:
    suffixes = [set(claim["suffixes"]) for claim in FILES.claims().values()]
    assert suffixes
    assert all(each & {f".{name}" for name in SEEDS} for each in suffixes)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_an_input_is_read_or_refused(
    name: str, tmp_path: Path, fuzz_seconds: float, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("atheris")
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for number, data in enumerate(SEEDS[name]()):
        (seeds / f"{number:02}").write_bytes(data)
    limits = [f"-max_total_time={max(1, round(fuzz_seconds))}", f"-max_len={LARGEST}"]
    limits += ["-timeout=5", "-rss_limit_mb=1500", f"-artifact_prefix={tmp_path}/", "-seed=1"]
    done = subprocess.run(
        [sys.executable, str(FUZZER), name, str(seeds), *limits],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = [path.name for path in tmp_path.iterdir() if path.is_file()]
    assert done.returncode == 0, (found, done.stdout[-3000:], done.stderr[-3000:])
    assert not found
    tried = re.findall(r"Done (\d+) runs", done.stderr)
    assert tried, done.stderr[-2000:]
    record_property("inputs", int(tried[0]))
