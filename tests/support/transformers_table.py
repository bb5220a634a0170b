"""Write the names of live models and of files as the installed transformers has them.

    python tests/support/transformers_table.py

writes ``loratool/names/transformers/table.json``; a test compares it with what is installed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import tiny_transformers as tiny
import torch
import transformers
from transformers import conversion_mapping
from transformers.models.auto import modeling_auto

import loratool.names.transformers

__all__ = ["TABLE", "rules", "table", "trees"]

TABLE: Final = Path(loratool.names.transformers.__file__).parent / "table.json"
OPERATIONS: Final = {
    "Chunk": "cut",
    "Split": "cut",
    "Concatenate": "join",
    "MergeModulelist": "list",
    "Interleave": "interleave",
    "PermuteForRope": "rope",
    "Transpose": "transpose",
    "ErnieFuseAndSplitTextVisionExperts": "share",
}
"""transformers' operations in the table's words."""
LEFT_OUT: Final = ("MtpModel", "timm_wrapper", "jev")
"""Models that are parts of others, or of other libraries, with rules for nearly every name."""


def _operation(operation: Any) -> str:
    word = OPERATIONS[type(operation).__name__]
    if word == "cut" and type(operation).__name__ == "Split":
        return f"split {operation.dim}"
    if word in ("cut", "join", "interleave"):
        return f"{word} {operation.dim}"
    if word == "transpose":
        return "transpose if needed" if operation.check_dims else word
    if word == "rope":
        names = operation.permute_layer_names or ()
        return " ".join((word, operation.subconfig_key or ".", *names))
    return word


def _rule(transform: Any) -> list[Any]:
    """Return ``[patterns, targets, operations, offset]``, what is last and empty left out."""
    compiled = transform.compiled_sources.pattern
    branches = []
    for index, source in enumerate(transform.source_patterns):
        pattern = source.replace("*.", r".*\.")
        pattern = next(
            p for p in (pattern + r"(?!\w)", pattern) if f"(?P<g{index}>{p})" in compiled
        )
        branches.append(pattern)
    operations = [_operation(one) for one in getattr(transform, "operations", ())]
    kind = type(transform).__name__
    if kind == "GroupWeightRename":
        operations = ["each"]
    elif kind == "Inkling2IndexOffsetWeightRename":
        operations = [f"offset {transform.offset}"]
    found = [branches, list(transform.target_patterns), operations]
    simple = [part[0] if len(part) == 1 else part for part in found[:2]]
    return [*simple, operations] if operations else simple


def rules() -> dict[str, Any]:
    """Return the rules of each class or model type; the name of another that has the same."""
    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    found: dict[str, Any] = {}
    known: dict[str, str] = {}
    for name in sorted(mapping):
        if name in LEFT_OUT:
            continue
        listed = [_rule(one) for one in mapping[name]]
        text = json.dumps(listed)
        found[name] = known.setdefault(text, name)
        if found[name] == name:
            found[name] = listed
    return found


def trees(model_types: Iterable[str]) -> tuple[dict[str, Any], set[str], set[str]]:
    """Return the models inside of each class, which classes were built, and which were not.

    A class has ``[prefix, [path, class, model type, configuration]…]``; a configuration is the
    dotted path of it in that of the whole. Those inside of what was built are there as well.
    """
    own: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    guessed: dict[str, Any] = {}
    failed = set()
    for model_type in model_types:
        for name in _names(model_type):
            kind = getattr(transformers, name, None)
            if kind is None or name in own:
                continue
            try:
                with warnings.catch_warnings(), torch.device("meta"):
                    warnings.simplefilter("ignore")
                    model = kind._from_config(tiny.tiny_config(model_type))
            except Exception:
                failed.add(name)
                if issubclass(kind, transformers.PreTrainedModel):
                    guessed[name] = _guess(kind, model_type)
                continue
            own[name] = _tree(model)
            for module in model.modules():
                if isinstance(module, transformers.PreTrainedModel) and module is not model:
                    inner.setdefault(type(module).__name__, _tree(module))
    return (
        _needed(guessed | inner | own, plain_classes(), set(rules())),
        set(own),
        failed - set(own),
    )


def plain_classes() -> dict[str, str]:
    """Return the class that each model type has without a head."""
    names = modeling_auto.MODEL_MAPPING_NAMES
    return {
        model_type: name if isinstance(name, str) else name[0]
        for model_type in tiny.model_types()
        if (name := names.get(model_type)) is not None
    }


def _names(model_type: str) -> list[str]:
    mappings = [
        n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES")
    ]
    found = [getattr(modeling_auto, mapping).get(model_type) for mapping in sorted(mappings)]
    listed = [[one] if isinstance(one, str) else list(one or ()) for one in found]
    return list(dict.fromkeys(name for names in listed for name in names if name.isidentifier()))


def _tree(model: Any) -> list[Any]:
    parts = []
    above: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, transformers.PreTrainedModel) or not path:
            continue
        if any(path.startswith(f"{one}.") for one in above):
            continue
        above.append(path)
        key = _key(model.config, module.config)
        parts.append([path, type(module).__name__, module.config.model_type, key])
    return [model.config.model_type, model.base_model_prefix, *parts]


def _guess(kind: Any, model_type: str) -> list[Any]:
    """Return the tree of a class that cannot be built: the plain model under its usual name."""
    prefix = kind.base_model_prefix
    plain = plain_classes().get(model_type)
    parts = (
        [[prefix, plain, model_type, ""]] if prefix and plain not in (None, kind.__name__) else []
    )
    return [model_type, prefix, *parts]


def _key(config: Any, part: Any, depth: int = 0) -> str:
    if part is config or depth > 3:
        return ""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            if value is part:
                return name
            if inner := _key(value, part, depth + 1):
                return f"{name}.{inner}"
    return ""


def _needed(classes: dict[str, Any], auto: dict[str, str], known: set[str]) -> dict[str, Any]:
    """Return those with a part that has rules of its own, or that may be of another class."""

    def matters(part: list[Any], root: str, above: frozenset[str] = frozenset()) -> bool:
        _, name, model_type, key = part
        if name in known or (model_type in known and model_type != root):
            return True
        if key and auto.get(model_type) == name:
            return True
        inner = classes.get(name, ["", ""])[2:] if name not in above else []
        return any(matters(each, root, above | {name}) for each in inner)

    found = {}
    for name, (root, prefix, *parts) in sorted(classes.items()):
        # One that is known by its class leaves its model type to those inside of it.
        if kept := [part for part in parts if matters(part, "" if name in known else root)]:
            found[name] = [prefix, *kept]
    return found


def table() -> dict[str, Any]:
    """Return the whole table."""
    classes, _, failed = trees(tiny.model_types())
    known = set(rules())
    auto = sorted(plain_classes().items())
    return {
        "transformers": transformers.__version__,
        "rules": rules(),
        "classes": classes,
        "auto": {k: v for k, v in auto if {k, v} & known or v in classes},
        "not built": sorted(failed),
    }


def text(found: dict[str, Any]) -> str:
    """Return the table as the file has it: a line for each entry."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(text(table()), encoding="utf-8")
