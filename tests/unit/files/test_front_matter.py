"""Front matter of cards: fields are set line by line, and everything else stays."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loratool.files.front_matter import with_fields

CARD = """---
# about the model
license: llama3
base_model:
- old/model
- other/one
tags:
- one
  # a remark
- two
widget:
  - text: |
      tags: not these
    nested: {a: 1}
"quoted key": x
---
# Mine

---
tags: of the text
"""


def front(text: str) -> dict[str, object]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_fields_change_and_everything_else_stays() -> None:
    made = with_fields(
        CARD,
        {"base_model": "new/model", "base_model_relation": "merge"},
        defaults={"license": "mit", "library_name": "peft"},
        lists={"tags": ["two", "lora"]},
    )
    assert front(made) == front(CARD) | {
        "base_model": "new/model",
        "base_model_relation": "merge",
        "library_name": "peft",
        "tags": ["one", "two", "lora"],
    }
    assert made.split("---\n", 2)[2] == CARD.split("---\n", 2)[2]
    gone = {"- old/model", "- other/one", "base_model:"}
    kept = [line for line in CARD.splitlines() if line not in gone]
    assert [line for line in made.splitlines() if line in kept] == kept
    # Once more, it says that already.
    again = with_fields(made, {"base_model": "new/model"}, lists={"tags": ["two", "lora"]})
    assert again == made


@pytest.mark.parametrize("text", ["", "# Mine\n", "---\nno end\n", "--- x\n", "\n---\na: 1\n---\n"])
def test_a_card_without_front_matter_gets_some(text: str) -> None:
    made = with_fields(text, {"a": "b"})
    assert made == f"---\na: b\n---\n{text}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tags: []", "tags: [lora]"),
        ("tags: [a, 'lora']", "tags: [a, 'lora']"),
        ("tags: [a]  ", "tags: [a, lora]"),
        ("tags: # none yet", "tags: # none yet\n- lora"),
        ("tags:\n    - a", "tags:\n    - a\n    - lora"),
        ("tags: alone", "tags: alone"),
        ("tags:\n- 'lora'", "tags:\n- 'lora'"),
    ],
)
def test_lists_keep_their_form(before: str, after: str) -> None:
    made = with_fields(f"---\n{before}\n---\n", {}, lists={"tags": ["lora"]})
    assert made == f"---\n{after}\n---\n"


def test_ends_of_lines_stay() -> None:
    made = with_fields("---\r\na: 1\r\n---\r\ntext\r\n", {"a": "x"})
    assert made == "---\r\na: x\r\n---\r\ntext\r\n"


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30))
def test_any_text_is_that_text(value: str) -> None:
    assert front(with_fields("", {"a": value})) == {"a": value}
