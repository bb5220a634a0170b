"""The files beside the weights: carried over, and changed only where the merge changes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.model import Adapter
from loratool.files.checkpoint import Checkpoint, is_weight_like
from loratool.names.tied import architectures
from loratool.plan.sidecar import Sidecar

__all__ = [
    "STRAY_LINK",
    "TOKENIZER_FILES",
    "ConfigChanges",
    "collect_sidecars",
    "edit_config",
    "link_roots",
    "stays_inside",
]

TOKENIZER_FILES: Final = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
    )
)
STRAY_LINK: Final = "a link that leaves the folder"
MAX_DEPTH: Final = 3
LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "num_layers")
TASK_SUFFIXES: Final = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
CAUSAL_SUFFIXES: Final = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "Model")


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
    """

    untie: bool = False
    dtype: str | None = None
    vocabulary: tuple[int, int] | None = None
    task: str | None = None
    labels: int | None = None
    layers: tuple[int, ...] | None = None
    architecture: str | None = None


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
            if part is edited or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if changes.vocabulary:
        old, new = changes.vocabulary
        for part in parts:
            if part.get("vocab_size") == old:
                part["vocab_size"] = new
    if changes.dtype:
        for part in parts:
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = changes.dtype
        if not any(key in edited for key in ("dtype", "torch_dtype")):
            edited["dtype"] = changes.dtype
    if changes.layers is not None:
        for part in parts:
            _replicate(part, changes.layers)
    _edit_task(edited, changes)
    return edited


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


def collect_sidecars(
    checkpoint: Checkpoint, changes: ConfigChanges, tokenizer_from: Adapter | None
) -> tuple[list[Sidecar], list[tuple[str, str]]]:
    """Return the files that travel along, and those that do not with the reason.

    Args:
        checkpoint: The base.
        changes: What changes in its ``config.json``.
        tokenizer_from: The adapter whose tokenizer replaces the base's, if any.
    """
    found: dict[str, Sidecar] = {}
    left: list[tuple[str, str]] = []
    roots = link_roots(checkpoint.folder, (shard.path for shard in checkpoint.shards))
    used = {shard.path.name for shard in checkpoint.shards}
    if checkpoint.index:
        used.add(checkpoint.index.name)
    for path, name in _files_below(checkpoint.folder, roots, left):
        if name in used:
            continue
        if is_weight_like(path):
            left.append((name, "weights or training state of the unmerged base"))
        elif path.name == CONFIG_NAME:
            left.append((name, "it would make loaders look for an adapter"))
        else:
            found[name] = Sidecar(name, path)
    if checkpoint.config:
        edited = edit_config(checkpoint.config, changes)
        if edited != checkpoint.config:
            content = json.dumps(edited, indent=2, ensure_ascii=False) + "\n"
            found["config.json"] = Sidecar(
                "config.json", None, content.encode(), _describe(checkpoint.config, edited)
            )
    if tokenizer_from is not None:
        roots = link_roots(tokenizer_from.folder, [tokenizer_from.weights])
        for path in sorted(tokenizer_from.folder.iterdir()):
            is_tokenizer = path.name in TOKENIZER_FILES and path.is_file()
            if is_tokenizer and stays_inside(path, roots):
                found[path.name] = Sidecar(path.name, path, why="from the adapter's folder")
    return [found[name] for name in sorted(found)], left


def _describe(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = sorted(key for key in new if old.get(key) != new[key])
    return f"changed: {', '.join(changed)}"


def _files_below(
    folder: Path,
    roots: Sequence[Path],
    left: list[tuple[str, str]],
    prefix: str = "",
    depth: int = 0,
) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for path in sorted(folder.iterdir()):
        name = f"{prefix}{path.name}"
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not stays_inside(path, roots):
            left.append((name, STRAY_LINK))
        elif path.is_dir() and not path.is_symlink():
            if depth < MAX_DEPTH:
                found += _files_below(path, roots, left, f"{name}/", depth + 1)
            else:
                left.append((f"{name}/", "nested too deeply"))
        elif path.is_file():
            found.append((path, name))
    return found


def stays_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a file, links followed, lies below one of ``roots``."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(target.is_relative_to(root) for root in roots)


def link_roots(folder: Path, weights: Iterable[Path]) -> list[Path]:
    """Return where links may lead: the folder, and wherever its weights really are.

    That covers the blobs of a hub cache and folders made of links to another model; a stray
    link to anything else is not followed.
    """
    return [folder.resolve(), *{path.resolve().parent for path in weights}]
