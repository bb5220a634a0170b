"""What runs on the processor imports no torch, nor what numpy and its friends drag along."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import FIXTURES, lora

pytestmark = pytest.mark.slow

Make = Callable[..., Path]
UNWANTED = ("torch", "array_api_compat", "numpy.f2py", "numpy.testing")
ASK = """
import sys
from loratool.cli.main import main
try:
    main(sys.argv[1:])
finally:
    wanted = {unwanted!r}
    print([name for name in wanted if name in sys.modules], file=sys.stderr)
"""
STUB = "raise ImportError('no torch here')\n"


def run(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command and have it say which unwanted modules were loaded."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", ASK.format(unwanted=UNWANTED), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture
def without_torch(tmp_path: Path) -> Path:
    """A folder to put before all others, where importing torch fails."""
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text(STUB)
    return tmp_path / "stub"


def check(base: Path, adapters: list[Path], tmp_path: Path, *options: str) -> None:
    """Merge and verify, and make sure that nothing unwanted was imported."""
    made = run("merge", base, *adapters, "-o", tmp_path / "out", *options)
    assert made.returncode == 0, made.stderr
    assert made.stderr.splitlines()[-1] == "[]"
    given = [part for adapter in adapters for part in ("--adapter", adapter)]
    found = run("verify", tmp_path / "out", "--base", base, *given)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_of_any_width(
    kind: torch.dtype, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(60, 50).to(kind), "b": torch.ones(3)})
    check(base, [make_adapter(lora("a.q", 60, 50, dtype=torch.bfloat16))], tmp_path)


def test_another_dtype_and_several_adapters(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(60, 50), "b": torch.ones(3)})
    one = make_adapter(lora("a.q", 60, 50), "one")
    dora = lora("a.q", 60, 50) | {"a.q.lora_magnitude_vector": torch.rand(60) + 0.5}
    check(base, [one, make_adapter(dora, "two", use_dora=True)], tmp_path, "--dtype", "float16")


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("llama-bin", "lora-linear"),
        ("llama-untied", "pissa"),
        ("llama-untied", "olora"),
        ("llama-untied", "loralib-pickled"),
        ("llama-untied", "resized-vocab"),
        ("llama-tied", "tied-trainable-tokens"),
        ("qwen2", "bias-old-names"),
    ],
)
def test_pickles_and_edits_of_all_kinds(base: str, adapter: str, tmp_path: Path) -> None:
    folder = FIXTURES / "adapters" / adapter
    check(FIXTURES / "bases" / base, [folder], tmp_path)


def test_merge_works_where_torch_does_not(without_torch: Path, tmp_path: Path) -> None:
    base, adapter = FIXTURES / "bases" / "llama-untied", FIXTURES / "adapters" / "lora-linear"
    made = run("merge", base, adapter, "-o", tmp_path / "out", path=without_torch)
    assert made.returncode == 0, made.stderr
    found = run(
        "verify", tmp_path / "out", "--base", base, "--adapter", adapter, path=without_torch
    )
    assert found.returncode == 0, found.stderr
    shard = next((tmp_path / "out").glob("*.safetensors"))
    assert load_file(shard)


def test_a_gpu_without_torch_is_one_line(without_torch: Path, tmp_path: Path) -> None:
    base, adapter = FIXTURES / "bases" / "llama-untied", FIXTURES / "adapters" / "lora-linear"
    arguments = ("merge", base, adapter, "-o", tmp_path / "out", "--device", "cuda")
    made = run(*arguments, path=without_torch)
    error, hint, _ = made.stderr.splitlines()
    assert made.returncode == 2
    assert error == (
        "error: --device cuda: computing on a GPU needs PyTorch, which cannot be imported: "
        "no torch here"
    )
    assert hint.startswith("hint: leave out --device")
    assert not (tmp_path / "out").exists()


def test_the_environment_is_the_command_lines_business_alone(tmp_path: Path) -> None:
    code = (
        "import os, loratool; before = dict(os.environ); "
        f"loratool.merge({str(FIXTURES / 'bases' / 'llama-untied')!r}, "
        f"[{str(FIXTURES / 'adapters' / 'lora-linear')!r}], {str(tmp_path / 'out')!r}); "
        "assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("verb", ["truncate", "compare"])
def test_all_verbs_say_alike_that_a_gpu_needs_torch(
    verb: str, without_torch: Path, tmp_path: Path
) -> None:
    adapter = FIXTURES / "adapters" / "lora-linear"
    more = ("--rank", 2, "-o", tmp_path / "out") if verb == "truncate" else (adapter,)
    made = run(verb, adapter, *more, "--device", "cuda", path=without_torch)
    assert made.returncode == 2
    assert made.stderr.startswith("error: --device cuda: computing on a GPU needs PyTorch, ")
    assert "hint: leave out --device" in made.stderr


@pytest.mark.parametrize("code", ["import loratool; loratool.live", "import loratool.live"])
def test_live_layers_without_torch_say_that_they_need_it(code: str, without_torch: Path) -> None:
    path = os.pathsep.join([str(without_torch), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert found.stderr.splitlines()[-1].startswith("ImportError: loratool.live needs PyTorch")


def test_live_is_reached_through_the_package() -> None:
    code = "import sys, loratool; assert 'torch' not in sys.modules; loratool.live.attach"
    subprocess.run([sys.executable, "-c", code], check=True)
