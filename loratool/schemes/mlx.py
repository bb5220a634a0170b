"""Apple's mlx-lm: factors transposed, and a configuration that holds the multiplier itself."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.fields import number_in
from loratool.adapter.keys import KeyTable, Template, are_transposed, are_upright
from loratool.adapter.model import Site
from loratool.adapter.part import Part
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Home, Scheme, Written
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError
from loratool.files.spec import StoredTensor
from loratool.names.paths.dotted import PathPaths
from loratool.names.switched import stacked_path
from loratool.schemes.parts.roles import FactorsOfTable, Roles
from loratool.schemes.parts.scales import MultiplierScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.stacks import stacked

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"^(?!base_model\.model\.).*\.(lora_[ab]|[AB])$",
    "weights": ("adapters.safetensors", "adapters.npz"),
    "sidecar": "adapter_config.json",
}

BLOCK: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.([0-9]{1,9})\.(.+)$", re.DOTALL)


class MlxKeys(KeyTable):
    """mlx-lm's keys; those of mlx-vlm's first layers, ``A`` and ``B``, may be of anything."""

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Count factors; bare letters only where all of them are pairs of transposed factors."""
        count = self.factor_keys(tensors)
        pairs = self.pairs(tensors)
        if any(key.endswith((".lora_a", ".lora_b")) for key in tensors):
            return 0 if pairs and are_upright(pairs) else count
        return count if 2 * len(pairs) == count and are_transposed(pairs) is not False else 0


class MlxRoles(Roles):
    """The factors of all experts of a layer in one tensor, and not transposed."""

    def together(self, parts: Sequence[Part]) -> list[Part]:
        """Return ``parts`` with the projections of all experts of a layer as one.

        Raises:
            UnsupportedError: An expert is missing, or has another rank than the rest.
        """
        groups: dict[str, dict[int, Part]] = defaultdict(dict)
        made: list[Part] = []
        for part in parts:
            place = stacked_path(part.module)
            if place is None:
                made.append(part)
            else:
                groups[place[0]][place[1]] = part
        return [*made, *(stacked(name, members) for name, members in groups.items())]


class MlxSettings(Settings):
    """``adapter_config.json`` with a multiplier for all modules."""

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """Whether it is mlx-lm's, not PEFT's."""
        is_vlm = {"rank", "alpha"} <= raw.keys() and "r" not in raw
        return raw.get("peft_type") is None and (
            "fine_tune_type" in raw or "lora_parameters" in raw or is_vlm
        )

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        """Return ``sites`` with the scale, which is the multiplier itself.

        Raises:
            AdapterError: It is no number.
        """
        parameters = (sidecar or {}).get("lora_parameters")
        if parameters is None and sites and all(_is_bare(site) for site in sites):
            # mlx-vlm's first layers multiply by alpha itself.
            parameters = {"scale": (sidecar or {}).get("alpha")}
        if parameters is None:
            return sites
        if not isinstance(parameters, dict):
            raise AdapterError(
                where, f"lora_parameters is {parameters!r:.40}, expected an object", code="LT015"
            )
        scale = parameters.get("scale")
        if scale is None:
            return sites
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number or not math.isfinite(scale):
            raise AdapterError(
                where, f"lora_parameters.scale is {scale!r:.40}, expected a number", code="LT015"
            )
        return tuple(
            replace(
                site,
                scaling=Scaling(scale * site.rank, site.rank, multiplier=float(scale)),
            )
            for site in sites
        )

    def remarks(self, sites: Sequence[Site], sidecar: Mapping[str, Any] | None) -> Iterator[str]:
        """Yield that mlx-vlm's first layers have two meanings, where they have."""
        said = sidecar or {}
        ranks = {site.rank for site in sites}
        is_first = len(ranks) == 1 and all(_is_bare(site) for site in sites)
        if is_first and ranks != {1} and "alpha" in said and "lora_parameters" not in said:
            yield (
                "is multiplied by alpha itself, as mlx-vlm did before release 0.5; since then it "
                "takes alpha / rank, for older files too. If that is how it was trained: "
                f"loratool rescale --scale {1 / ranks.pop():g}"
            )

    def config(self, written: Written) -> dict[str, Any] | None:
        """Return mlx-lm's ``adapter_config.json``."""
        parts = written.parts
        old = dict(written.sidecar or {})
        config = written.config or {}
        layers = {int(match[1]) for part in parts if (match := BLOCK.search(part.module))}
        has_magnitude = any(Slot.MAGNITUDE in part.values for part in parts)
        parameters = {
            "rank": max({part.rank for part in parts}),
            "scale": parts[0].scale,
            "dropout": number_in(config, "lora_dropout", where="adapter_config.json"),
            "keys": sorted({_block_path(part.module) for part in parts}),
        }
        known = {k: v for k, v in old.items() if k not in ("lora_parameters", "fine_tune_type")}
        model = config.get("base_model_name_or_path")
        return {
            **known,
            **({"model": model} if model and "model" not in known else {}),
            "fine_tune_type": "dora" if has_magnitude else "lora",
            "num_layers": known.get("num_layers", _depth(layers)),
            "lora_parameters": parameters,
        }


def _is_bare(site: Site) -> bool:
    """Whether the factors of a module are called ``A`` and ``B``."""
    down = site.slots.get(Slot.DOWN)
    return down is not None and down.spec.name.endswith(".A")


def _depth(layers: set[int]) -> int:
    """Return how many of the last blocks mlx-lm has to adapt; -1 for all of them."""
    return max(layers) - min(layers) + 1 if layers and min(layers) > 0 else -1


def _block_path(module: str) -> str:
    """Return the path of a module inside its block, as mlx-lm's ``keys`` have it."""
    match = BLOCK.search(module)
    return match[2] if match else module


SCHEME = Scheme(
    name="mlx",
    summary="mlx-lm: transposed factors, a scale in adapter_config.json",
    example="model.layers.0.self_attn.q_proj.lora_a",
    keys=MlxKeys(
        foreign=("base_model.model.",),
        templates=(
            Template("{module}.lora_a", Slot.DOWN),
            Template("{module}.lora_b", Slot.UP),
            Template("{module}.m", Slot.MAGNITUDE),
            # Also read: mlx-vlm's first layers.
            Template("{module}.A", Slot.DOWN),
            Template("{module}.B", Slot.UP),
        ),
    ),
    paths=PathPaths(),
    scale=MultiplierScale(),
    roles=MlxRoles(embeddings=FactorsOfTable(), is_transposed=True, has_convolutions=False),
    settings=MlxSettings(file="adapter_config.json"),
    home=Home(weights_name="adapters.safetensors", library="mlx"),
)
