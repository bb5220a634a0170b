"""Pages that are made from the code: from claims of plug-ins, and from JSON Schemas."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import loratool
from loratool import variants
from loratool.base import layouts
from loratool.cli.main import COMMANDS
from loratool.codecs import codec
from loratool.discovery import Plugins
from loratool.files import containers
from loratool.loaders import loader_named, loader_names
from loratool.names import families

TITLES: Final = {"share": "A share", "error": "A failure"}
"""Of documents that several commands print; they come last."""


def formats() -> str:
    """Return the tables as Markdown."""
    return "\n".join(
        (
            *_table(
                "Key schemes",
                "How an adapter's tensors are called, and where its scale is: `convert --to`, "
                "`--from`. All are read.",
                ("scheme", "what it is", "written", "a key"),
                (
                    (
                        f"`{info.name}`",
                        info.summary,
                        _yes(info.writes),
                        f"`{info.example}`",
                    )
                    for info in loratool.schemes()
                ),
            ),
            *_table(
                "Variants",
                "What the tensors of a module make of its weight.",
                ("in reports", "what it is", "`peft_type`"),
                (
                    (
                        _code(variants.variant_named(name).name),
                        summary,
                        ", ".join(map(_code, claim.get("peft_types", ()))),
                    )
                    for name, summary, claim in _each(variants.FILES)
                ),
            ),
            *_table(
                "Families of diffusion models",
                "Which modules correspond in the two namings of a model: `--family`, `--naming`.",
                ("families", "what is known"),
                (
                    (", ".join(map(_code, claim["families"])), summary)
                    for _, summary, claim in _each(families.FILES)
                ),
            ),
            *_table(
                "Layouts of checkpoints",
                "How the modules of a model lie in its files. [More](bases.md)",
                ("layout", "what it is"),
                (
                    (_code(layouts.FILES.load(name).name), summary)
                    for name, summary in _summaries(layouts.FILES)
                ),
            ),
            *_table(
                "Codecs",
                "How weights are stored that are no plain numbers. [More](quantised.md)",
                ("codec", "what it is", "told by"),
                (
                    (
                        _code(codec.codec_named(claim.codec).name),
                        _summary(codec.FILES, claim.codec),
                        ", ".join(map(_code, (*claim.suffixes, *claim.dtypes, *claim.methods))),
                    )
                    for claim in codec.claims()
                ),
            ),
            *_table(
                "Containers",
                "Files that hold tensors.",
                ("files", "what it is"),
                (
                    (", ".join(map(_code, claim["suffixes"])), summary)
                    for _, summary, claim in _each(containers.FILES)
                ),
            ),
            *_table(
                "Loaders",
                "Programs whose rules are known: `validate --for`, `convert --for`.",
                ("loader", "what is written for it", "scheme", "it reads"),
                (
                    (
                        f"{_code(name)} ({loader.title})",
                        loader.summary,
                        _code(loader.scheme),
                        ", ".join(map(_code, sorted(loader.reads))),
                    )
                    for name, loader in ((name, loader_named(name)) for name in loader_names())
                ),
            ),
        )
    )


def _table(
    title: str, words: str, head: Sequence[str], rows: Iterable[Sequence[str]]
) -> Iterator[str]:
    yield f"## {title}\n\n{words}\n"
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in row)} |"
    yield ""


def _each(plugins: Plugins) -> Iterator[tuple[str, str, dict[str, list[str]]]]:
    for name, claim in plugins.claims().items():
        yield name, _summary(plugins, name), claim


def _summaries(plugins: Plugins) -> Iterator[tuple[str, str]]:
    for name in plugins.names():
        yield name, _summary(plugins, name)


def _summary(plugins: Plugins, name: str) -> str:
    """Return the first paragraph of what a plug-in says of itself."""
    said = importlib.import_module(f"{plugins.package}.{name}").__doc__ or ""
    return " ".join(said.strip().partition("\n\n")[0].split()).replace("``", "`")


def _code(text: str) -> str:
    return f"`{text}`"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def documents() -> str:
    """Return what is in the JSON documents of each command, as Markdown."""
    parts = []
    files = (Path(loratool.__file__).parent / "cli" / "schemas").glob("*.json")
    for file in sorted(
        files, key=lambda file: (file.stem == "error", file.stem in TITLES, file.stem)
    ):
        schema = json.loads(file.read_text("utf-8"))
        title = TITLES.get(file.stem, file.stem)
        parts.append(f"## {title}\n")
        alternatives = schema.get("anyOf", [schema])
        for alternative in alternatives:
            if len(alternatives) > 1:
                parts.append(f"**{_told(alternative)}**\n")
            parts += ["| key | type | what it is |", "|---|---|---|"]
            parts += [
                f"| {_code(path)}{' (may be missing)' if optional else ''} | {kind} | {words} |"
                for path, kind, words, optional in _keys(alternative, "")
            ]
            parts.append("")
        titles = [TITLES.get(other, other).lower() for other in schema.get("also", ())]
        if titles:
            links = " or ".join(f"[{title}](#{title.replace(' ', '-')})" for title in titles)
            parts.append(f"With `--shards` or `--finish` it may be the document of {links}.\n")
    return "\n".join(parts)


def functions() -> str:
    """Return what mkdocstrings is to show of the package, by kind."""
    found: dict[str, list[str]] = {"Functions": [], "Reports": [], "Errors": []}
    for name in sorted(loratool.__all__, key=_rank):
        value = getattr(loratool, name)
        if isinstance(value, type) and issubclass(value, Exception):
            continue  # with all of the tree
        kind = "Reports" if isinstance(value, type) else "Functions"
        found[kind].append(f"::: {value.__module__}.{name}")
    found["Functions"].append("::: loratool.live.attach")
    found["Errors"].append("::: loratool.errors")
    return "\n".join(f"## {title}\n\n" + "\n".join(names) + "\n" for title, names in found.items())


def _rank(name: str) -> tuple[int, str]:
    """Order functions as the commands are, and all else by name."""
    return (COMMANDS.index(name) if name in COMMANDS else len(COMMANDS), name)


def _told(schema: dict[str, Any]) -> str:
    kind = schema.get("properties", {}).get("kind", {}).get("const")
    if kind is not None:
        return f"of {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    if "description" in schema:
        return str(schema["description"])
    if "items" in schema.get("properties", {}):
        return "of several paths"
    return "of one path"


def _keys(schema: dict[str, Any], before: str) -> Iterator[tuple[str, str, str, bool]]:
    required = schema.get("required", ())
    for key, value in schema.get("properties", {}).items():
        path = f"{before}{key}"
        words = value.get("description", "").replace("|", "&#124;")
        yield path, _kind(value), words, key not in required
        yield from _keys(value, f"{path}.")
        inside = value.get("items", {})
        for each in inside.get("anyOf", [inside]):
            yield from _keys(each, f"{path}[].")


def _kind(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"always {_code(json.dumps(schema['const']))}"
    if "enum" in schema:
        return ", ".join(_code(json.dumps(value)) for value in schema["enum"])
    kinds = schema.get("type", "any")
    words = kinds if isinstance(kinds, str) else " or ".join(kinds)
    if words == "array" and "items" in schema:
        inside = schema["items"]
        words += " of " + " or ".join(_kind(each) for each in inside.get("anyOf", [inside]))
    return words
