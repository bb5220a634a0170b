"""diffusers: PEFT's keys behind a component; its converters of other schemes lose things."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from loratool.adapter.build import read_scalar
from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter, Site
from loratool.adapter.slots import Slot
from loratool.loaders.checks import MISREADS, REFUSES, listed, mending
from loratool.loaders.loader import Fate, Feature, Loader, Mend, Rule, ScaleReading
from loratool.loaders.scales import own_alpha
from loratool.names.pipelines import component_of

__all__ = ["CLAIM", "LOADER"]

CLAIM: Final = {"for": "diffusers"}

CONVERTED: Final = frozenset(("kohya", "comfy"))
"""The schemes that it has converters from; the others it takes as PEFT's."""
ATTENTION: Final = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "out_proj")
NAMELESS: Final = re.compile(
    r"transformer\.(final_layer|img_in|txt_in|time_in|vector_in|guidance_in)(\..+)?", re.DOTALL
)
"""Modules of Flux that diffusers converts to keys without prefix, and then drops."""


def _factors(adapter: Adapter) -> Callable[[Site], float | None]:
    """Return what diffusers' converters make of the alphas of a file.

    Those of Stable Diffusion take the commonest alpha for all, and exceptions from it reach the
    feed-forward layers only, because the patterns for attention name tensors, not modules. Those
    of transformers fold alpha into the factors. Under PEFT's names most pipelines drop alphas.
    """
    if adapter.scheme in CONVERTED:
        return partial(_converted_factor, common=_common_alphas(adapter))
    is_flux = adapter.family is not None and adapter.family.startswith("flux")
    return lambda site: site.scaling.factor if Slot.ALPHA not in site.slots or is_flux else 1.0


def _converted_factor(site: Site, common: Mapping[str, float]) -> float:
    component, local = component_of(site.module)
    alpha = common.get(component or "")
    if alpha is None:
        return own_alpha(site)
    leaves = ATTENTION if component == "unet" else TEXT_ATTENTION
    is_lost = local.endswith(tuple(f".{leaf}" for leaf in leaves)) or Slot.ALPHA not in site.slots
    return alpha / site.rank if is_lost else own_alpha(site)


def _common_alphas(adapter: Adapter) -> dict[str, float]:
    """Return the alpha that most modules of each component have, where some record one.

    Nothing for a pipeline with a transformer, whose converters look at each module's own alpha.
    """
    counts: dict[str, Counter[float]] = {}
    if any(component_of(site.module)[0] == "transformer" for site in adapter.sites):
        return {}
    for site in adapter.sites:
        if Slot.ALPHA in site.slots and site.is_plain:
            component = component_of(site.module)[0] or ""
            counts.setdefault(component, Counter())[read_scalar(site.slots[Slot.ALPHA])] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}


def _pipelines(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    """Yield what diffusers' converters drop or do not exist for."""
    if adapter.scheme not in CONVERTED:
        return
    if adapter.family is not None and adapter.family.startswith("sd3"):
        yield finding(
            REFUSES,
            adapter.weights,
            f"diffusers has no converter from {adapter.scheme} for Stable Diffusion 3",
            mending(Mend.CONVERT, loader),
        )
    dropped = [site.module for site in adapter.sites if NAMELESS.fullmatch(site.module)]
    if dropped:
        yield finding(
            MISREADS,
            adapter.weights,
            f"diffusers converts {listed(dropped)} to keys without prefix, and drops them",
            mending(Mend.CONVERT, loader),
        )


NO_LYCORIS = "diffusers reads A and B only"

LOADER = Loader(
    name="diffusers",
    title="diffusers",
    summary="PEFT's keys behind unet., transformer., text_encoder., with the scale in B",
    source="diffusers: loaders/lora_conversion_utils.py, loaders/lora_pipeline.py",
    scheme="diffusers",
    reads=frozenset(("diffusers", "diffusers-legacy", "kohya", "xlabs")),
    tolerates={
        "comfy": "names of the original checkpoint, which diffusers converts for some models"
    },
    scale=ScaleReading("what diffusers' converters make of alphas", _factors),
    checks=(_pipelines,),
    fold=True,
    rules={
        Feature.DORA: Rule(
            Fate.MISREAD,
            "diffusers strips the magnitudes with a warning and applies a plain LoRA",
            Mend.APPROXIMATE,
        ),
        Feature.LOHA: Rule(Fate.REFUSED, NO_LYCORIS, Mend.TO_LORA),
        Feature.LOKR: Rule(Fate.REFUSED, NO_LYCORIS, Mend.TO_LORA),
        Feature.CP: Rule(Fate.REFUSED, "diffusers does not read lora_mid", Mend.TO_LORA),
        Feature.UNFACTORED: Rule(Fate.REFUSED, NO_LYCORIS, Mend.APPROXIMATE),
        Feature.BIASES: Rule(Fate.NOTED, "diffusers' converters drop diff_b for most models"),
        Feature.SAVED: Rule(Fate.MISREAD, "diffusers leaves them out"),
        Feature.NORMS: Rule(Fate.MISREAD, "diffusers leaves them out"),
        Feature.TOKEN_ROWS: Rule(Fate.MISREAD, "diffusers leaves them out"),
        Feature.BASE_DEPENDENT: Rule(Fate.MISREAD, "diffusers adds its factors as a plain LoRA"),
        Feature.PARAMETERS: Rule(Fate.MISREAD, "diffusers leaves them out"),
    },
)
