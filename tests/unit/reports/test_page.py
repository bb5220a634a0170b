"""The page of a report: well formed, nothing loaded, nothing that a name could make run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from samples import FIXTURES, lora

import loratool
from loratool.cli.main import cli
from loratool.errors import OptionError, OutputError
from loratool.reports.page import page, write_page
from loratool.verbs.inspect import inspect_many

Make = Callable[..., Path]
ADAPTERS = FIXTURES / "adapters"
HOSTILE = (
    "layers.0.<script>alert(1)</script>",
    'layers.1."><img src=x onerror=alert(1)>',
    "layers.2.a\u202egnp.exe",
    "layers.3." + "x" * 10_000,
    "layers.4.</style></svg></title>&lt;b&gt;",
)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "script"),
    *("h1", "h2", "p", "div", "figure", "figcaption", "ul", "li", "b", "br", "small", "wbr"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "rect", "path", "text"),
    *("circle",),
}
EMPTY = {"meta", "br", "wbr"}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "style", "colspan", "width"),
    *("height", "viewbox", "role", "aria-label", "x", "y", "fill", "d", "transform", "opacity"),
    *("stroke", "stroke-width", "stroke-dasharray", "cx", "cy", "r"),
}


class Reader(HTMLParser):
    """Reads a page, and refuses what is not well formed or not expected on it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.texts: dict[str, list[str]] = {}
        self.policy = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            assert "url(" not in (value or "")
            if (name, value) == ("http-equiv", "Content-Security-Policy"):
                self.policy = dict(attrs)["content"] or ""
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def words(self) -> str:
        return " ".join(text for texts in self.texts.values() for text in texts)


def read(text: str) -> Reader:
    found = Reader(text)
    (script,) = found.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in found.policy
    assert "default-src 'none'" in found.policy
    assert "http" not in text.replace("http-equiv", "")
    return found


@pytest.fixture
def hostile(make_adapter: Make) -> Path:
    tensors = {key: value for name in HOSTILE for key, value in lora(name, 12, 9).items()}
    folder = make_adapter(tensors, "hostile", target_modules="all-linear")
    weights = folder / "adapter_model.safetensors"
    save_file(
        {f"base_model.model.{key}": value for key, value in tensors.items()},
        weights,
        metadata={
            "format": "pt",
            '<img src="x">': "</td><script>1</script>",
            "ss_long": "y" * 100_000,
            "modelspec.thumbnail": "data:image/png;base64," + "A" * 50_000,
        },
    )
    return folder


def test_hostile_names_are_shown_and_not_obeyed(hostile: Path) -> None:
    text = page(loratool.inspect(hostile, spectrum=True))
    found = read(text)
    assert found.counts["script"] == 1
    assert "<script>alert(1)</script>" in found.words.replace(" ", "")
    assert "\u202e" not in text and "\\u202e" in text
    assert "AAAA" not in text
    assert len(text) < 100_000
    assert found.texts["h2"] == [
        "Summary",
        "Pictures",
        "Details",
        "Findings",
        "Configuration",
        "Metadata",
    ]


def test_the_titles_of_hostile_files(hostile: Path, tmp_path: Path) -> None:
    evil = hostile.rename(hostile.with_name("<b>&\u202e\n'\""))
    title = "".join(read(page(loratool.inspect(evil, spectrum=True))).texts["title"])
    assert title.startswith("<b>&\\u202e\\n'\"")
    read(page(loratool.compare([evil, evil])))
    read(page(loratool.compare_layers(evil)))


@pytest.mark.parametrize("name", ["lora-linear", "dora-linear", "conv", "experts-gpt-oss", "mha"])
def test_every_kind_of_adapter_has_a_page(name: str) -> None:
    found = read(page(loratool.inspect(ADAPTERS / name, spectrum=True)))
    assert found.counts["svg"] == 4
    assert "Frobenius norm of the delta" in found.words


def test_comparisons_have_a_page(make_adapter: Make) -> None:
    paths = [
        make_adapter(lora("layers.0.q", 12, 9, rank), f"r{rank}", target_modules=["q"], r=rank)
        for rank in (2, 4, 3)
    ]
    pair = read(page(loratool.compare(paths[:2], random=0)))
    assert pair.counts["svg"] == 7
    assert "r2 and r4" in "".join(pair.texts["h1"])
    many = read(page(loratool.compare(paths)))
    assert many.counts["svg"] == 1
    assert many.words.count("1.00") >= 3


