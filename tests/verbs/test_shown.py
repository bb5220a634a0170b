"""What people see of every report: the same as text, for ``rich`` and in a notebook."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from rich.console import Console
from samples import FIXTURES

import loratool
from loratool.display.terminal import plain_text

BASE: Final = FIXTURES / "bases" / "llama-untied"
ONE: Final = FIXTURES / "adapters" / "lora-linear"
TWO: Final = FIXTURES / "adapters" / "rank-alpha-patterns"
Q_PROJ: Final = "model.layers.{0,1}.self_attn.q_proj"

REPORTS: Final[dict[str, tuple[Callable[[Path], Any], str]]] = {
    "inspect": (lambda out: loratool.inspect(TWO, spectrum=True), "σ (log)"),
    "inspect a model": (lambda out: loratool.inspect(BASE), "LlamaForCausalLM"),
    "validate": (lambda out: loratool.validate(FIXTURES / "adapters/factor-missing"), "1 error"),
    "validate, nothing": (lambda out: loratool.validate(ONE, base=BASE), "nothing is wrong"),
    "inspect many": (lambda out: loratool.inspect_many([ONE, TWO]), "2 adapters; "),
    "validate many": (lambda out: loratool.validate_many([ONE, TWO]), "none with errors"),
    "schemes": (lambda out: loratool.schemes(), "diffusers-legacy"),
    "compare": (lambda out: loratool.compare([ONE, TWO]), Q_PROJ),
    "compare more": (lambda out: loratool.compare([ONE, TWO, ONE]), "1.0000"),
    "convert": (lambda out: loratool.convert(ONE, "kohya", out / "out"), "peft → kohya"),
    "truncate": (lambda out: loratool.truncate(ONE, out / "out", rank=1), Q_PROJ),
    "truncate, dry": (
        lambda out: loratool.truncate(ONE, out / "out", rank=1, dry_run=True),
        "adapter_model.safetensors",
    ),
    "compose": (lambda out: loratool.compose([ONE, TWO], out / "out"), Q_PROJ),
    "rescale": (lambda out: loratool.rescale(ONE, out / "out", scale=2), Q_PROJ),
    "merge": (lambda out: loratool.merge(BASE, [ONE], out / "out"), "6 tensors merged"),
    "merge, dry": (
        lambda out: loratool.plan_merge(BASE, [ONE]),
        "model.layers.{0,1}.self_attn.{q,v}_proj.weight",
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_shows_itself(name: str, tmp_path: Path) -> None:
    make, expected = REPORTS[name]
    report = make(tmp_path)
    text = str(report)
    assert expected in text
    stream = io.StringIO()
    Console(file=stream, width=500, color_system=None).print(report)
    assert stream.getvalue() == text + "\n"
    page = report._repr_html_()
    assert expected in page.replace("<wbr>", "")
    assert report._repr_mimebundle_() == {"text/plain": text, "text/html": page}
    assert report.as_json()["schema"] == 1


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_fits_a_terminal(name: str, tmp_path: Path) -> None:
    document = REPORTS[name][0](tmp_path).document()
    for width in (60, 80, 120):
        assert max(map(len, plain_text(document, width).split("\n"))) <= width


def test_an_extraction_shows_itself(tmp_path: Path) -> None:
    loratool.merge(BASE, [TWO], tmp_path / "tuned", dtype="float32")
    settings: dict[str, Any] = {"rank": 2, "dry_run": True}
    report = loratool.extract(BASE, tmp_path / "tuned", tmp_path / "out", **settings)
    assert "would be extracted" in str(report)
    report = loratool.extract(BASE, tmp_path / "tuned", tmp_path / "out", rank=2)
    assert f"{tmp_path / 'out'}: 6 modules" in str(report)
    assert "share of" in report._repr_html_()


def test_verification_shows_itself(tmp_path: Path) -> None:
    loratool.merge(BASE, [ONE], tmp_path / "merged")
    found = loratool.verify(tmp_path / "merged", base=BASE, adapters=[ONE])
    assert (str(found), found.ok, found) == ("every tensor is what it should be", True, ())
    found = loratool.verify(tmp_path / "merged", base=BASE, adapters=[ONE], weights=[0.5])
    assert not found.ok
    assert "LT105" in found._repr_html_()
