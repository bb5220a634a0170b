"""The shape of a delta, where it is not simply that of the stored factors."""

from __future__ import annotations

from loratool.adapter.model import Adapter, Site
from loratool.errors import AdapterError

__all__ = ["width_of"]


def width_of(site: Site, adapter: Adapter) -> int:
    """Return the columns of a site's delta, kernels flattened, as far as no base is needed.

    BD-LoRA stores a block-diagonal A compactly where its configuration says so
    (``peft.tuners.lora.variants.BdLoraLinearVariant``).
    """
    assert site.down is not None
    shape = site.down.spec.shape
    width = site.down.spec.elements // shape[0]
    blocks = adapter.field("use_bdlora")
    if site.variant == "bdlora" and isinstance(blocks, dict):
        leaf = site.module.rpartition(".")[2]
        patterns = blocks.get("target_modules_bd_a") or ()
        if any(isinstance(pattern, str) and pattern in leaf for pattern in patterns):
            count = blocks.get("nblocks")
            if type(count) is not int or count < 1:
                raise AdapterError(adapter.path, f"use_bdlora: nblocks is {count!r}")
            width *= count
    return width
