"""What a merge writes beside tensors, compared with what lies there: for ``verify``."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import HISTORY_KEY
from loratool.base.config import CONFIG_NAME, QUANTIZATION
from loratool.base.model import Model
from loratool.errors import FileFormatError, LoratoolError
from loratool.files.checkpoint import is_index
from loratool.files.gguf import COUNT, HEAD, GgufFile
from loratool.files.json import parse_json
from loratool.files.sources import size_of, whole
from loratool.plan.history import RECORD_NAME, History
from loratool.plan.model import ModelPlan, OutputFile
from loratool.plan.outcome import Outcome
from loratool.plan.record import read_record
from loratool.plan.sidecar import Sidecar

__all__ = ["check_files", "check_record"]

BLOCK: Final = 1 << 20
LARGEST_SHOWN: Final = 60
OF_A_SAVE: Final = frozenset(
    (
        "transformers_version",
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation_autoset",
        "use_cache",
    )
)
"""What differs with whoever saves a configuration, and decides nothing about weights."""


def check_files(plan: ModelPlan, merged: Model) -> Iterator[Finding]:
    """Yield how configuration, tokenizer, index and metadata differ from what ``plan`` writes."""
    if plan.is_folder and merged.path.is_dir():
        for sidecar in plan.beside():
            yield from _check_sidecar(sidecar, merged.path / sidecar.name, len(merged.shards))
        yield from _surplus(plan, merged)
    yield from _check_metadata(plan, merged)


def check_record(
    history: History | None, folder: Path | None, outcome: Outcome
) -> Iterator[Finding]:
    """Yield that the record is of other inputs; names, options and the card are for people.

    Args:
        history: How the model should have come to be.
        folder: Where it lies, if it is a folder.
        outcome: The digests of the inputs.
    """
    if history is None or folder is None or not (folder / RECORD_NAME).is_file():
        return
    try:
        record = read_record(folder)
    except LoratoolError as error:
        yield finding("LT111", RECORD_NAME, f"cannot be read: {error.what}")
        return
    wanted = history.document(outcome.digests)
    told = [(each.sha256, each.headers_sha256) for each in record.inputs]
    if record.command != wanted["command"] or told != [
        (each.get("sha256"), each.get("headers_sha256")) for each in wanted["inputs"]
    ]:
        yield finding("LT111", RECORD_NAME, "tells of a merge of other inputs")


def _surplus(plan: ModelPlan, merged: Model) -> Iterator[Finding]:
    """Yield the files that no merge has written; tools that look for them would use them."""
    expected = {file.name for file in plan.files} | {one.name for one in plan.others()}
    read = {shard.path for shard in merged.shards}
    for path in sorted(merged.path.rglob("*")):
        name = path.relative_to(merged.path).as_posix()
        is_known = name in expected or path in read or is_index(path.name)
        if not is_known and (path.is_symlink() or not path.is_dir()):
            yield finding("LT111", name, "is not written by the merge")


def _check_sidecar(sidecar: Sidecar, path: Path, shards: int) -> Iterator[Finding]:
    name = sidecar.name
    if not path.is_file():
        is_needed = name == CONFIG_NAME or (is_index(name) and shards > 1)
        if is_needed or not is_index(name):
            code = "LT107" if name == CONFIG_NAME else "LT108" if is_needed else "LT111"
            yield finding(code, name, "is missing")
        return
    if _is_same(sidecar, path):
        return
    code = "LT107" if name == CONFIG_NAME else "LT108" if is_index(name) else "LT110"
    wanted = _content(sidecar)
    try:
        if not name.endswith(".json"):
            raise FileFormatError(path, "not JSON")
        expected = parse_json(wanted, where=name, allow_constants=True)
        data = whole(path).read_bytes()
        if data.startswith(BOM_UTF8) and not wanted.startswith(BOM_UTF8):
            raise FileFormatError(path, "begins with a byte order mark, which JSON may not")
        found: Any = parse_json(data, where=path, allow_constants=True)
    except FileFormatError:
        yield finding(code, name, "differs from what the merge carries over")
        return
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        if not _are_equal(expected, found):
            yield finding(code, name, "differs from what the merge carries over")
        return
    if is_index(name):  # which tensor lies where is another's business, and may differ
        expected, found = (
            {key: value for key, value in each.items() if key != "weight_map"}
            for each in (expected, found)
        )
    yield from _differences(code, name, expected, found)


def _is_same(sidecar: Sidecar, path: Path) -> bool:
    if sidecar.nbytes != size_of(path):
        return False
    if sidecar.source is None:
        return whole(path).read_bytes() == (sidecar.content or b"")
    with whole(sidecar.source).open("rb") as one, whole(path).open("rb") as other:
        while block := one.read(BLOCK):
            if block != other.read(BLOCK):
                return False
    return True


def _content(sidecar: Sidecar) -> bytes:
    return whole(sidecar.source).read_bytes() if sidecar.source else sidecar.content or b""


def _differences(
    code: str, name: str, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield what two objects say otherwise; a model's dtype has two names."""
    expected, found = (_with_one_dtype(each) for each in (expected, found))
    for key in dict.fromkeys((*expected, *found)):
        if key not in found:
            # What is not said is what the model's class takes for granted, mostly.
            yield finding(code if expected[key] is not None else "LT111", name, f"lacks {key}")
        elif key not in expected:
            # With it loaders take plain numbers for codes.
            is_wrong = key in QUANTIZATION and name.endswith(CONFIG_NAME)
            words = f"says {key}, which the merge does not"
            yield finding(code if is_wrong else "LT111", name, words)
        elif not _are_equal(expected[key], found[key]) and key not in OF_A_SAVE:
            if isinstance(expected[key], dict) and isinstance(found[key], dict):
                yield from _differences(code, f"{name}: {key}", expected[key], found[key])
            else:
                yield finding(
                    code,
                    name,
                    f"{key} is {_shown(found[key])}, expected {_shown(expected[key])}",
                )
        elif expected[key] != found[key]:
            yield finding("LT111", name, f"{key} is {_shown(found[key])}")


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two values are spelled alike in JSON: 2 is not 2.0 there, nor is 1 true."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _with_one_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    renamed = dict(config)
    if "torch_dtype" in renamed and "dtype" not in renamed:
        renamed["dtype"] = renamed.pop("torch_dtype")
    return renamed


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LARGEST_SHOWN else f"{text[:LARGEST_SHOWN]}…"


