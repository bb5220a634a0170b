"""ComfyUI: reads nearly every diffusion scheme, but takes scales from alpha tensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter
from loratool.loaders.checks import MISREADS, listed, mending
from loratool.loaders.loader import Fate, Feature, Loader, Mend, Rule
from loratool.loaders.scales import MODULE_ALPHA

__all__ = ["CLAIM", "LOADER"]

CLAIM: Final = {"for": "comfy"}

OTHERWISE: Final = frozenset(
    (
        *("cogvideox", "cosmos", "cosmos2", "ltx-2", "ltx-video", "mochi", "sana", "sana-sprint"),
        *("wan", "wan-animate"),
    )
)
"""Families whose modules ComfyUI does not look for behind ``transformer.`` at all."""
UNET: Final = ("unet", "down_blocks", "mid_block", "up_blocks")
"""How keys of a U-Net begin."""
BLOCKS: Final = ("hunyuan-video", "hunyuan-video-1.5")
"""Families that it knows behind ``transformer.``, by the names of their own checkpoints."""


def _pipelines(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    """Yield what has no name in ComfyUI's list where a file has diffusers' names.

    Of a U-Net's attention the list has the names of before diffusers 0.22 alone
    (``attn1.processor.to_q``); of transformers those of some families.
    """
    unknown = [
        site.module
        for site in adapter.sites
        if any(
            _is_unknown(tensor.spec.name, adapter.family or "") for tensor in site.slots.values()
        )
    ]
    if unknown:
        yield finding(
            MISREADS,
            adapter.weights,
            f"has names that ComfyUI does not look for, of {listed(unknown)}: it says “lora key "
            "not loaded” and leaves them out",
            mending(Mend.CONVERT, loader),
        )


def _is_unknown(key: str, family: str) -> bool:
    """Whether ComfyUI's list lacks what this tensor is called."""
    component = key.partition(".")[0]
    if component in UNET:
        return ".to_" in key and ".processor.to_" not in key
    is_transformer = component in ("transformer", "transformer_2")
    return is_transformer and (
        family in OTHERWISE or (family in BLOCKS and "transformer_blocks." in key)
    )


LOADER = Loader(
    name="comfy",
    title="ComfyUI",
    summary="paths of the original checkpoint, with an alpha for each module",
    source="ComfyUI: comfy/lora.py, comfy/weight_adapter/",
    scheme="comfy",
    reads=frozenset(("comfy", "kohya", "diffusers", "diffusers-legacy")),
    tolerates={"xlabs": "names that ComfyUI knows if the last blocks of both kinds are there"},
    scale=MODULE_ALPHA,
    fold=False,
    checks=(_pipelines,),
    rules={
        Feature.SAVED: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
        Feature.NORMS: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
        Feature.TOKEN_ROWS: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
        Feature.BASE_DEPENDENT: Rule(Fate.MISREAD, "ComfyUI adds its factors as a plain LoRA"),
        Feature.PARAMETERS: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
    },
)
