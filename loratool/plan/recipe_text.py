"""A command as a step of a recipe: TOML that ``loratool run`` carries out again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["ARGUMENTS", "HEADERS", "SHA256", "format_step", "step_of"]

ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "convert": ("adapter",),
    "compose": ("adapters",),
    "rescale": ("adapter",),
    "truncate": ("adapter",),
    "extract": ("base", "finetuned"),
    "merge": ("base", "adapters"),
}
"""What the inputs of a command are called, in order; a name in the plural is that of all others."""
SHA256: Final = "_sha256"
HEADERS: Final = "_headers_sha256"
"""What ends the names of the keys with digests of inputs."""
BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def step_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the step that carries out again what a record tells, without its output.

    Args:
        document: What :meth:`History.document` returns.
    """
    verb = document["command"]
    step: dict[str, Any] = {"verb": verb}
    digests: dict[str, Any] = {}
    left = list(document["inputs"])
    for name in ARGUMENTS.get(verb, ()):
        mine = left if name.endswith("s") else left[:1]
        left = left[len(mine) :]
        step[name] = _one_or_all([each["name"] for each in mine], name)
        for key, end in (("sha256", SHA256), ("headers_sha256", HEADERS)):
            found = [each[key] for each in mine if each.get(key) is not None]
            if found and len(found) == len(mine):
                digests[f"{name}{end}"] = _one_or_all(found, name)
    for key, value in document["options"].items():
        step[key.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
    return step | digests


def _one_or_all(values: Sequence[str], name: str) -> str | list[str]:
    return list(values) if name.endswith("s") else next(iter(values), "")


def format_step(step: Mapping[str, Any]) -> str:
    """Return a step as TOML."""
    lines = ["[[step]]", *(f"{_key(key)} = {_value(value)}" for key, value in step.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _text(value)
        case float() if not math.isfinite(value):
            return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
    return _text(str(value))


def _text(text: str) -> str:
    """Return a basic string: whatever a terminal or TOML would take for more is escaped."""
    made = []
    for char in text:
        if char in '"\\':
            made.append(f"\\{char}")
        elif char.isprintable():
            made.append(char)
        else:
            code = ord(char)
            made.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return f'"{"".join(made)}"'