def _check_metadata(plan: ModelPlan, merged: Model) -> Iterator[Finding]:
    """Yield what the headers say otherwise, of files that are called alike."""
    by_name = {
        f"{component}/{shard.path.name}" if component else shard.path.name: shard
        for component, checkpoint in merged.checkpoints.items()
        for shard in checkpoint.shards
    }
    alone = len(plan.files) == len(merged.shards) == 1
    for file in plan.files:
        shard = merged.shards[0] if alone else by_name.get(file.name)
        if shard is None or shard.header is None:
            continue
        # How a file came to be is true of that file alone.
        expected, found = (
            {key: text for key, text in each.items() if key != HISTORY_KEY}
            for each in (file.metadata, shard.metadata)
        )
        for key in dict.fromkeys((*expected, *found)):
            if expected.get(key) != found.get(key):
                is_needed = key == "format" or (isinstance(shard, GgufFile) and _decides(key))
                code = "LT110" if is_needed else "LT111"
                yield finding(
                    code,
                    shard.path.name,
                    f"its metadata says {_shown(found.get(key))} for {_shown(key)}, expected "
                    f"{_shown(expected.get(key))}",
                )
        if found == expected and isinstance(shard, GgufFile) and _has_other_values(file, shard):
            yield finding(
                "LT110", file.name, "its key values are not the base's, such as the vocabulary"
            )


def _decides(key: str) -> bool:
    """Whether a key value of GGUF is more than what the model is called and where it is from."""
    is_plain = key.startswith("general.")
    return not is_plain or key in ("general.architecture", "general.alignment")


def _has_other_values(file: OutputFile, shard: GgufFile) -> bool:
    """Whether key values differ of which no text is told: long arrays."""
    header, raw = file.layout.header, shard.raw_values
    counts = (header[COUNT:HEAD], (shard.header or b"")[COUNT:HEAD])
    return counts[0] != counts[1] or header[HEAD : HEAD + len(raw)] != raw
