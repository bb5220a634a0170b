"""Which files an adapter is in, which scheme it is in, and which of its tensors belong to it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from loratool.adapter.build import adapter_names
from loratool.adapter.config import CONFIG_NAME
from loratool.adapter.keys import are_transposed
from loratool.adapter.model import HISTORY_KEY
from loratool.adapter.recognise import describe_keys, looks_like_model
from loratool.adapter.scheme import Scheme
from loratool.base.config import is_model_folder
from loratool.errors import AdapterError, nearest_name
from loratool.files.checkpoint import PIPELINE_INDEX
from loratool.files.container import WeightsFile
from loratool.files.containers import is_weights
from loratool.files.foreign import foreign_folder, part_of
from loratool.files.missing import missing
from loratool.files.spec import StoredTensor
from loratool.schemes import builtin_schemes, claimed, sidecar_names, weights_names
from loratool.schemes.companions import is_training_state
from loratool.schemes.ranks import weights_of_ranks

__all__ = [
    "ADAPTER_NAME",
    "detect_scheme",
    "distributed",
    "find_weights",
    "forms",
    "naming",
    "selected",
    "unnamed",
]

DISTRIBUTED: Final = ".metadata"
"""What describes the shards of a distributed checkpoint (PyTorch's DCP)."""
MODEL_HINT: Final = (
    "name the adapter, a file or the folder that holds it; to make one of a model and its base: "
    "loratool extract BASE FINETUNED --rank 16 -o OUT"
)
ADAPTER_NAME: Final = "--adapter-name"
DEFAULT_NAME: Final = "default"
"""What PEFT calls the adapter that lies above folders of others."""
SHOWN: Final = 6
LEVELS: Final = 3
"""How deep an adapter is looked for in a folder that holds none, to name its place."""
MOST_FOLDERS: Final = 300


def distributed(path: Path) -> Path | None:
    """Return what describes the shards in a folder, where it is a distributed checkpoint."""
    found = path / DISTRIBUTED
    return found if found.is_file() else None


def find_weights(path: Path, adapter_name: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return the weights file that ``path`` means, and what was found beside it."""
    if not path.exists():
        raise missing(path)
    if not path.is_file() and not path.is_dir():
        raise AdapterError(path, "neither a file nor a folder")
    if path.is_file():
        if path.name in sidecar_names():
            return find_weights(path.parent, adapter_name)
        return path, _of_parts(path)
    if adapter_name and "/" not in adapter_name and (path / adapter_name / CONFIG_NAME).is_file():
        return find_weights(path / adapter_name)
    there = {each.name for each in path.iterdir()}
    others = adapter_folders(path)
    found = [path / name for name in weights_names() if name in there and (path / name).is_file()]
    if not found and (described := distributed(path)) is not None:
        return described, ()
    if not found and (first := weights_of_ranks(path)) is not None:
        return first, ()
    if not found:
        found = sorted(
            file
            for file in path.iterdir()
            if is_weights(file) and file.is_file() and not is_training_state(file)
        )
        if len(found) > 1 and (is_model_folder(path) or _has_index(path)):
            raise AdapterError(path, "is a model, not an adapter", hint=MODEL_HINT)
        if len(found) > 1 and all(part_of(file.name) for file in found):
            raise AdapterError(
                path,
                f"holds an adapter in {len(found)} parts, such as {found[0].name}, which is not "
                "read",
                hint="save it again in one file (PEFT: save_pretrained without shards)",
            )
        if len(found) > 1:
            names = _few([file.name for file in found])
            raise AdapterError(
                path,
                f"several weights files: {names}",
                hint=f"name one of them, such as {shlex.quote(str(found[0]))}",
            )
    if not found:
        what = "holds no adapter: expected adapter_model.safetensors or adapter_model.bin"
        foreign = foreign_folder(path)
        if foreign is not None:
            raise AdapterError(path, f"this is {foreign.what}; it is not read", hint=foreign.hint)
        if (path / PIPELINE_INDEX).is_file() or is_model_folder(path):
            raise AdapterError(path, "is a model, not an adapter", hint=MODEL_HINT)
        if len(others) > 1:
            raise AdapterError(
                path,
                f"holds several adapters, each in a folder: {_few(others)}",
                hint=f"name one, such as {shlex.quote(str(path / others[0]))}",
            )
        inside = path / others[0] if others else _adapter_below(path)
        if inside is not None:
            name = inside.relative_to(path).as_posix()
            raise AdapterError(
                path,
                f"holds no adapter itself, and one in the folder {name!r} in it",
                hint=f"name that: {shlex.quote(str(inside))}",
            )
        raise AdapterError(path, what)
    notes = []
    if len(found) > 1:
        notes.append(f"{found[1].name} lies beside {found[0].name} and was not read")
    if others:
        notes.append(f"more adapters in sub-folders, not read: {', '.join(others)}")
    return found[0], tuple(notes)


def _few(names: Sequence[str]) -> str:
    """Return names, not too many of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _has_index(folder: Path) -> bool:
    return next(folder.glob("*.index*.json"), None) is not None


def _adapter_below(folder: Path) -> Path | None:
    """Return the folder of the only adapter some levels below, if there is just one."""
    level, found, looked = [folder], [], 0
    for _ in range(LEVELS):
        level = [
            each
            for one in level
            for each in sorted(one.iterdir())
            if each.is_dir() and not each.is_symlink() and os.access(each, os.R_OK | os.X_OK)
        ]
        looked += len(level)
        if looked > MOST_FOLDERS:
            return None
        found += [each for each in level if (each / CONFIG_NAME).is_file()]
    return found[0] if len(found) == 1 else None


def _of_parts(path: Path) -> tuple[str, ...]:
    """Return a sentence on a file that is one of several parts by its name."""
    part = part_of(path.name)
    if part is None:
        return ()
    return (f"{path.name} is part {part[0]} of {part[1]}: what the others hold is missing",)


def detect_scheme(file: WeightsFile, schemes: Sequence[Scheme] = ()) -> Scheme:
    """Return the scheme that recognises most factors in ``file``.

    Args:
        file: The weights.
        schemes: The schemes to try; by default all whose claim matches.

    Raises:
        AdapterError: None recognises any; the message shows what the keys look like.
    """
    if len(schemes) == 1:
        if schemes[0].keys.factor_keys(file.tensors):
            return schemes[0]  # as somebody said
        raise AdapterError(
            file.path,
            f"none of its {len(file.tensors)} keys is a factor in the scheme {schemes[0].name!r}",
            hint="leave --from out, and the scheme is detected",
        )
    tried = schemes or tuple(claimed(file.tensors))
    scores = [(scheme.keys.recognise(file.tensors), scheme.priority, scheme) for scheme in tried]
    best, _, scheme = max(scores, key=lambda item: item[:2], default=(0, 0, None))
    if scheme is None or best == 0:
        what = describe_keys(list(file.tensors), forms())
        if looks_like_model(file.tensors, forms()):
            raise AdapterError(file.path, f"is a model, not an adapter: {what}", hint=MODEL_HINT)
        raise AdapterError(file.path, f"no known scheme: {what}", hint=_hint_for(file.tensors))
    _check_rivals(file, [item[2] for item in scores if item[:2] == (best, scheme.priority)])
    return _settled(file, scheme, tried)


def _hint_for(keys: Iterable[str]) -> str | None:
    """Return what to do with a file whose keys are of a tool, and no factors."""
    is_known = any(re.search(pattern, key) for key in keys for pattern, _ in forms())
    return "if its own tool can merge it, do that there, and save the model" if is_known else None


def _check_rivals(file: WeightsFile, schemes: Sequence[Scheme]) -> None:
    """Refuse to choose between schemes that read the very same keys as factors.

    Of those that read different ones, a file mixes some, which is said later.

    Raises:
        AdapterError: There are such schemes.
    """
    seen: dict[frozenset[str], str] = {}
    for scheme in schemes if len(schemes) > 1 else ():
        factors = frozenset(key for key in file.tensors if scheme.keys.factor_keys((key,)))
        other = seen.setdefault(factors, scheme.name)
        if other != scheme.name:
            raise AdapterError(
                file.path,
                f"may be {other!r} or {scheme.name!r}: both read its keys, and neither more of "
                "them",
                hint="say which with --from",
            )


def forms() -> tuple[tuple[str, str], ...]:
    """Return what keys look like that are of a scheme's tool and no factors, with what they are."""
    return tuple(form for scheme in builtin_schemes() for form in scheme.resembles)


def _settled(file: WeightsFile, scheme: Scheme, schemes: Sequence[Scheme]) -> Scheme:
    """Return ``scheme``, or the one of the same keys and turned factors that the file names.

    Raises:
        AdapterError: The factors fit both, and the file does not say which it is.
    """
    rivals = {
        other.name: other
        for other in schemes
        if other.keys.templates == scheme.keys.templates
        and (other is scheme or other.roles.is_transposed != scheme.roles.is_transposed)
    }
    if len(rivals) == 1:
        return scheme
    pairs = scheme.keys.pairs(file.tensors)
    if not pairs or are_transposed(pairs) is not None:
        return scheme
    said = _written_as(file.metadata)
    if said in rivals:
        return rivals[said]
    names = sorted(rivals)
    raise AdapterError(
        file.path,
        f"may be {' or '.join(map(repr, names))}: its factors fit both ways round, and the keys "
        "are the same",
        hint=f"say which: loratool convert ADAPTER --from {names[0]} --to peft -o OUT (or --from "
        f"{' or '.join(names[1:])})",
    )


def _written_as(metadata: Mapping[str, str]) -> str | None:
    """Return the scheme that loratool's own history says the file was written in."""
    try:
        said = json.loads(metadata.get(HISTORY_KEY, "{}"))["options"]["to"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None


def naming(file: WeightsFile, scheme: Scheme, adapter_name: str | None) -> Scheme:
    """Return ``scheme``, or the one in which a file holds an adapter of that name.

    The name of an adapter may be that of a layer, so that keys alone do not tell which it is.
    """
    if adapter_name is None:
        return scheme
    for each in (scheme, *claimed(file.tensors)):
        names = adapter_names({key: each.keys.parse(key) for key in file.tensors})
        if adapter_name in names:
            return each
    return scheme


def unnamed(path: Path, weights: Path, adapter_name: str) -> Iterator[str]:
    """Yield a note where an adapter was asked for by name, and there is one that has none.

    Args:
        path: What was named.
        weights: The weights that it means.
        adapter_name: The name.

    Raises:
        AdapterError: There are others, whose names may be meant.
    """
    if adapter_name in (DEFAULT_NAME, weights.parent.name):
        return
    others = adapter_folders(path) if path.is_dir() else []
    if others:
        names = (DEFAULT_NAME, *others)
        near = nearest_name(adapter_name, names)
        raise AdapterError(
            path,
            f"no adapter {adapter_name!r}: it holds {_few(names)}",
            hint=f"did you mean {ADAPTER_NAME} {near}?" if near is not None else None,
        )
    yield f"it holds one adapter, which has no name; {ADAPTER_NAME} {adapter_name!r} chose nothing"


def adapter_folders(path: Path) -> list[str]:
    """Return the names of folders in ``path`` with a configuration of an adapter."""
    with os.scandir(path) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
    return [name for name in folders if (path / name / CONFIG_NAME).exists()]


def selected(
    file: WeightsFile, scheme: Scheme, adapter_name: str | None, where: Path
) -> tuple[Mapping[str, StoredTensor], str | None, tuple[str, ...]]:
    """Return the tensors of one adapter, where a file holds several; its name, and notes."""
    parsed = {key: scheme.keys.parse(key) for key in file.tensors}
    names = adapter_names(parsed)
    if not names:
        return file.tensors, None, ()
    if adapter_name is not None and adapter_name not in names:
        raise AdapterError(where, f"no adapter {adapter_name!r}: it holds {', '.join(names)}")
    if adapter_name is None and len(names) > 1:
        raise AdapterError(
            where,
            f"holds several adapters: {', '.join(names)}",
            hint="choose one with --adapter-name",
        )
    name = adapter_name or names[0]
    tensors = {
        key: file.tensors[key]
        for key, meaning in parsed.items()
        if meaning is None or meaning.adapter in (None, name)
    }
    left = len(file.tensors) - len(tensors)
    notes = (f"{left} tensors of other adapters in the file were not read",) if left else ()
    return tensors, name, notes
