"""The JSON documents of every verb on fixed inputs, and what is beside them on disk.

Each golden holds the document, the exit status, and of what was written the sizes, the tensors,
the metadata and the configuration. ``LORATOOL_UPDATE=1 pytest tests/verbs/test_goldens.py``
writes them anew; the difference is what a change does to the scripts of others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from samples import FIXTURES

from loratool.cli.main import cli

GOLDENS: Final = Path(__file__).with_name("goldens")
TINY: Final = 1e-6
"""Below it an error is the rounding of float32, whose digits are those of the BLAS."""
INPUTS: Final = {
    "base": "bases/llama-untied",
    "tied": "bases/llama-tied",
    "one": "adapters/lora-linear",
    "two": "adapters/rank-alpha-patterns",
    "dora": "adapters/dora-linear",
    "heads": "adapters/modules-to-save",
    "broken": "adapters/factor-missing",
    "loha": "adapters/loha",
    "bare": "adapters/module-path-without-config",
}
PREPARED: Final = {
    "tuned": "merge base two -o tuned --dtype float32",
    "kohya.safetensors": "convert two --to kohya -o kohya.safetensors",
}
"""Made from those with the command line, where a case asks for it."""
CASES: Final = {
    "inspect": "inspect one",
    "inspect-patterns": "inspect two --modules",
    "inspect-spectrum": "inspect two --spectrum",
    "inspect-dora": "inspect dora",
    "inspect-heads": "inspect heads",
    "inspect-kohya": "inspect kohya.safetensors",
    "inspect-model": "inspect base",
    "validate": "validate one",
    "validate-base": "validate one --base base",
    "validate-deep": "validate heads --base base --deep",
    "validate-broken": "validate broken",
    "validate-loader": "validate two --for vllm",
    "schemes": "schemes",
    "compare": "compare one two",
    "convert": "convert two --to kohya -o out.safetensors",
    "convert-folded": "convert two --to module-path -o out.safetensors",
    "convert-mlx": "convert one --to mlx -o out",
    "convert-back": "convert kohya.safetensors --to peft --base base -o out",
    "convert-dora": "convert dora --to comfy -o out.safetensors",
    "convert-nearest": "convert dora --to peft --to-lora --base base --rank 3 -o out",
    "convert-loader": "convert two --for vllm -o out",
    "convert-dtype": "convert one --to peft --dtype bfloat16 -o out",
    "compose": "compose one two -w 0.5 -w -2 -o out",
    "compose-rank": "compose one two --rank 2 -o out",
    "compose-kohya": "compose one two --rank 2 --to kohya -o out.safetensors",
    "compose-ties": "compose one two --method ties --density 0.5 -o out",
    "compose-heads": "compose one heads --extras first -o out",
    "truncate": "truncate two --rank 1 -o out",
    "truncate-error": "truncate two --max-error 0.5 -o out",
    "truncate-size": "truncate two --max-size 4KB -o out",
    "truncate-kohya": "truncate kohya.safetensors --energy 0.7 -o out.safetensors",
    "rescale": "rescale two --scale 0.5 -o out",
    "rescale-alpha": "rescale two --alpha 8 --keep delta -o out",
    "rescale-fold": "rescale two --fold -o out",
    "rescale-bare": "rescale bare --scale 3 -o out.safetensors",
    "extract": "extract base tuned --rank 2 -o out",
    "extract-auto": "extract base tuned --max-error 0.3 -o out",
    "extract-kohya": "extract base tuned --rank 2 --to kohya -o out.safetensors",
    "merge": "merge base one -o out",
    "merge-two": "merge base one two -w 0.5 -w -1 --dtype bfloat16 -o out",
    "merge-dora": "merge base dora -o out",
    "merge-heads": "merge base heads -o out",
    "merge-tied": "merge tied one -o out",
    "verify": "verify tuned --base base --adapter two",
    "verify-other": "verify tuned --base base --adapter one",
}
WRITING: Final = ("convert", "compose", "truncate", "rescale", "extract", "merge")
UNSTABLE: Final = {"peak_memory": "<bytes>", "version": "<version>"}
DIGEST: Final = re.compile(r"\b[0-9a-f]{64}\b")


def every_command() -> dict[str, list[str]]:
    """Return the command line of every golden, those that write also as a dry run."""
    found = {}
    for name, line in CASES.items():
        words = [*line.split(), "--json"]
        found[name] = words
        if words[0] in WRITING:
            found[f"{name}.dry-run"] = [*words, "--dry-run"]
    return found


COMMANDS: Final = every_command()


def plain(value: Any, key: str = "") -> Any:
    """Replace what differs between machines, and digits that no one should rely on."""
    if key in UNSTABLE:
        return UNSTABLE[key]
    match value:
        case dict():
            return {name: plain(item, name) for name, item in value.items()}
        case list():
            return [plain(item, key) for item in value]
        case float():
            return 0.0 if abs(value) < TINY else float(f"{value:.4g}")
        case str():
            text = DIGEST.sub("<sha256>", value)
            return json.dumps(plain(json.loads(text))) if text.startswith("{") else text
    return value


def written(output: Path) -> dict[str, Any]:
    """Describe what is at ``output``."""
    files = [output] if output.is_file() else sorted(output.iterdir())
    found: dict[str, Any] = {}
    for file in files:
        about: dict[str, Any] = {"bytes": file.stat().st_size}
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                about["metadata"] = dict(sorted((tensors.metadata() or {}).items()))
                about["tensors"] = {
                    key: f"{part.get_dtype()} {part.get_shape()}"
                    for key in tensors.offset_keys()
                    for part in (tensors.get_slice(key),)
                }
        if file.name == "adapter_config.json":
            about["content"] = json.loads(file.read_text())
        found[file.name] = about
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_documents_are_as_they_were(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    for path, source in INPUTS.items():
        if path in words or "tuned" in words or "kohya.safetensors" in words:
            shutil.copytree(FIXTURES / source, tmp_path / path)
    runner = CliRunner()
    for path, line in PREPARED.items():
        if path in words:
            made = runner.invoke(cli, [*line.split(), "--quiet"])
            assert made.exit_code == 0, made.output
    result = runner.invoke(cli, [*words, "--quiet"] if words[0] in WRITING else words)
    found: dict[str, Any] = {"exit": result.exit_code}
    found["document"] = json.loads(result.stdout) if result.stdout else None
    if result.exit_code == 2:
        found["error"] = result.stderr.splitlines()
    output = Path(words[words.index("-o") + 1]) if "-o" in words else None
    if output is not None and output.exists():
        found["written"] = written(output)
    # The command line itself, so that a golden can be read alone.
    found = {"command": " ".join(["loratool", *words]), **plain(found)}
    golden = GOLDENS / f"{name}.json"
    if os.environ.get("LORATOOL_UPDATE"):
        golden.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == json.loads(golden.read_text())


def test_every_golden_has_its_command() -> None:
    assert {path.stem for path in GOLDENS.glob("*.json")} == set(COMMANDS)
