"""What a file is that no scheme claims: said by name, with what to do about it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

__all__ = ["PEFT_TYPES", "describe_keys", "looks_like_adapter", "looks_like_model"]

PEFT_TYPES: Final = {
    "PROMPT_TUNING": "a trained prompt, not a change of weights",
    "MULTITASK_PROMPT_TUNING": "a trained prompt, not a change of weights",
    "P_TUNING": "a trained prompt, not a change of weights",
    "PREFIX_TUNING": "a trained prefix, not a change of weights",
    "CPT": "a trained prompt, not a change of weights",
    "ADAPTION_PROMPT": "trained prompts with gates, not a change of weights",
    "CARTRIDGE": "a trained cache, not a change of weights",
    "XLORA": "a router that mixes adapters by input; no fixed weights equal it",
    "POLY": "a router that mixes adapters by task; no fixed weights equal it",
    "LILY": "a router that mixes factors by input; no fixed weights equal it",
    "SHADOW": "a small model beside the large one; no weights of that equal it",
    "PSOFT": "rotations of singular vectors of the base, whose signs differ between machines",
    "FROD": "factors in directions shared by modules of the live model, not read yet",
    "ADAMSS": "factors of clusters of the base's singular vectors, which differ between machines",
}
"""What the commonest types are; the others are named as they are."""

CONTROL: Final = "lora_controlnet"
"""The empty tensor by which ComfyUI knows a control-LoRA, most of whose keys are a model's."""

LEAVES: Final = (".weight", ".bias", ".weight_scale", ".weight_scale_inv", ".input_scale")
"""How names of a model's tensors end."""

FORMS: Final[tuple[tuple[str, str], ...]] = (
    (
        rf"^({CONTROL}$|(input_hint_block|zero_convs|middle_block_out)\.)",
        "those of a control-LoRA: a network beside the base, made of copies of its weights, which "
        "no merge puts into it; ComfyUI loads it with the node for control networks",
    ),
    (r"\.adapters?\.|adapter_down|adapter_up", "bottleneck adapters: layers, not deltas"),
    (r"^w_[ab]_\d+$", "numbered factors, but not two pairs for each block"),
    (
        r"\.([qp]_layer\.weight|lambda_layer)$",
        "T-LoRA's, of which each timestep uses other ranks; no fixed weights equal it",
    ),
    (r"\.lora_[ab]\.weight$", "factors of a torchtune model that is not read"),
    (r"\.lora_(up|down)\.weight$", "factors under names of a scheme that is not known"),
    (
        r"(^|[._])(lora|LoRA)([._A-Z0-9]|$)|[._](W|w|delta|linear|adapter|matrix)_?[aAbB](_\w+)?(\.weight)?$",
        "factors under names of their own, it seems: call them MODULE.lora_A (r, in) and "
        "MODULE.lora_B (out, r), and say the scale with --alpha",
    ),
)


def looks_like_adapter(keys: Collection[str], forms: Sequence[tuple[str, str]] = ()) -> bool:
    """Whether most of ``keys`` are of some kind of adapter that no scheme reads yet.

    Args:
        keys: The keys of a file.
        forms: What keys look like that schemes know, with what they are.
    """
    return CONTROL in keys or any(
        2 * sum(1 for key in keys if re.search(pattern, key)) >= len(keys)
        for pattern, _ in (*forms, *FORMS)
    )


def looks_like_model(keys: Collection[str], forms: Sequence[tuple[str, str]] = ()) -> bool:
    """Whether ``keys``, none of them a factor that is known, are those of a model's weights.

    Args:
        keys: The keys of a file.
        forms: What keys look like that schemes know, with what they are.
    """
    weights = sum(1 for key in keys if key.endswith(LEAVES))
    return bool(keys) and 10 * weights >= 9 * len(keys) and not looks_like_adapter(keys, forms)


def describe_keys(keys: Collection[str], forms: Sequence[tuple[str, str]] = ()) -> str:
    """Return one phrase on what ``keys`` look like, with examples.

    Args:
        keys: The keys of a file.
        forms: What keys look like that schemes know, with what they are.
    """
    for pattern, words in (*forms, *FORMS):
        hits = [key for key in keys if re.search(pattern, key)]
        if hits:
            return f"{len(hits)} of {len(keys)} keys are {words}; such as {hits[0]!r}"
    if not keys:
        return "it holds no tensors"
    examples = ", ".join(repr(key) for key in list(keys)[:3])
    return f"none of its {len(keys)} keys is a LoRA factor; they are like {examples}"
