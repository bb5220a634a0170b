"""What a change of the weights changes in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from loratool.base.config import DTYPE_KEYS, QUANTIZATION, TIE, architectures

__all__ = ["ConfigChanges", "edit_config"]

LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "num_layers")
TASK_SUFFIXES: Final = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
CAUSAL_SUFFIXES: Final = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "Model")

EIGHT_BITS: Final = "float8"
"""How dtypes begin that only codes have."""
DIFFUSERS_CLASS: Final = "_class_name"
"""What a configuration of diffusers says instead of a model type."""


@dataclass(frozen=True, slots=True)
class ConfigChanges:
    """What a merge changes in ``config.json``.

    Attributes:
        untie: Embedding and head are no longer one weight.
        dtype: Name of the new dtype (``bfloat16``), if it changes.
        vocabulary: ``(old, new)`` number of rows, if the vocabulary changed.
        task: PEFT's task type, where the adapter brings a head of its own.
        labels: Number of outputs of that head.
        layers: Which layer of the base each new layer is, where the stack was replicated.
        architecture: Name of the model's class, where the adapter knows it better.
        decoded: Name of the dtype of weights that were coded, if there were any.
    """

    untie: bool = False
    dtype: str | None = None
    vocabulary: tuple[int, int] | None = None
    task: str | None = None
    labels: int | None = None
    layers: tuple[int, ...] | None = None
    architecture: str | None = None
    decoded: str | None = None


def edit_config(config: Mapping[str, Any], changes: ConfigChanges) -> dict[str, Any]:
    """Return ``config`` with ``changes`` made, in the model's part or its text part."""
    edited: dict[str, Any] = deepcopy(dict(config))
    parts = [
        edited,
        *(
            v
            for k, v in edited.items()
            if k in ("text_config", "llm_config") and isinstance(v, dict)
        ),
    ]
    if changes.untie:
        for part in parts:
            if part is edited or TIE in part:
                part[TIE] = False
    if changes.vocabulary:
        old, new = changes.vocabulary
        for part in parts:
            is_one = part.get("share_encoder_decoder_embeddings") is not False
            for key in ("vocab_size", *(("decoder_vocab_size",) if is_one else ())):
                if part.get(key) == old:
                    part[key] = new
    if changes.dtype:
        for part in parts:
            for key in DTYPE_KEYS:
                if key in part:
                    part[key] = changes.dtype
    if changes.decoded:
        _drop_codes(edited)
        for part in parts:
            for key in DTYPE_KEYS:
                if str(part.get(key)).removeprefix("torch.").startswith(EIGHT_BITS):
                    part[key] = changes.decoded
    dtype = changes.dtype or changes.decoded
    # diffusers' models take none of what their configuration does not know.
    if dtype and DIFFUSERS_CLASS not in edited and not any(key in edited for key in DTYPE_KEYS):
        edited["dtype"] = dtype
    if changes.layers is not None:
        for part in parts:
            _replicate(part, changes.layers)
    _edit_task(edited, changes)
    return edited


def _drop_codes(config: dict[str, Any]) -> None:
    """Take out what a configuration, and those of its parts, say of codes."""
    for key in QUANTIZATION:
        config.pop(key, None)
    for key, part in config.items():
        if key.endswith("config") and isinstance(part, dict):
            _drop_codes(part)


def _replicate(config: dict[str, Any], layers: tuple[int, ...]) -> None:
    """Set the number of layers, and stretch the lists that have an entry for each."""
    old = next((config[key] for key in LAYER_COUNTS if type(config.get(key)) is int), None)
    for key, value in config.items():
        if key in LAYER_COUNTS:
            config[key] = len(layers)
        elif key.endswith("layer_types") and isinstance(value, list) and len(value) == old:
            config[key] = [value[layer] for layer in layers]


def _edit_task(config: dict[str, Any], changes: ConfigChanges) -> None:
    suffix = TASK_SUFFIXES.get(changes.task or "")
    if suffix is None and changes.architecture is None:
        return
    names = architectures(config)
    if changes.architecture is not None:
        config["architectures"] = [changes.architecture]
    elif names and suffix and not names[0].endswith(suffix):
        ending = next((end for end in CAUSAL_SUFFIXES if names[0].endswith(end)), None)
        if ending:
            config["architectures"] = [names[0].removesuffix(ending) + suffix]
    known = config.get("id2label")
    count = len(known) if isinstance(known, dict) else 0
    if changes.labels and count != changes.labels:
        # Said even where it is transformers' own default, 2: that of some models is another.
        config.pop("num_labels", None)
        labels = [f"LABEL_{index}" for index in range(changes.labels)]
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
