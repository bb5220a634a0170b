"""Name the folder of the fakes as one of plug-ins: that is all that makes them known."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

from loratool import variants
from loratool.discovery import PLUGINS
from loratool.schemes import claims

FAKES = Path(__file__).parent


def find_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plug-ins of this folder be discovered for one test, in its processes too.

    Variants keep what they have found: the real ones, before there are others.
    """
    variants.claims()
    monkeypatch.setenv(PLUGINS, str(FAKES))


def find_fake_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let variants of this folder be discovered for one test; undo it by :func:`forget`.

    Schemes hold the names of variants' tensors, so that they are read anew.
    """
    find_fakes(monkeypatch)
    for name in ("claims", "_flags", "_claimed"):
        monkeypatch.setattr(variants, name, cache(getattr(variants, name).__wrapped__))
    for claim in claims():
        monkeypatch.delitem(sys.modules, f"loratool.schemes.{claim.module}", raising=False)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the fake variants."""
    monkeypatch.undo()
    variants.variant_named.cache_clear()
