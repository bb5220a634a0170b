"""Checkpoints that hold a model and an adapter's factors in one: which tensor is whose.

They come from saving a model while its layers are wrapped. PEFT keeps the wrapped layer as
``base_layer``, other tools as ``w0`` or ``linear``; loralib has weight and factors in one module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

__all__ = ["ALPHAS", "SCALES", "factor_names", "own_names", "without_holder", "without_wrapper"]

FACTOR: Final = re.compile(
    r"(?P<module>.+)\.(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector|down|up|mid|a|b)"
    r"|hada_(w\d_[ab]|t\d)|lokr_(w\d(_[ab])?|t\d)|dora_scale|lora\.[AB])(\..+)?",
    re.DOTALL,
)
LIKELY: Final = ("lora_", "hada_", "lokr_", ".lora.")
HELD: Final = re.compile(r"(\.lora|\.parametrizations\.weight\.\d+)\Z", re.ASCII)
"""What holds the factors inside the layer that they are of, in code of tutorials."""
PARAMETRISED: Final = ".parametrizations.weight.original"
"""What PyTorch calls a weight that is computed from others."""
ALPHAS: Final = ("alpha", "lora_alpha")
SCALES: Final = ("scaling", "lora_scaling")
"""Numbers that a layer keeps beside its factors, which no layer has without them."""
WRAPPED: Final = (
    "base_layer",
    "w0",
    "org_module",
    "orig_module",
    "original_layer",
    "linear",
    "original_linear",
    "base_linear",
    "original_module",
    "orig_layer",
    "org_layer",
    "frozen",
    "pretrained",
    "base",
    "original",
    "layer",
)
"""What the layer is called inside the one that wraps it."""
PREFIX: Final = "base_model.model."
SAVED: Final = re.compile(r"\.(?P<kind>modules_to_save\.[^.]+|original_module)(?=\.)")


def factor_names(names: Collection[str]) -> dict[str, str]:
    """Return the names that are an adapter's factors, each with the module that they are of."""
    likely = (name for name in names if any(part in name for part in LIKELY))
    found = ((name, FACTOR.fullmatch(name)) for name in likely)
    return {name: HELD.sub("", match["module"]) for name, match in found if match}


def without_holder(module: str) -> str:
    """Return the layer that factors are of, which something inside it may hold."""
    return HELD.sub("", module)


def without_wrapper(name: str, adapted: Collection[str]) -> str:
    """Return the name that a parameter has where nothing wraps its layer.

    Args:
        name: Such as ``q_proj.base_layer.weight``.
        adapted: The modules that have factors, as they are spelled in names.
    """
    if name.endswith(PARAMETRISED):
        return f"{name.removesuffix(PARAMETRISED)}.weight"
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    if last in WRAPPED and parent in adapted:
        return f"{parent}.{leaf}"
    return name


def own_names(names: Collection[str]) -> Mapping[str, str]:
    """Return the names of the model's own parameters, each with the one that it has unwrapped.

    Factors, and saved copies that were trained, are none of them.
    """
    factors = factor_names(names)
    adapted = frozenset(factors.values())
    found = {}
    for name in names:
        saved = SAVED.search(name)
        if name in factors or (saved is not None and saved["kind"] != "original_module"):
            continue
        holder, _, leaf = name.rpartition(".")
        if leaf in (*ALPHAS, *SCALES) and without_holder(holder) in adapted:
            continue
        found[name] = SAVED.sub("", without_wrapper(name, adapted)).removeprefix(PREFIX)
    return found
