"""On which weights an adapter was trained, quantised or not, and what merging into others means.

A QLoRA adapter has seen ``dequantised(Q(W)) + Δ``. Merged into that, the model is what training
saw; merged into the original ``W`` the error of quantisation is gone, which is the common advice.
"""

from __future__ import annotations

import re
from typing import Final

from loratool.base.model import Model

__all__ = ["quantised_name", "training_notes"]

NAMES: Final = re.compile(
    r"(?i)(?:^|[-_./])(bnb-4bit|bnb-8bit|[48]-?bit|int[48]|nf4|fp4|gptq\w*|awq|fp8(?:-dynamic)?|"
    r"nvfp4|mxfp4|hqq|w[48]a(?:8|16)|gguf|q[2-8]_(?:k(?:_[sml])?|[01]))(?=$|[-_./])"
)
"""What repositories of quantised models have in their names."""
SMOOTHED: Final = ("awq",)
"""Methods whose weights are not the original's: a rescaling was folded into what comes before."""


def quantised_name(name: str | None) -> str | None:
    """Return what the name of a model says about its quantisation, if anything."""
    match = NAMES.search(name or "")
    return match[1] if match is not None else None


def training_notes(recorded: str | None, model: Model | None = None) -> list[str]:
    """Return what follows from the base that an adapter names, and the one that is given.

    Args:
        recorded: The base that the adapter names.
        model: The base that it is for, if one is given.
    """
    kind = quantised_name(recorded)
    given = model.quantization if model is not None else None
    if model is None:
        if kind is None:
            return []
        return [
            f"the base that it names, {recorded!r}, is quantised ({kind}): merged into that it is "
            "what training saw; merged into the 16-bit original the error of quantisation is gone"
        ]
    if kind is not None and given is None:
        return [
            f"the base that it names, {recorded!r}, is quantised ({kind}) and this one is not: the "
            "error of quantisation that training saw is not in these weights, which is the common "
            "way to merge; the quantised base gives exactly what training saw"
        ]
    if kind is not None and given is not None:
        return [
            f"the base that it names, {recorded!r}, is quantised ({kind}), as this one is "
            f"({given.format}): merged into it is what training saw, the error of quantisation "
            "included; the 16-bit original often makes the better model"
        ]
    if given is None:
        return []
    named = f"names {recorded!r}" if recorded else "names no base"
    notes = [
        f"this base is quantised ({given.format}) and the adapter {named}: trained on weights "
        "that were quantised on loading (QLoRA), merging into these is what training saw; trained "
        "on 16 bits, the error of quantisation comes on top"
    ]
    if given.method in SMOOTHED and recorded:
        notes.append(
            f"weights in {given.method.upper()} have the scales of a search folded into the layers "
            "before them: an adapter that was trained on the original does not fit them"
        )
    return notes
