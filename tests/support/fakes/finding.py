"""Put the fakes where the real plug-ins are: that is all that makes them known."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

import pytest

import loratool.base.layouts
import loratool.codecs
from loratool import variants
from loratool.codecs import codec
from loratool.schemes import builtin_schemes

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


def find_fake_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let variants of this folder be discovered for one test; undo it by :func:`forget`.

    Schemes hold the names of variants' tensors, so that they are read anew.
    """
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(FAKES / "variants")])
    importlib.invalidate_caches()
    for name in ("claims", "_flags", "_claimed"):
        monkeypatch.setattr(variants, name, cache(getattr(variants, name).__wrapped__))
    for name in [name for name in sys.modules if name.startswith("loratool.schemes.")]:
        monkeypatch.delitem(sys.modules, name)
    builtin_schemes.cache_clear()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the fake variants."""
    monkeypatch.undo()
    variants.variant_named.cache_clear()
    builtin_schemes.cache_clear()
