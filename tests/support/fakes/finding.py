"""Put the fakes where the real plug-ins are: that is all that makes them known."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import loratool.base.layouts
import loratool.codecs
from loratool.codecs import codec

FAKES = Path(__file__).parent


def find_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layouts and codecs of this folder be discovered for one test."""
    for package in (loratool.base.layouts, loratool.codecs):
        kind = package.__name__.rpartition(".")[2]
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(FAKES / kind)])
    importlib.invalidate_caches()
    real = codec.claims()
    fake = codec.Claim("blocked", (".blocked_codes",), ("blocked",))
    monkeypatch.setattr(codec, "claims", lambda: (*real, fake))
