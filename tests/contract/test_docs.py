"""Docs and help are tested artefacts: they cannot drift apart."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from reference_pages import documents, formats, functions
from samples import FIXTURES, ROOT

import loratool
from loratool.cli.main import COMMANDS, cli
from loratool.codecs.codec import claims, codec_named

MARK = (
    "<!-- The rest of this page is written by tests/contract/test_docs.py: "
    "pytest --write-docs -->\n"
)


def help_pages() -> str:
    """Return the help of every command as Markdown."""
    pages = []
    for name in COMMANDS:
        with click.Context(cli, info_name="loratool") as parent:
            command = cli.get_command(parent, name)
            assert command is not None
            context = click.Context(command, info_name=name, parent=parent, terminal_width=90)
            context.help_option_names = ["-h", "--help"]
            lines = (line.rstrip() for line in command.get_help(context).splitlines())
            pages.append(f"### {name}\n```text\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(pages)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("cli.md", help_pages),
        ("formats.md", formats),
        ("json.md", documents),
        ("python.md", functions),
    ],
)
def test_what_is_made_from_the_code_is_in_the_docs(
    name: str, written: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    page = ROOT / "docs" / name
    head, mark, tail = page.read_text().partition(MARK)
    if request.config.getoption("--write-docs"):
        page.write_text(f"{head}{MARK}\n{written()}")
        return
    assert mark
    assert tail.strip() == written().strip()


def test_links_lead_somewhere() -> None:
    for page in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / "examples").glob("*.md"),
    ):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_codec_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "quantised.md").read_text()
    for claim in claims():
        assert f"`{codec_named(claim.codec).name}`" in page, claim.codec


def test_every_extra_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in project["optional-dependencies"]:
        assert f"| `loratool[{name}]` |" in page


def test_public_names_are_sorted_documented_and_there() -> None:
    assert list(loratool.__all__) == sorted(loratool.__all__)
    for name in loratool.__all__:
        assert getattr(loratool, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loratool.nonsense
    assert set(loratool.__all__) <= set(dir(loratool))


def test_the_function_schemes_is_not_hidden_by_the_folder() -> None:
    import loratool.schemes.peft

    assert {item.name for item in loratool.schemes()} >= {"peft", "kohya"}
    assert loratool.schemes is importlib.import_module("loratool.verbs.schemes").schemes


def test_nothing_is_listed_twice_in_the_readme_and_every_command_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"`loratool {command}" in readme


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "questions_and_answers.py"
    command = [sys.executable, str(script), "--steps", "3", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "largest difference of logits" in done.stdout
    assert (tmp_path / "out" / "loss.png").exists()


def test_fixtures_are_small() -> None:
    files = [file for file in FIXTURES.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    size = sum(file.stat().st_size for file in files)
    assert size < 1_500_000


def test_hashed_versions_are_those_that_are_tested() -> None:
    versions = {}
    for name in ("constraints.txt", "constraints-hashed.txt"):
        text = (ROOT / name).read_text("utf-8")
        versions[name] = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M))
    hashed = versions["constraints-hashed.txt"]
    assert hashed.keys() >= {"numpy", "safetensors", "click", "rich", "threadpoolctl"}
    shared = hashed.keys() & versions["constraints.txt"].keys()
    assert {name: hashed[name] for name in shared} == {
        name: versions["constraints.txt"][name] for name in shared
    }
