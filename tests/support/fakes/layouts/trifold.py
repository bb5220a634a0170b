"""A layout of no real model: queries, keys and values in one weight, with rows of their own."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.base.config import ModelConfig
from loratool.base.layout import Fused, Headers, Layout

PARTS = ("q_proj", "k_proj", "v_proj")


class Trifold(Layout):
    name = "trifold"

    def claims(self, headers: Headers) -> int:
        return 5 if "trifold" in headers.config.model_types else 0

    def paths(self, headers: Headers) -> Mapping[str, str]:
        return {m: m.replace("blk.", "model.layers.") for m in headers.modules if "blk." in m}

    def fused(self, module: str, config: ModelConfig) -> Fused | None:
        parent, _, leaf = module.rpartition(".")
        if leaf not in (*PARTS, "wqkv") or not parent:
            return None
        rows = config.projection_rows
        names = tuple(f"{parent}.{part}" for part in PARTS)
        return Fused(f"{parent}.wqkv", names, rows or ())


LAYOUT = Trifold()
