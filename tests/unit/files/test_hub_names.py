"""How a model of the hub is named, and what is no such name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import OptionError
from loratool.files.hub.names import HubName, is_safe, parse_hub_name

PAGE = "https://huggingface.co/org/name"


@pytest.mark.parametrize(
    ("text", "repo", "revision", "inside"),
    [
        ("org/name", "org/name", None, ""),
        ("org/name-7B.v1_2", "org/name-7B.v1_2", None, ""),
        ("org/name@main", "org/name", "main", ""),
        ("org/name@v1.0/unet", "org/name", "v1.0", "unet"),
        ("org/name/unet/x.safetensors", "org/name", None, "unet/x.safetensors"),
        ("org/name/", "org/name", None, ""),
        ("org/name@refs/pr/3/unet", "org/name", "refs/pr/3", "unet"),
        ("org/name@refs%2Fpr%2F3", "org/name", "refs/pr/3", ""),
        ("org/name/a@b/c", "org/name", None, "a@b/c"),
        ("hf://org/name@main/sub", "org/name", "main", "sub"),
        ("hf:/org/name", "org/name", None, ""),
        ("hf://models/org/name", "org/name", None, ""),
        ("hf://gpt2", "gpt2", None, ""),
        (PAGE, "org/name", None, ""),
        (f"{PAGE}?not-for-all-audiences=true", "org/name", None, ""),
        (f"{PAGE}/tree/main", "org/name", "main", ""),
        (f"{PAGE}/tree/main/unet", "org/name", "main", "unet"),
        (f"{PAGE}/blob/main/a%20b.safetensors", "org/name", "main", "a b.safetensors"),
        (f"{PAGE}/resolve/abc/x.safetensors?download=true", "org/name", "abc", "x.safetensors"),
        (f"{PAGE}/tree/refs%2Fpr%2F3", "org/name", "refs/pr/3", ""),
        (f"{PAGE}/discussions/7", "org/name", None, ""),
        ("https:/huggingface.co/org/name/tree/main", "org/name", "main", ""),
        ("http://hf.co/org/name", "org/name", None, ""),
        ("https://huggingface.co/gpt2/tree/main/onnx", "gpt2", "main", "onnx"),
    ],
)
def test_names_and_addresses(text: str, repo: str, revision: str | None, inside: str) -> None:
    found = parse_hub_name(text)
    assert found is not None
    assert (found.repo, found.revision, found.inside) == (repo, revision, inside)
    assert found.is_told == ("://" in text or ":/" in text)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "/org/name",
        "../name",
        "org/..",
        "org/name/../../x",
        "org/name@../x",
        "org/name@a/../../x",
        "org/na--me",
        "org/-name",
        "org/name\n",
        "org/na me",
        "org//name",
        "org/name@",
        "org/name/a\\b",
        "~/name/x",
        f"org/{'n' * 97}",
    ],
)
def test_what_is_no_name(text: str) -> None:
    assert parse_hub_name(text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf://datasets/org/name", "datasets"),
        ("https://huggingface.co/spaces/org/name", "spaces"),
        ("https://civitai.com/models/1", "no address of the Hugging Face hub"),
        ("https://huggingface.co.evil.org/org/name", "no address"),
        ("hf://../../etc", "no name of a model"),
        ("hf://org/name/../..", "no name of a model"),
        ("https://huggingface.co/", "no name of a model"),
    ],
)
def test_addresses_of_something_else(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_hub_name(text)


def test_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.local:8080/hub/")
    found = parse_hub_name("http://mirror.local:8080/hub/org/name/tree/v2/sub")
    assert found == HubName("org/name", "v2", "sub", is_told=True)


@given(st.text(max_size=60))
def test_whatever_is_read_stays_inside(text: str) -> None:
    """No text leads outside of the cache, whatever it is."""
    try:
        found = parse_hub_name(text, alone=True)
    except OptionError:
        return
    if found is None:
        return
    for part in (found.repo, found.revision or "x", found.inside or "x"):
        root = Path("/cache/models")
        assert is_safe(part)
        assert (root / part).resolve().is_relative_to(root)
