"""AdapterHub's ``adapters``: a LoRA of a name in each layer, its scale in adapter_config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.names.paths.dotted import PathPaths
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.variants import variant_named

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"\.loras\.[^.]+\.(lora_[AB]|m\.weight)$",
    "weights": ("adapter.safetensors", "pytorch_adapter.bin"),
    "sidecar": "adapter_config.json",
}

VERSION: Final = re.compile(r"adapters\.(\d+)\.(\d+)", re.ASCII)
FIXED: Final = (1, 1)
"""The release since which alpha counts: what earlier ones saved, later ones load with alpha = r."""
PARTS: Final = ("q", "k", "v")


@dataclass(frozen=True)
class HubSettings(Settings):
    """``adapter_config.json`` with the method in ``config``."""

    file: str = "adapter_config.json"

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """Whether it is this library's, not PEFT's."""
        method = raw.get("config")
        return raw.get("peft_type") is None and isinstance(method, dict) and "r" in method

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with their scale, and what merged projections stack.

        Raises:
            AdapterError: The configuration is no such one.
            UnsupportedError: It says that the delta is no sum.
        """
        method = (sidecar or {}).get("config")
        if not isinstance(method, dict):
            return sites
        _check(method, where)
        alpha, rank = (_number(method, key, where) for key in ("alpha", "r"))
        version = (sidecar or {}).get("version")
        said = VERSION.match(version) if isinstance(version, str) else None
        if said is not None and (int(said[1]), int(said[2])) < FIXED:
            alpha = rank
        matrices = method.get("attn_matrices")
        enabled = tuple(isinstance(matrices, list) and part in matrices for part in PARTS)
        return tuple(_with(site, alpha, int(rank), enabled) for site in sites)


def _with(site: Site, alpha: float, rank: int, enabled: tuple[bool, ...]) -> Site:
    scaling = Scaling(alpha, rank)
    stacked = variant_named("stacked")
    down = site.slots.get(Slot.DOWN)
    is_more = down is not None and down.spec.shape[:1] != (rank,)
    if is_more and stacked.fits(site.slots, enabled):
        return replace(site, variant=stacked, enabled=enabled, scaling=scaling)
    return replace(site, scaling=scaling)


def _check(method: Mapping[str, Any], where: Path) -> None:
    """Refuse what is no sum of the weight and a delta.

    Raises:
        UnsupportedError: It is none.
    """
    kind = method.get("architecture")
    if kind not in (None, "lora"):
        raise UnsupportedError(where, f"is of the architecture {kind!r:.40}, not LoRA")
    if method.get("composition_mode") not in (None, "add"):
        raise UnsupportedError(
            where, "multiplies the weights ((IA)³, composition_mode 'scale'), which is not read"
        )
    for field, words in (
        ("use_gating", "a gate decides by the input how strong it is"),
        ("vera_d", "is a VeRA of this library, whose projections are not in the file"),
    ):
        if method.get(field):
            raise UnsupportedError(where, f"{words} ({field}): no fixed weights are read from it")


def _number(method: Mapping[str, Any], key: str, where: Path) -> float:
    value = method.get(key)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or (key == "r" and value < 1)
    ):
        raise AdapterError(where, f"config.{key} is {value!r:.40}, expected a number", code="LT015")
    return float(value)


SCHEME = Scheme(
    name="adapterhub",
    summary="AdapterHub's adapters: loras.<name> in every layer (read only)",
    example="bert.encoder.layer.0.attention.self.query.loras.style.lora_A",
    keys=KeyTable(
        templates=(
            Template("{module}.loras.{adapter}.lora_A", Slot.DOWN),
            Template("{module}.loras.{adapter}.lora_B", Slot.UP),
            Template("{module}.loras.{adapter}.m.weight", Slot.MAGNITUDE),
        ),
    ),
    paths=PathPaths(),
    scale=FoldedScale(),
    roles=Roles(has_convolutions=False),
    settings=HubSettings(),
    home=Home(weights_name="adapter.safetensors"),
    priority=4,
    is_written=False,
)
