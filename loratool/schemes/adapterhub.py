"""AdapterHub's ``adapters``: a LoRA of a name in each layer, its scale in adapter_config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Kind, Site
from loratool.adapter.part import Part
from loratool.adapter.problems import plain_options
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Home, NoPlaceError, Scheme, Written
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError, UnsupportedError
from loratool.names.paths.dotted import PathPaths
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import MultiplierScale
from loratool.schemes.parts.settings import Settings
from loratool.values.expr import Expr, concatenated
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
WRITTEN: Final = "adapters.1.3.0"
"""The release whose form is written."""
PARTS: Final = ("q", "k", "v")
MERGED: Final = "c_attn"
"""A projection of queries, keys and values in one (GPT-2), each of which has rows of A."""
PLACES: Final = (
    (re.compile(r"(.*\.)?(query|q_proj|q_lin|query_proj|\w*Attention\.q)", re.DOTALL), "q"),
    (re.compile(r"(.*\.)?(key|k_proj|k_lin|key_proj|\w*Attention\.k)", re.DOTALL), "k"),
    (re.compile(r"(.*\.)?(value|v_proj|v_lin|value_proj|\w*Attention\.v)", re.DOTALL), "v"),
    (re.compile(rf"(.*\.)?{MERGED}", re.DOTALL), MERGED),
    (
        re.compile(
            r"(.*\.)?(intermediate\.dense|fc1|fc_in|lin1|ffn|c_fc|wi|wi_1|down_proj)", re.DOTALL
        ),
        "intermediate_lora",
    ),
    (
        re.compile(
            r"(.*\.)?((?<!attention\.)output\.dense|fc2|fc_out|lin2|ffn_output|wo|mlp\.c_proj|"
            r"up_proj)",
            re.DOTALL,
        ),
        "output_lora",
    ),
)
"""Where the library puts a LoRA, by the names of its models; it takes Llama's down_proj for the
first layer of an MLP, and up_proj for the last."""


@dataclass(frozen=True)
class HubSettings(Settings):
    """``adapter_config.json`` with the method in ``config``."""

    file: str = "adapter_config.json"

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """Whether it is this library's, not PEFT's."""
        method = raw.get("config")
        return raw.get("peft_type") is None and isinstance(method, dict) and "r" in method

    def config(self, written: Written) -> dict[str, Any] | None:
        """Return what the library makes its layers by; other methods' fields stay away."""
        old = {k: v for k, v in (written.sidecar or {}).items() if k not in ("config", "version")}
        method = (written.sidecar or {}).get("config")
        parts = [item.part for item in written.modules]
        places = {_place(part.module) for part in parts}
        rank = max(part.rank for part in parts)
        enabled = [part for part in PARTS if part in places or MERGED in places]
        kept = method if isinstance(method, dict) else {}
        model = (written.config or {}).get("base_model_name_or_path")
        return {
            **({"model_name": model} if model and "model_name" not in old else {}),
            **old,
            "name": written.name,
            "config": {
                "architecture": "lora",
                "selfattn_lora": bool(enabled),
                "intermediate_lora": "intermediate_lora" in places,
                "output_lora": "output_lora" in places,
                "leave_out": [],
                "r": rank,
                "alpha": _plain_number(parts[0].scale * rank),
                "dropout": kept.get("dropout", 0.0),
                "attn_matrices": enabled,
                "composition_mode": "add",
                "init_weights": "lora",
                "use_gating": False,
                "use_dora": any(Slot.MAGNITUDE in part.values for part in parts),
            },
            "version": WRITTEN,
        }

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


@dataclass(frozen=True)
class HubRoles(Roles):
    """Matrices where the library has LoRA's layers, magnitudes as columns."""

    def together(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts``, of which all have magnitudes or none has.

        Raises:
            UnsupportedError: Some have.
        """
        with_magnitudes = [part for part in parts if Slot.MAGNITUDE in part.values]
        if with_magnitudes and len(with_magnitudes) < len(parts):
            first = with_magnitudes[0]
            raise UnsupportedError(
                first.label,
                f"is DoRA, {len(parts) - len(with_magnitudes)} modules are not, and AdapterHub "
                "makes all modules of an adapter DoRA or none",
                hint=f"make plain LoRAs with {plain_options(first.variant, first.values)}",
            )
        return list(parts)

    def stored(self, part: Part) -> Part:
        """Return ``part`` as it is stored.

        Raises:
            NoPlaceError: The library has no LoRA there, or no such tensor.
        """
        place = _place(part.module)
        if not place or part.kind is not Kind.LINEAR:
            raise NoPlaceError(
                "this module: the library has LoRA in queries, keys, values and MLPs"
            )
        made = super().stored(part)
        if place != MERGED or not made.is_plain:
            return made
        if Slot.MAGNITUDE in made.values:
            raise NoPlaceError("magnitudes of a merged projection")
        height = made.up.shape[0] // len(PARTS)
        if made.up.shape[0] % len(PARTS):
            raise NoPlaceError("a merged projection of unequal parts")
        values = {**made.values, Slot.DOWN: concatenated([made.down] * len(PARTS))}
        return replace(made, values=values, stacked=tuple((part, height) for part in PARTS))

    def _stored_magnitude(self, part: Part) -> Expr:
        value = super()._stored_magnitude(part)
        return value.reshaped((*value.shape, 1)) if len(value.shape) == 1 else value


def _place(module: str) -> str:
    """Return where the library has a module's LoRA: a part of attention, or a flag."""
    return next((place for pattern, place in PLACES if pattern.fullmatch(module)), "")


def _plain_number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


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
    summary="AdapterHub's adapters: loras.<name> in every layer",
    example="bert.encoder.layer.0.attention.self.query.loras.style.lora_A",
    keys=KeyTable(
        templates=(
            Template("{module}.loras.{adapter}.lora_A", Slot.DOWN),
            Template("{module}.loras.{adapter}.lora_B", Slot.UP),
            Template("{module}.loras.{adapter}.m.weight", Slot.MAGNITUDE),
        ),
    ),
    paths=PathPaths(),
    scale=MultiplierScale(),
    roles=HubRoles(has_convolutions=False),
    settings=HubSettings(),
    home=Home(weights_name="pytorch_adapter.bin", suffix=".bin"),
    priority=4,
)
