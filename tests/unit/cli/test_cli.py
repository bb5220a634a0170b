"""The command line's contract: exit statuses, one error line, JSON, help, and quiet start-up."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samples import FIXTURES, lora

from loratool.cli.main import COMMANDS

Make = Callable[..., Path]
BASE = FIXTURES / "bases" / "llama-untied"
ADAPTER = FIXTURES / "adapters" / "lora-linear"


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_an_example(command: str, flag: str) -> None:
    result = run(command, flag)
    assert result.returncode == 0
    example = result.stdout.split("Example:\n")[1].split("\n\n")[0]
    starts = ("loratool ", "jq ", "mpiexec ")  # what a pipeline goes on with, what starts many
    assert all(line.strip().startswith(starts) for line in example.splitlines())
    assert f"loratool {command}" in example


@pytest.mark.slow
def test_no_command_shows_the_list() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert run("--version").stdout.startswith("loratool ")


def test_inspect_json_on_an_adapter() -> None:
    result = run("inspect", ADAPTER, "--json")
    document = json.loads(result.stdout)
    assert result.returncode == 0
    assert result.stderr == ""
    assert document["schema"] == 1
    assert (document["kind"], document["scheme"]) == ("adapter", "peft")
    module = document["modules"][0]
    assert module | {"module": "", "in_features": 0, "out_features": 0} == {
        "module": "",
        "kind": "linear",
        "variant": "lora",
        "rank": 2,
        "alpha": 5.0,
        "scale": 2.5,
        "in_features": 0,
        "out_features": 0,
        "dtype": "F32",
    }
    assert document["parameters"] * 4 == document["bytes"]
    assert document["extras"] == []
    assert document["metadata"] == {"format": "pt"}


def test_inspect_json_on_a_model() -> None:
    document = json.loads(run("inspect", BASE, "--json").stdout)
    assert document["kind"] == "model"
    assert document["tensors"] == 21
    assert document["dtypes"] == {"BF16": 21}
    assert document["bytes"] == sum(f.stat().st_size for f in BASE.glob("*.safetensors"))
    assert document["shards"] == len(list(BASE.glob("*.safetensors")))


@pytest.mark.parametrize("arguments", [("inspect", ADAPTER), ("inspect", BASE), ("schemes",)])
@pytest.mark.slow
def test_reading_commands_never_import_torch(arguments: tuple[object, ...]) -> None:
    code = (
        "import sys; from loratool.cli.main import _run; "
        f"_run({[str(a) for a in arguments]!r}, debug=False); "
        "print({'torch', 'numpy', 'safetensors'} & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "set()"


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, loratool; print(sorted(m for m in sys.modules if m.startswith('loratool')))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['loratool']"


@pytest.mark.slow
def test_merge_and_verify(tmp_path: Path) -> None:
    result = run("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert result.returncode == 0
    assert document["schema"] == 1
    assert (document["tensors"], document["merged"], document["copied"]) == (21, 6, 15)
    assert (document["added"], document["unused"]) == (0, [])
    assert document["bytes_written"] == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")
    )
    assert 0.99 < document["retention"] < 1.01
    result = run("verify", tmp_path / "out", "--base", BASE, "--adapter", ADAPTER, "--json")
    assert (result.returncode, json.loads(result.stdout)) == (
        0,
        {"schema": 1, "ok": True, "findings": []},
    )
    result = run("verify", tmp_path / "out", "--base", BASE, "--adapter", ADAPTER, "-w", "0.5")
    assert result.returncode == 1
    assert "LT105" in result.stdout


@pytest.mark.slow
def test_dry_run_as_json_and_as_tables(tmp_path: Path) -> None:
    result = run("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert document["dry_run"] is True
    assert len(document["steps"]) == 6
    assert list(tmp_path.iterdir()) == []
    result = run("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--dry-run")
    assert result.returncode == 0
    assert "self_attn.{q,v}_proj.weight" in result.stdout
    assert "\\n" not in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", BASE, ADAPTER),
        ("merge", BASE, "-o", "x"),
        ("merge", BASE, ADAPTER, "-o", "x", "--dtype", "int8"),
        ("frobnicate",),
        ("inspect",),
        ("inspect", "/nonexistent"),
        ("inspect", "--nonsense", BASE),
        ("validate", "/nonexistent"),
        ("merge", "/nonexistent", ADAPTER, "-o", "x"),
        ("merge", ADAPTER, BASE, "-o", "x"),
        ("verify", "/nonexistent", "--base", BASE, "--adapter", ADAPTER),
    ],
)
@pytest.mark.slow
def test_failures_are_one_line_and_status_2(arguments: tuple[object, ...], tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    error, *hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert len(hint) <= 1
    assert all(line.startswith("hint: ") for line in hint)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_a_traceback() -> None:
    assert "Traceback" in run("inspect", "/nonexistent", "--debug").stderr
    assert "Traceback" not in run("inspect", "/nonexistent").stderr


@pytest.mark.slow
def test_validate_exits_with_1_on_errors(make_adapter: Make) -> None:
    bad = make_adapter(lora("a.q", 6, 5), r=7)
    result = run("validate", bad, "--json")
    document = json.loads(result.stdout)
    assert result.returncode == 1
    assert document["ok"] is False
    assert set(document["findings"][0]) == {"code", "severity", "where", "message", "hint"}
    assert run("validate", ADAPTER).returncode == 0


def test_schemes_as_json() -> None:
    document = json.loads(run("schemes", "--json").stdout)
    names = [scheme["name"] for scheme in document["schemes"]]
    assert names == sorted(names)
    assert {"peft", "kohya", "diffusers", "diffusers-legacy", "comfy", "mlx"} <= set(names)
    assert all(scheme["reads"] for scheme in document["schemes"])
    written = {scheme["name"] for scheme in document["schemes"] if scheme["writes"]}
    assert set(names) - written == {"numbered"}
    assert all(set(s) == {"name", "reads", "writes", "example"} for s in document["schemes"])


@pytest.mark.slow
def test_names_are_shown_and_not_obeyed(make_adapter: Make) -> None:
    names = ["[bold]x[/bold]", "[/nope]", "a\x1b[31mred", "b\u202eevil", "line\nbreak"]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= lora(f"m.{name}", 3, 3)
    for arguments in (("inspect",), ("inspect", "--modules"), ("validate",)):
        output = run(*arguments, make_adapter(tensors, name="-".join(arguments))).stdout
        assert "[bold]x[/bold]" in output
        assert "[/nope]" in output or arguments == ("validate",)
        assert "\x1b" not in output
        assert "\u202e" not in output
        assert "\\x1b[31mred" in output


@pytest.mark.slow
def test_colour_only_on_terminals_and_never_with_no_color() -> None:
    def on_terminal(**environment: str) -> str:
        master, slave = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
        subprocess.run(
            [
                sys.executable,
                "-m",
                "loratool",
                "validate",
                str(FIXTURES / "adapters" / "factor-missing"),
            ],
            stdout=slave,
            stderr=slave,
            check=False,
            env=env | {"TERM": "xterm-256color"} | environment,
        )
        os.close(slave)
        output = b""
        try:
            while data := os.read(master, 4096):
                output += data
        except OSError:
            pass
        os.close(master)
        return output.decode()

    assert "\x1b[1;31m" in on_terminal()
    assert "\x1b[1;31m" not in on_terminal(NO_COLOR="1")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    env = os.environ | {"_LORATOOL_COMPLETE": f"{shell}_source"}
    script = "import sys; sys.argv[0] = 'loratool'; from loratool.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env
    )
    assert "_LORATOOL_COMPLETE" in result.stdout


@pytest.mark.slow
def test_output_that_nobody_reads_is_no_bug(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for index in range(3000):
        tensors |= lora(f"m.{index}.q", 2, 2, 1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    command = f"{sys.executable} -m loratool inspect --modules {tmp_path} | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr
    assert "bug" not in result.stderr
