"""The same inputs give the same bytes, however many threads there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import lora

import loratool

Make = Callable[..., Path]
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(5)]


@pytest.fixture
def inputs(make_base: Make, make_adapter: Make, tmp_path: Path) -> tuple[Path, Path, list[Path]]:
    """Return a base in two shards, what it was tuned to, and two adapters."""
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    tensors = {f"{name}.weight": torch.randn(96, 80).bfloat16() for name in MODULES}
    names = list(tensors)
    for number, part in enumerate((names[:2], names[2:])):
        file = base / f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file, {"format": "pt"})
    tuned = make_base(
        {
            n: (w.float() + torch.randn(96, 4) @ torch.randn(4, 80)).bfloat16()
            for n, w in tensors.items()
        },
        name="tuned",
    )
    adapters = []
    for number in range(2):
        factors: dict[str, Any] = {}
        for name in MODULES:
            factors |= lora(name, 96, 80)
        adapters.append(make_adapter(factors, name=f"adapter-{number}", target_modules=["q_proj"]))
    return base, tuned, adapters


Verb = Callable[[Path, Path, list[Path], Path, int], object]
VERBS: dict[str, Verb] = {
    "merge": lambda base, _, a, out, n: loratool.merge(base, a, out, threads=n),
    "compose": lambda _, __, a, out, n: loratool.compose(a, out, rank=3, threads=n),
    "dare": lambda _, __, a, out, n: loratool.compose(
        a, out, method="dare", density=0.5, rank=3, threads=n
    ),
    "truncate": lambda _, __, a, out, n: loratool.truncate(a[0], output=out, energy=0.9, threads=n),
    "rescale": lambda _, __, a, out, n: loratool.rescale(a[0], output=out, max_norm=0.5, threads=n),
    "extract": lambda base, tuned, _, out, n: loratool.extract(
        base, tuned, out, rank=4, to="kohya", threads=n
    ),
}


def bytes_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("verb", VERBS)
def test_bytes_do_not_depend_on_threads(
    verb: str, inputs: tuple[Path, Path, list[Path]], tmp_path: Path
) -> None:
    made = []
    for threads in (1, 2, 8):
        folder = tmp_path / f"threads-{threads}"
        folder.mkdir()
        out = folder / ("out.safetensors" if verb == "extract" else "out")
        VERBS[verb](*inputs, out, threads)
        made.append(bytes_of(out))
    assert made[0] == made[1] == made[2]


def test_bytes_do_not_depend_on_which_shard_is_first(
    inputs: tuple[Path, Path, list[Path]], tmp_path: Path
) -> None:
    base, _, adapters = inputs
    loratool.merge(base, adapters, tmp_path / "one")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for old, new in (("00001", "00002"), ("00002", "00001")):
        source = base / f"model-{old}-of-00002.safetensors"
        (renamed / f"model-{new}-of-00002.safetensors").write_bytes(source.read_bytes())
    loratool.merge(renamed, adapters, tmp_path / "two")
    one, two = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "two")
    assert {one[name] for name in one if name.endswith("s")} == {
        two[name] for name in two if name.endswith("s")
    }
