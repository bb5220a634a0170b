"""The files beside the weights: carried over, and changed only where the merge changes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.model import Adapter
from loratool.base.config import CONFIG_NAME as MODEL_CONFIG
from loratool.base.config import QUANTIZATION_FILES, is_model_folder, read_config
from loratool.base.config_edits import ConfigChanges, edit_config
from loratool.base.model import Model
from loratool.files.checkpoint import is_weight_like
from loratool.files.links import DANGLING_LINK, NO_FILE, STRAY_LINK, link_roots, stays_inside
from loratool.plan.history import RECORD_NAME
from loratool.plan.sidecar import TOKENIZER_FILES, Sidecar

__all__ = [
    "collect_sidecars",
]

MAX_DEPTH: Final = 3


def collect_sidecars(
    model: Model, changes: ConfigChanges, tokenizer_from: Adapter | None
) -> tuple[list[Sidecar], list[tuple[str, str]]]:
    """Return the files that travel along, and those that do not with the reason.

    Args:
        model: The base.
        changes: What changes in its ``config.json``.
        tokenizer_from: The adapter whose tokenizer replaces the base's, if any.
    """
    found: dict[str, Sidecar] = {}
    left: list[tuple[str, str]] = []
    shards = [shard.path for shard in model.shards]
    roots = link_roots(model.folder, shards)
    indices = [one.index for one in model.checkpoints.values() if one.index]
    used = {path.relative_to(model.folder).as_posix() for path in (*shards, *indices)}
    # What lies beside a file that is no library's folder is not the model's.
    is_library = model.is_folder or is_model_folder(model.folder)
    for path, name in _files_below(model.folder, roots, left) if is_library else ():
        if name in used or name == RECORD_NAME:
            continue  # another is written, of this merge
        is_merged = "" in model.checkpoints or name.rpartition("/")[0] in ("", *model.checkpoints)
        if is_weight_like(path) and is_merged:
            left.append((name, "weights or training state of the unmerged base"))
        elif name in QUANTIZATION_FILES and changes.decoded:
            left.append((name, "describes codes that the output has not"))
        elif path.name == CONFIG_NAME:
            left.append((name, "it would make loaders look for an adapter"))
        else:
            found[name] = Sidecar(name, path)
    for component in model.checkpoints:
        config = read_config(model.folder / component)
        edited = edit_config(config.raw, changes) if config else config.raw
        if edited != config.raw:
            name = f"{component}/{MODEL_CONFIG}" if component else MODEL_CONFIG
            content = json.dumps(edited, indent=2, ensure_ascii=False) + "\n"
            why = _describe(config.raw, edited)
            found[name] = Sidecar(name, None, content.encode(), why)
    if tokenizer_from is not None:
        roots = link_roots(tokenizer_from.folder, [tokenizer_from.weights])
        for path in sorted(tokenizer_from.folder.iterdir()):
            is_tokenizer = path.name in TOKENIZER_FILES and path.is_file()
            if is_tokenizer and stays_inside(path, roots):
                found[path.name] = Sidecar(path.name, path, why="from the adapter's folder")
    return [found[name] for name in sorted(found)], left


def _describe(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
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
        elif path.is_dir() and (not path.is_symlink() or path.resolve() in roots):
            if depth < MAX_DEPTH:
                found += _files_below(path, roots, left, f"{name}/", depth + 1)
            else:
                left.append((f"{name}/", "nested too deeply"))
        elif path.is_file():
            found.append((path, name))
        else:
            left.append((name, DANGLING_LINK if path.is_symlink() else NO_FILE))
    return found
