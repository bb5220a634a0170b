"""Checkpoints that hold a model and an adapter's factors in one: which tensor is whose.

They come from saving a model while its layers are wrapped. PEFT keeps the wrapped layer as
``base_layer``, other tools as ``w0`` or ``linear``; loralib has weight and factors in one module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

__all__ = [
    "ALPHAS",
    "SCALES",
    "factor_names",
    "is_of_layer",
    "own_names",
    "unwrapped_names",
    "without_holder",
]

FACTOR: Final = re.compile(
    r"(?P<module>.+)\.(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector|down|up|mid|a|b)"
    r"|hada_(w\d_[ab]|t\d)|lokr_(w\d(_[ab])?|t\d)|dora_scale|lora\.[AB]"
    r"|lora(_(layer|adapter|module))?\.(down|up|[01])|w(eight)?_lora_[AB]|(lora|LoRA)_?(mat(rix)?_|weight_)?[AB](_weight)?|lora_(layer|adapter|module)\.[AB])(\..+)?",
    re.DOTALL,
)
LIKELY: Final = ("lora_", "hada_", "lokr_", ".lora", ".LoRA")
HELD: Final = re.compile(
    r"(\.lora(_layer|_adapter|_module)?|\.parametrizations\.weight\.\d+)\Z", re.ASCII
)
"""What holds the factors inside the layer that they are of, in code of tutorials."""
NAMED: Final = re.compile(r"\.(lora_)?adapters\.[^.]+\Z")
"""What holds those of one of several adapters."""
PARAMETRISED: Final = ".parametrizations.weight.original"
"""What PyTorch calls a weight that is computed from others."""
ALPHAS: Final = ("alpha", "lora_alpha")
SCALES: Final = ("scaling", "lora_scaling", "scale", "lora_scale")
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
OWN_WEIGHTS: Final = ("W", "W0", "W_0", "w0", "weight0", "base_weight", "original_weight")
"""What the weight is called in a layer that makes its own, where it has no other."""
OF_LAYER: Final = re.compile(
    r"(weight|bias|q(weight|zeros|scales|bias)|quant|scales?_|zeros?_|g_idx|SCB|absmax|input_scale"
    r"|running_|num_batches_tracked)\w*",
    re.ASCII,
)
"""What parameters and buffers of layers are called, those of quantised ones too."""
PREFIX: Final = "base_model.model."
SAVED: Final = re.compile(r"\.(?P<kind>modules_to_save\.[^.]+|original_module)(?=\.)")


def factor_names(names: Collection[str]) -> dict[str, str]:
    """Return the names that are an adapter's factors, each with the module that they are of."""
    likely = (name for name in names if any(part in name for part in LIKELY))
    found = ((name, FACTOR.fullmatch(name)) for name in likely)
    return {name: NAMED.sub("", HELD.sub("", match["module"])) for name, match in found if match}


def without_holder(module: str) -> str:
    """Return the layer that factors are of, which something inside it may hold."""
    return HELD.sub("", module)


def is_of_layer(leaf: str) -> bool:
    """Whether layers have something of this name, whether factors are beside it or not."""
    return OF_LAYER.fullmatch(leaf) is not None or leaf in OWN_WEIGHTS


def unwrapped_names(names: Iterable[str], adapted: Collection[str]) -> dict[str, str]:
    """Return parameters, each with the name that it has where nothing wraps its layer.

    The layer inside another may be called anything, where it is all that this has.

    Args:
        names: Such as ``q_proj.base_layer.weight``.
        adapted: The modules that have factors, as they are spelled in names.
    """
    names = list(names)
    inside: dict[str, set[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if module in adapted:
            inside.setdefault(module, set()).add("" if leaf == "weight" else leaf)
        elif parent in adapted and leaf == "weight":
            inside.setdefault(parent, set()).add(f"{last}.")
    return {name: _unwrapped(name, inside) for name in names}


def _unwrapped(name: str, inside: Mapping[str, Collection[str]]) -> str:
    """Return a name without the layer that wraps it.

    Args:
        name: The name.
        inside: What each adapted module has: layers, with a dot behind them, parameters, and its
            weight, the empty one.
    """
    if name.endswith(PARAMETRISED):
        return f"{name.removesuffix(PARAMETRISED)}.weight"
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    if module in inside and leaf in OWN_WEIGHTS and "" not in inside[module]:
        return f"{module}.weight"
    if parent not in inside:
        return name
    layers = [each for each in inside[parent] if not each or each.endswith(".")]
    return f"{parent}.{leaf}" if last in WRAPPED or layers == [f"{last}."] else name


def own_names(names: Collection[str]) -> Mapping[str, str]:
    """Return the names of the model's own parameters, each with the one that it has unwrapped.

    Factors, and saved copies that were trained, are none of them.
    """
    factors = factor_names(names)
    adapted = frozenset(factors.values())
    own: list[str] = []
    for name in names:
        saved = SAVED.search(name)
        if name in factors or (saved is not None and saved["kind"] != "original_module"):
            continue
        holder, _, leaf = name.rpartition(".")
        if leaf in (*ALPHAS, *SCALES) and without_holder(holder) in adapted:
            continue
        own.append(name)
    unwrapped = unwrapped_names(own, adapted)
    return {name: SAVED.sub("", bare).removeprefix(PREFIX) for name, bare in unwrapped.items()}
