"""Every error has a code that the documentation explains, and is what Python calls it."""

from __future__ import annotations

import ast
import copy
import errno
import pickle
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import loratool
from loratool import errors
from loratool.adapter.findings import CODES as FINDINGS
from loratool.errors import LoratoolError

ROOT = Path(loratool.__file__).parent
PAGE = ROOT.parent / "docs" / "findings.md"
CODE = re.compile(r"LT\d{3}")
DEFINES = re.compile(r"^class \w+\(.*Error\)", re.MULTILINE)


def literals() -> Iterator[tuple[str, str]]:
    """Yield every code that stands in the package as a literal, with its file."""
    for file in ROOT.rglob("*.py"):
        for code in re.findall(r'"(LT\d{3})"', file.read_text()):
            yield code, file.relative_to(ROOT).as_posix()


def kinds() -> list[type[LoratoolError]]:
    """Return every class of errors that the package defines."""
    for file in ROOT.rglob("*.py"):
        text = file.read_text()
        if DEFINES.search(text) and "import torch" not in text:
            import_module(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
    found: dict[type[LoratoolError], None] = {}
    left: list[type[LoratoolError]] = [LoratoolError]
    while left:
        kind = left.pop()
        found[kind] = None
        left += kind.__subclasses__()
    return [kind for kind in found if kind.__module__.startswith("loratool")]


def test_findings_and_errors_have_different_codes() -> None:
    assert not FINDINGS.keys() & errors.CODES.keys()


def test_every_code_is_documented_under_its_title() -> None:
    titles = dict(re.findall(r"^## (LT\d{3}): (.*)$", PAGE.read_text(), re.MULTILINE))
    assert titles == {code: title for code, (_, title) in FINDINGS.items()} | errors.CODES
    assert list(titles) == sorted(titles)


def test_every_code_in_the_package_exists_and_every_code_is_used() -> None:
    used: dict[str, set[str]] = {}
    for code, file in literals():
        used.setdefault(code, set()).add(file)
    assert used.keys() <= FINDINGS.keys() | errors.CODES.keys()
    codes = {kind.code for kind in kinds()}
    for code in errors.CODES:
        assert used[code] - {"errors.py"} or code in codes, code


def test_no_error_is_raised_with_a_code_in_its_words_alone() -> None:
    """Where a message ends in a code, that is the error's own."""
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            words = ast.unparse(node)
            if node.func.id.endswith("Error") and re.search(r"\(\{?(code|LT\d+)\}?\)['\"]", words):
                assert any(keyword.arg == "code" for keyword in node.keywords), (file, words)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_and_survives_pickling(kind: type[LoratoolError]) -> None:
    assert kind.code in FINDINGS.keys() | errors.CODES.keys()
    assert kind.__init__ is LoratoolError.__init__  # or a pickle of it cannot be read
    error = kind(Path("a/b"), "is not there", hint="look elsewhere", code="LT017")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error) == "a/b: is not there"
        assert again.as_json() == {
            "code": "LT017",
            "where": "a/b",
            "message": "is not there",
            "hint": "look elsewhere",
        }
        if isinstance(error, OSError):
            assert isinstance(again, OSError)
            assert (again.errno, again.filename) == (error.errno, "a/b")
            assert again.strerror == "is not there"
    assert repr(error).startswith(f"{kind.__name__}('a/b', 'is not there'")
    assert kind("x", "y").code == kind.code


def test_errors_are_what_python_calls_them(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError) as missing:
        loratool.inspect(nothing)
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, str(nothing))
    with pytest.raises(FileNotFoundError):
        loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    there = tmp_path / "there.safetensors"
    there.touch()
    with pytest.raises(FileExistsError):
        loratool.convert(tmp_path / "adapter", "kohya", there)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        loratool.convert("a", "kohya", tmp_path / "no" / "out.safetensors")
    with pytest.raises(ValueError, match="is none of"):
        loratool.convert("a", "nonsense", tmp_path / "out")
    error = errors.unreadable("a", PermissionError(errno.EACCES, "Permission denied"))
    assert isinstance(error, PermissionError)
    assert isinstance(error, errors.FileFormatError)
    assert error.errno == errno.EACCES
