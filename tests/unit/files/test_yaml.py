"""The front matter of cards, as far as it is plain."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.errors import FileFormatError
from loratool.files.yaml import read_front_matter


def read(folder: Path, text: str) -> dict[str, object]:
    (folder / "README.md").write_text(text)
    return read_front_matter(folder / "README.md")


def test_plain_fields_and_lists(tmp_path: Path) -> None:
    text = (
        "---\nbase_model: org/base\ntags:\n- lora\n-   'x y'\nlanguage: [en, de]\n"
        "widget:\n- text: hello\n  output:\n    url: a.png\n---\n# base_model: other\n"
    )
    found = read(tmp_path, text)
    assert found["base_model"] == "org/base"
    assert found["tags"] == ["lora", "x y"]
    assert found["language"] == ["en", "de"]


@pytest.mark.parametrize("text", ["", "# Title\nbase_model: x\n", "---\nbase_model: x\n"])
def test_no_front_matter(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == {}


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\n\xff\n---\n")
    with pytest.raises(FileFormatError, match="not UTF-8 text"):
        read_front_matter(tmp_path / "README.md")
