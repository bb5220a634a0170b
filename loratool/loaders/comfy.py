"""ComfyUI: reads nearly every diffusion scheme, but takes scales from alpha tensors alone."""

from __future__ import annotations

from typing import Final

from loratool.loaders.loader import Fate, Feature, Loader, Rule
from loratool.loaders.scales import MODULE_ALPHA

__all__ = ["CLAIM", "LOADER"]

CLAIM: Final = {"for": "comfy"}

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
    rules={
        Feature.SAVED: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
        Feature.NORMS: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
        Feature.TOKEN_ROWS: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
        Feature.BASE_DEPENDENT: Rule(Fate.MISREAD, "ComfyUI adds its factors as a plain LoRA"),
        Feature.PARAMETERS: Rule(Fate.MISREAD, "ComfyUI has no key for them and leaves them out"),
    },
)