def test_what_is_written_has_a_page(tmp_path: Path) -> None:
    report = loratool.truncate(ADAPTERS / "lora-linear", tmp_path / "out", rank=1)
    assert read(page(report)).counts["svg"] == 3
    findings = read(page(loratool.validate(ADAPTERS / "lora-linear")))
    assert "svg" not in findings.counts


def test_an_extraction_and_a_folder_have_a_page(hostile: Path, tmp_path: Path) -> None:
    base = FIXTURES / "bases" / "llama-untied"
    loratool.merge(base, ADAPTERS / "lora-linear", tmp_path / "tuned", dtype="float32")
    report = loratool.extract(base, tmp_path / "tuned", tmp_path / "out", rank=2)
    found = read(page(report))
    assert found.counts["svg"] == 3 and "relative error" in found.words
    hostile.rename(tmp_path / "<i>")
    many = read(page(inspect_many(hostile.parent, recursive=True)))
    assert {"Details", "Findings"} <= set(many.texts["h2"])
    assert "<i>" in many.words


def test_a_model_has_a_page_without_pictures(tmp_path: Path) -> None:
    place = tmp_path / "model.html"
    base = FIXTURES / "bases" / "llama-untied"
    result = CliRunner().invoke(cli, ["inspect", str(base), "--report", str(place)])
    assert result.exit_code == 0, result.output
    found = read(place.read_text())
    assert "svg" not in found.counts and "llama" in found.words


def test_a_page_is_written_whole_and_only_where_it_may(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    arguments = ["inspect", str(ADAPTERS / "lora-linear"), "--report", str(place)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    first = place.read_text()
    read(first)
    again = CliRunner().invoke(cli, arguments)
    assert isinstance(again.exception, OutputError)
    place.write_text("mine")
    assert CliRunner().invoke(cli, [*arguments, "--force"]).exit_code == 0
    assert place.read_text() == first
    with pytest.raises(OptionError, match="html"):
        write_page(loratool.validate(ADAPTERS / "lora-linear"), tmp_path / "page.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]


def test_a_page_of_a_large_adapter_is_small(tmp_path: Path) -> None:
    """As many modules as SDXL has, in the same places."""
    tensors = {}
    inside = [f"input_blocks_{number}" for number in (7, 8)]
    for part in (*inside, "middle_block", *(f"output_blocks_{number}" for number in range(3))):
        for layer in range(10):
            for kind in ("attn1_to_q", "attn1_to_k", "attn2_to_v", "ff_net_2"):
                name = f"lora_unet_{part}_1_transformer_blocks_{layer}_{kind}"
                tensors[f"{name}.lora_down.weight"] = torch.randn(2, 8)
                tensors[f"{name}.lora_up.weight"] = torch.randn(8, 2)
                tensors[f"{name}.alpha"] = torch.tensor(2.0)
    for text, count in (("te1", 12), ("te2", 32)):
        for layer in range(count):
            name = f"lora_{text}_text_model_encoder_layers_{layer}_self_attn_q_proj"
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, 8)
            tensors[f"{name}.lora_up.weight"] = torch.randn(8, 2)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "sdxl.safetensors")
    text = page(loratool.inspect(tmp_path / "sdxl.safetensors", spectrum=True))
    assert len(text) < 400_000
    words = read(text).words
    for row in ("unet down attn1.to_q", "unet mid ff.net.2", "unet up attn2.to_v", "te1", "te2"):
        assert row in words


def test_a_folder_has_spectra_where_they_are_asked_for(tmp_path: Path) -> None:
    for name, rank in (("a", 2), ("b", 3)):
        save_file(lora("model.layers.0.q_proj", 6, 5, rank), tmp_path / f"{name}.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    found = loratool.inspect_many(tmp_path, spectrum=True)
    text = page(found)
    assert "singular values of each adapter" in text
    assert "Frobenius norm of each kind of module" in text
    a, b, bad = found.records()
    (spectrum,) = loratool.inspect(tmp_path / "b.safetensors", spectrum=True).spectra
    assert a["rank_99_9"] <= 2 and b["frobenius_norm"] == pytest.approx(spectrum.frobenius_norm)
    assert b["effective_rank"] == pytest.approx(spectrum.effective_rank)
    assert bad["frobenius_norm"] is None
    assert "effective" in str(found) and "effective" not in str(loratool.inspect_many(tmp_path))
    assert "singular values" not in page(loratool.inspect_many(tmp_path))
