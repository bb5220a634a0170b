"""The tutorials and the README are run: what they say is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pages
import pytest
from samples import FIXTURES, ROOT

from loratool.cli.main import COMMANDS, cli

TUTORIALS = sorted(
    path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.stem != "index"
)
PAGES = [
    ROOT / "README.md",
    *(pytest.param(page, marks=pytest.mark.slow) for page in TUTORIALS),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_a_page_shows_is_what_happens(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    text = page.read_text()
    assert pages.blocks(text)
    now, wrong = pages.run(text, tmp_path)
    if request.config.getoption("--write-docs"):
        page.write_text(now)
        wrong = [words for words in wrong if "ends with" in words]
    assert not wrong, "\n\n".join(wrong)


def test_every_tutorial_is_in_the_menu_and_in_the_list() -> None:
    listed = (ROOT / "docs" / "tutorials" / "index.md").read_text()
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in TUTORIALS:
        assert f"({page.name})" in listed
        assert f"tutorials/{page.name}" in menu


@pytest.mark.parametrize(
    ("said", "printed", "same"),
    [
        ("rank  8\n", "rank 8", True),
        ("took 0.2 s", "took 11 min", True),
        ("error 0.0101", "error 0.01011", True),
        ("error 2.5e-08", "error 1.1e-09", True),
        ("error 0.011", "error 0.012", False),
        ("8 modules", "9 modules", False),
        ("8 modules", "8 modulus", False),
        ("8 modules", "8 modules\n1 note", False),
        ("q_proj.8", "q_proj.9", False),
        ("v1 0.5", "v2 0.5", False),
    ],
)
def test_outputs_are_compared(said: str, printed: str, same: bool) -> None:
    assert pages.alike(said, printed) is same


def test_a_page_that_is_wrong_is_told(tmp_path: Path) -> None:
    page = (
        "```sh\necho one; echo two\n```\n\n```text\none\nthree\n```\n"
        "<!-- exit status 1 -->\n```sh\ntrue\n```\n"
        "<!-- not run: it fails -->\n```sh\nfalse\n```\n"
    )
    now, wrong = pages.run(page, tmp_path)
    assert now == page.replace("three", "two")
    assert len(wrong) == 2


def _command_lines() -> list[tuple[str, str]]:
    found = []
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for fence in pages.FENCE.finditer(page.read_text()):
            if fence[1] in ("sh", "console"):
                text = fence[2].replace("\\\n", " ")
                found += [(page.name, line) for line in re.findall(r"loratool [^\n|;&)`<>]*", text)]
    return found


def test_options_on_all_pages_exist() -> None:
    """Also where a page is not run."""
    seen = 0
    for page, line in _command_lines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation that goes on
            continue
        if len(words) < 2 or words[1] not in COMMANDS:
            continue
        with cli.make_context("loratool", ["schemes"]) as context:
            command = cli.get_command(context, words[1])
        assert command is not None
        known = {
            name: item for item in command.params for name in (*item.opts, *item.secondary_opts)
        }
        value_follows = False
        for word in words[2:]:
            option, _, value = word.partition("=")
            if not value_follows and re.match(r"--?[a-z]", word):
                assert option in known, f"{page}: {line}"
                seen += 1
                value_follows = not value and not getattr(known[option], "is_flag", False)
            else:
                value_follows = False
    assert seen > 30
