"""Nothing beside the tensors: what settings are where a scheme has none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapter.findings import Finding
from loratool.adapter.model import Adapter, Site
from loratool.adapter.scheme import Written
from loratool.files.json import read_json_object

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """No configuration and no metadata; a scheme that has some overrides what it has."""

    file: str = ""
    names_targets: bool = False
    names_saved: bool = False
    stale: str = ""
    naming: str = ""
    keeps_invocation: bool = False

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """Claim no configuration."""
        return False

    def load(self, path: Path) -> dict[str, Any]:
        """Read the file as JSON."""
        return read_json_object(path)

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites``: all is in the tensors."""
        return sites

    def base_model(self, metadata: Mapping[str, str]) -> str | None:
        """Return nothing."""
        return None

    def config(self, written: Written) -> dict[str, Any] | None:
        """Return ``None``."""
        return None

    def dump(self, config: Mapping[str, Any]) -> Mapping[str, bytes]:
        """Return it as JSON."""
        return {self.file: (json.dumps(config, indent=2) + "\n").encode()}

    def metadata(self, written: Written) -> dict[str, str]:
        """Return nothing."""
        return {}

    def notes(self, written: Written) -> Iterator[str]:
        """Yield nothing."""
        yield from ()

    def remarks(self, sites: Sequence[Site], sidecar: Mapping[str, Any] | None) -> Iterator[str]:
        """Yield nothing: what is recorded has one meaning."""
        yield from ()

    def findings(self, adapter: Adapter) -> Iterator[Finding]:
        """Yield nothing."""
        yield from ()
