"""BD-LoRA: block-diagonal factors, of which only the blocks are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.plain import Plain
from loratool.adapter.variant import Array, Read, Slots
from loratool.errors import AdapterError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {"flags": ["use_bdlora"], "priority": 1}


class BdLora(Plain):
    """Which of the two is block-diagonal the configuration says, by parts of module names."""

    name = "bdlora"
    is_compact = True
    is_narrow = True
    is_blocked = True

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return how many blocks A has; see ``peft.tuners.lora.variants.BdLoraLinearVariant``."""
        blocks = config.raw.get("use_bdlora") if config is not None else None
        if not isinstance(blocks, dict):
            return {}
        leaf = module.rpartition(".")[2]
        patterns = blocks.get("target_modules_bd_a") or ()
        if not any(isinstance(pattern, str) and pattern in leaf for pattern in patterns):
            return {}
        count = blocks.get("nblocks")
        if type(count) is not int or count < 1:
            raise AdapterError(module, f"use_bdlora: nblocks is {count!r}", code="LT015")
        return {"blocks": count}

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        blocks: int = site.settings.get("blocks", 1)
        return super().width(site) * blocks

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        down, up = super().factors(site, read)
        if width is not None:
            down = _expanded(down, width)
        return down, _expanded(up, down.shape[0])


def _expanded(factor: Array, columns: int) -> Array:
    """Return the block-diagonal matrix that a compact factor stands for."""
    from loratool.math.namespace import array_namespace

    count = columns // factor.shape[1]
    if count == 1:
        return factor
    rows, width = factor.shape[0] // count, factor.shape[1]
    xp = array_namespace(factor)
    whole = xp.zeros((factor.shape[0], columns), dtype=factor.dtype, device=factor.device)
    for index in range(count):
        part = slice(index * rows, (index + 1) * rows)
        whole[part, index * width : (index + 1) * width] = factor[part]
    return whole


VARIANT = BdLora()
