"""How documents are set: tables fit, what all rows say is said once, nothing is padded."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loratool.display.characters import in_ascii
from loratool.display.document import (
    Column,
    Document,
    Facts,
    Group,
    Lines,
    Remark,
    Remarks,
    Table,
)
from loratool.display.html import fragment
from loratool.display.layout import is_number
from loratool.display.terminal import Rendered, plain_text

NAME = "model.layers.{0..31}.self_attn.{q,k,v,o}_proj"
TABLE = Table.grouped(
    "modules",
    (Column("modules", folds=True, is_kept=True), Column("count", is_kept=True), "kind", "rank"),
    [
        Group("first", (((NAME, "lm_head"), 129, "linear", "8"), ("norm", 1, "linear", "4"))),
        Group("second", (((NAME,), 7, "linear", "16 to 32"),)),
    ],
)
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e&amp;"


def test_what_all_rows_say_is_said_once() -> None:
    assert plain_text(Document((TABLE,))) == (
        "modules\n"
        "in all: kind linear\n"
        "modules                                        count      rank\n"
        "first\n"
        f"{NAME}    129         8\n"
        "lm_head\n"
        "norm                                               1         4\n"
        "second\n"
        f"{NAME}      7  16 to 32"
    )


def test_where_no_group_has_a_second_row_there_are_no_columns() -> None:
    groups = [Group("first (a.b)", ((("c.d", "e"), 2),)), Group("second", (("f", 11),))]
    table = Table.grouped("", (Column("modules", folds=True, is_kept=True), "count"), groups)
    assert plain_text(Document((table,))) == (
        "first (a.b): count 2\n  c.d\n  e\nsecond: count 11\n  f"
    )


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_tables_fit(width: int) -> None:
    lines = plain_text(Document((TABLE,)), width).split("\n")
    assert max(map(len, lines)) <= width
    assert all("self_attn" in line for line in lines if "self" in line)


def test_a_name_that_is_folded_folds_at_its_dots() -> None:
    lines = plain_text(Document((TABLE,)), 60).split("\n")
    assert [line[:41].rstrip() for line in lines[4:7]] == [
        "model.layers.{0..31}.self_attn.",
        "  {q,k,v,o}_proj",
        "lm_head",
    ]


def test_where_there_is_no_room_rows_are_sentences() -> None:
    columns = (Column("name", folds=True, is_kept=True), *(Column(f"c{i}") for i in range(9)))
    rows = [(f"module.{n}", *(f"{n * 10**6 + i}" for i in range(9))) for n in (1, 2)]
    lines = plain_text(Document((Table.of("", columns, rows),)), 40).split("\n")
    assert max(map(len, lines)) <= 40
    assert lines[0] == "module.1"
    assert all(str(10**6 + i) in "".join(lines) for i in range(9))


TEXTS = st.text("aé水\u202e\x1b .,_/-{}5", max_size=40)
CELLS = TEXTS | st.integers() | st.lists(TEXTS, max_size=3).map(tuple)


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.none() | st.integers(20, 100),
)
def test_any_table_is_set_without_padding_or_blank_frame(rows, folds, width) -> None:  # type: ignore[no-untyped-def]
    columns = [Column(f"c{index}", folds=fold) for index, fold in enumerate(folds)]
    document = Document.of((Facts((("a", "b"),)), Table.of("", columns, rows), Lines(("end",))))
    text = plain_text(document, width)
    lines = text.split("\n")
    assert lines[0].startswith("a") and lines[-1] == "end"
    assert all(line == line.rstrip() for line in lines)
    assert all(char.isprintable() for line in lines for char in line)


def test_blocks_that_hold_nothing_leave_no_gap() -> None:
    document = Document.of((Facts(()), Table.of("x", ("a",), ()), Lines(()), Lines(("end",))))
    assert plain_text(document) == "end"


def test_numbers_go_to_the_right() -> None:
    assert all(map(is_number, ("8", 8, "0.5 to 2e-05", "1.2 MB", "99.5 %", "-", "× 2", "-1,000")))
    assert not any(map(is_number, ("", "F32", "none", "8 to x", ("8",), "1-2")))


REMARKS = Remarks(
    (Remark("error", "LT001", "layers.1.v_proj", "has A but no B", "train it again"),), "1 error"
)


def test_remarks_are_a_line_each_and_folded_behind_their_code() -> None:
    assert plain_text(Document((REMARKS,))) == (
        "error   LT001  layers.1.v_proj  has A but no B\n"
        "               hint: train it again\n"
        "1 error"
    )
    lines = plain_text(Document((REMARKS,)), 40).split("\n")
    assert max(map(len, lines)) <= 40
    assert [line.strip() for line in lines[1:]] == [
        "but no B",
        "hint: train it again",
        "1 error",
    ]


def test_rich_prints_the_same_text_as_a_pipe_has() -> None:
    document = Document((Facts((("adapter", "[bold]a[/bold]"),)), TABLE, REMARKS))
    stream = io.StringIO()
    Console(file=stream, width=70, color_system=None).print(Rendered(document))
    assert stream.getvalue() == plain_text(document, 70) + "\n"


def test_in_ascii_columns_stay_below_each_other() -> None:
    rows = [("‖Δ‖", "1"), ("‖Δ‖ · 2", "22")]
    document = Document((Table.of("", (Column("σ (log)"), Column("n")), rows),))
    assert plain_text(document, clean=in_ascii).split("\n") == [
        "sigma (log)     n",
        "||delta||       1",
        "||delta|| * 2  22",
    ]


def test_html_obeys_no_name() -> None:
    table = Table.of(HOSTILE, (Column(HOSTILE), Column("b")), [(HOSTILE, (HOSTILE,)), ("x", "y")])
    document = Document(
        (Facts(((HOSTILE, HOSTILE),)), table, Lines((HOSTILE,)),
         Remarks((Remark(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE),), HOSTILE)),
        (HOSTILE,),
    )  # fmt: skip
    page = fragment(document)
    assert "<script" not in page
    assert "\x1b" not in page and "\u202e" not in page
    assert page.count("alert(1)") == 15  # every text once
