"""What is published is complete: the wheel and the source archive are built, installed and run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from samples import FIXTURES, ROOT

pytestmark = pytest.mark.slow

NEEDED = ("array-api-compat", "click", "numpy", "rich", "safetensors", "threadpoolctl")
"""What is installed in an environment without PyTorch."""
BASE, ADAPTER = FIXTURES / "bases" / "llama-untied", FIXTURES / "adapters" / "lora-linear"


def build(source: Path, folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *options]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([*command, str(source)], check=True, capture_output=True, env=environment)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("archive")
    with tarfile.open(build(ROOT, tmp_path_factory.mktemp("sdist"), "--sdist")) as packed:
        packed.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and what it needs, and without PyTorch."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in _with_dependencies(NEEDED):
        _link(name, packages)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    options = ["--no-index", "--no-deps", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True)
    return folder / "bin"


def _with_dependencies(names: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.split(r"[^\w.-]", left.pop())[0].lower()
        if name in found:
            continue
        found.add(name)
        required = importlib.metadata.requires(name) or []
        left += [line for line in required if ";" not in line]
    return found


def _link(name: str, packages: Path) -> None:
    """Have what is installed here of a distribution there too."""
    here = Path(str(importlib.metadata.distribution(name).locate_file("")))
    tops = {file.parts[0] for file in importlib.metadata.files(name) or ()}
    for top in tops - {"..", "__pycache__"}:
        (packages / top).symlink_to(here / top)


def run(environment: Path, *arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [environment / "loratool", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PATH": str(environment)},
        cwd=environment,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    tracked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "loratool").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {name for name in names if ".dist-info/" not in name} == tracked
    assert "loratool/py.typed" in names


def test_the_source_archive_makes_the_same_wheel(
    wheel: Path, archive: Path, tmp_path: Path
) -> None:
    again = build(archive, tmp_path, "--wheel")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_the_source_archive_holds_what_its_tests_and_pages_need(archive: Path) -> None:
    for name in (
        *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"),
        *("constraints.txt", "mkdocs.yml", ".pre-commit-hooks.yaml", "benchmarks/README.md"),
        *("docs/index.md", "docs/site_hooks.py", "examples/questions_and_answers.py"),
        *("tests/conftest.py", "tests/support/samples.py", "fixtures/cases.json"),
    ):
        assert (archive / name).exists(), name
    here = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")}
    assert here == {path.relative_to(archive) for path in (archive / "tests").rglob("*.py")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/contract/test_docs.py", "-k", "links or sorted"],
        cwd=archive,
        env=os.environ | {"PYTHONPATH": str(archive)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_works_without_torch(environment: Path, tmp_path: Path) -> None:
    python = [environment / "python", "-c", "import torch"]
    assert b"No module named 'torch'" in subprocess.run(python, capture_output=True).stderr
    assert run(environment, "--version").startswith("loratool")
    assert "peft" in run(environment, "schemes")
    assert json.loads(run(environment, "inspect", ADAPTER, "--spectrum", "--json"))["modules"]
    run(environment, "validate", ADAPTER, "--base", BASE, "--deep")
    for name in ("kohya", "gguf", "mlx", "transposed", "prefixed"):
        suffix = {"gguf": ".gguf", "prefixed": ".bin"}.get(name, "")
        out = tmp_path / f"{name}{suffix}"
        run(environment, "convert", ADAPTER, "--to", name, "--base", BASE, "-o", out)
    run(environment, "truncate", ADAPTER, "--rank", 1, "-o", tmp_path / "small")
    run(environment, "rescale", ADAPTER, "--scale", 2, "-o", tmp_path / "twice")
    run(environment, "compose", ADAPTER, tmp_path / "small", "-o", tmp_path / "sum")
    run(environment, "compare", ADAPTER, tmp_path / "sum")
    run(environment, "merge", BASE, ADAPTER, "-o", tmp_path / "merged")
    run(environment, "verify", tmp_path / "merged", "--base", BASE, "--adapter", ADAPTER)
    run(environment, "extract", BASE, tmp_path / "merged", "--rank", 2, "-o", tmp_path / "again")


@pytest.mark.parametrize(
    ("base", "adapter"),
    [("llama-bin", "bin-adapter"), ("llama-untied", "pissa"), ("llama-untied", "loralib-pickled")],
)
def test_pickles_and_decompositions_work_without_torch(
    environment: Path, base: str, adapter: str, tmp_path: Path
) -> None:
    adapter_path = FIXTURES / "adapters" / adapter
    run(environment, "merge", FIXTURES / "bases" / base, adapter_path, "-o", tmp_path / "out")


def test_what_needs_torch_says_so_in_a_line(environment: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run(environment, "merge", BASE, ADAPTER, "-o", out, "--device", "cuda", status=2)
    assert said.startswith("error: --device cuda: computing on a GPU needs PyTorch")
    assert not out.exists()
    python = [environment / "python", "-c", "import loratool; loratool.live"]
    found = subprocess.run(python, capture_output=True, text=True, check=False)
    assert found.stderr.splitlines()[-1].startswith("ImportError: loratool.live needs PyTorch")


def test_the_wheel_runs_where_it_lies(wheel: Path, environment: Path, tmp_path: Path) -> None:
    """Plug-ins are found in an archive too."""
    code = (
        f"import sys; sys.path[:0] = [{str(wheel)!r}]; import loratool; "
        "print(loratool.__file__); from loratool.cli.main import main; main(sys.argv[1:])"
    )
    for arguments in (
        ["inspect", ADAPTER],
        ["merge", BASE, ADAPTER, "-o", tmp_path / "out"],
        ["convert", ADAPTER, "--to", "gguf", "--base", BASE, "-o", tmp_path / "out.gguf"],
    ):
        done = subprocess.run(
            [environment / "python", "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(wheel))


def test_what_runs_without_torch_is_what_is_declared_less_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert declared == {*NEEDED, "torch"}
    hashed = (ROOT / "constraints-hashed.txt").read_text()
    found = set(re.findall(r"^([\w.-]+)==", hashed, re.MULTILINE))
    assert set(NEEDED) <= found and "torch" not in found
    assert found == {name.replace("_", "-") for name in _with_dependencies(NEEDED)}
    assert project["requires-python"] == ">=3.11"


def test_the_hook_stops_a_commit_with_a_broken_adapter(tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["id"] == "loratool-validate"
    pattern = re.compile(hook["files"])
    good, bad = (
        FIXTURES / "adapters" / name / "adapter_model.safetensors"
        for name in ("lora-linear", "factor-missing")
    )
    assert all(pattern.search(str(path)) for path in (good, bad))
    assert pattern.search("adapters/mine/adapter_config.json")
    assert not pattern.search("adapters/README.md")
    program, *arguments = hook["entry"].split()
    command = [sys.executable, "-m", program, *arguments]
    for paths, status in (([good], 0), ([bad], 1), ([good, bad], 1)):
        done = subprocess.run([*command, *map(str, paths)], capture_output=True, check=False)
        assert done.returncode == status
