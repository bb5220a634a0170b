"""Cards: begun, renewed, carried as they are, and what they say of libraries and licences."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from samples import FIXTURES

import loratool

CARD: Final = """---
# a remark
license: {licence}
library_name: {library}
extra: [1, 2]
---

# Mine

What I wrote.
"""
VERBS: Final[dict[str, tuple[Any, ...]]] = {
    "convert": (loratool.convert, "one", "peft", "out"),
    "compose": (loratool.compose, ["one"], "out"),
    "rescale": (loratool.rescale, "one", "out", {"scale": 2}),
    "rescale-anew": (loratool.rescale, "mlx", "out", {"scale": 2}),
    "truncate": (loratool.truncate, "one", "out", {"rank": 1}),
    "extract": (loratool.extract, "base", "tuned", "out", {"rank": 1}),
    "merge": (loratool.merge, "base", "one", "out"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, source in {
        "base": "bases/llama-untied",
        "one": "adapters/lora-linear",
        "two": "adapters/rank-alpha-patterns",
    }.items():
        shutil.copytree(FIXTURES / source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "one", "two"):
        Path(name, "README.md").unlink(missing_ok=True)
    loratool.merge("base", "one", "tuned", no_card=True)
    loratool.convert("one", "mlx", "mlx", no_card=True)
    return tmp_path


def give_card(folder: str, licence: str = "mit", library: str = "peft") -> str:
    text = CARD.format(licence=licence, library=library)
    Path(folder, "README.md").write_text(text)
    return text


def carried_out(verb: str, **more: Any) -> Any:
    function, *arguments = VERBS[verb]
    given = arguments.pop() if isinstance(arguments[-1], dict) else {}
    return function(*arguments, **given, **more)


def front(folder: str = "out") -> dict[str, Any]:
    found = yaml.safe_load(Path(folder, "README.md").read_text().split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_no_card_writes_none_and_leaves_one_as_it_is(verb: str, here: Path) -> None:
    report = carried_out(verb, no_card=True, dry_run=True)
    assert "README" not in str(report.as_json())
    carried_out(verb, no_card=True)
    assert not Path("out/README.md").exists()
    recorded = loratool.recipe("out").toml
    assert "no-card = true" in recorded
    Path("again.toml").write_text(recorded)
    loratool.run("again.toml", into="again")
    assert not Path("again/out/README.md").exists() and Path("again/out").is_dir()
    if verb != "extract":  # which is a new adapter
        text = give_card({"merge": "base", "rescale-anew": "mlx"}.get(verb, "one"))
        carried_out(verb, no_card=True, force=True)
        assert Path("out/README.md").read_text() == text
        carried_out(verb, force=True)
        renewed = Path("out/README.md").read_text()
        assert "# a remark" in renewed and "What I wrote." in renewed and "loratool" in renewed


@pytest.mark.parametrize(
    ("scheme", "library", "expected"),
    [
        ("mlx", "peft", "mlx"),
        ("kohya", "peft", None),
        ("peft", "peft", "peft"),
        ("mlx", "mine", "mine"),
    ],
)
def test_the_library_of_a_card_is_that_of_the_scheme(
    scheme: str, library: str, expected: str | None, here: Path
) -> None:
    give_card("one", library=library)
    loratool.convert("one", scheme, "out")
    assert front().get("library_name") == expected
    assert front()["license"] == "mit" and front()["extra"] == [1, 2]


def test_an_extracted_adapter_has_the_licence_of_its_model(here: Path) -> None:
    loratool.extract("base", "tuned", "out", rank=1)
    assert "license" not in front()
    give_card("base", "apache-2.0")
    loratool.extract("base", "tuned", "out", rank=1, force=True)
    assert front()["license"] == "apache-2.0"
    Path("tuned/README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
    )
    loratool.extract("base", "tuned", "out", rank=1, force=True)
    said = front()
    assert (said["license"], said["license_name"], said["license_link"]) == (
        *("other", "mine", "LICENSE"),
    )
    Path("tuned/README.md").write_bytes(b"\xff\xfe no text")
    loratool.extract("base", "tuned", "out", rank=1, force=True)
    assert front()["license"] == "apache-2.0"


def test_licences_that_agree_are_taken_over_and_others_are_told(here: Path) -> None:
    give_card("one")
    assert "license" not in _composed()  # of the other one nothing is known
    give_card("two")
    assert _composed()["license"] == "mit"
    give_card("two", "cc-by-nc-4.0")
    report = loratool.compose(["one", "two"], "out", force=True)
    assert "license" not in front()
    assert "the adapters name different licences: cc-by-nc-4.0, mit" in report.notes


def _composed() -> dict[str, Any]:
    loratool.compose(["one", "two"], "out", force=True)
    return front()


def test_a_merged_model_keeps_the_licence_of_its_base_and_tells_of_others(here: Path) -> None:
    give_card("one", "cc-by-nc-4.0")
    report = loratool.merge("base", "one", "out")
    assert "license" not in front()
    assert any("'cc-by-nc-4.0'" in note and "names none" in note for note in report.notes)
    give_card("base", "apache-2.0")
    report = loratool.merge("base", "one", "out", force=True)
    assert front()["license"] == "apache-2.0"
    assert any("keeps that of the base, 'apache-2.0'" in note for note in report.notes)
    give_card("one", "apache-2.0")
    report = loratool.merge("base", "one", "out", force=True)
    assert not any("licence" in note for note in report.notes)
