"""The card of an output, ``README.md``: begun where there is none, renewed where there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loratool.errors import LoratoolError, printable
from loratool.files.front_matter import with_fields
from loratool.files.sources import size_of, whole
from loratool.files.yaml import read_front_matter
from loratool.plan.history import History
from loratool.plan.outcome import Outcome
from loratool.plan.recipe_text import ARGUMENTS, format_step, step_of

__all__ = ["ADAPTER", "CARD_NAME", "Card", "hub_name", "licence_of", "read_card"]

CARD_NAME: Final = "README.md"
ADAPTER: Final = "adapter"
LICENCE: Final = ("license", "license_name", "license_link")
LARGEST: Final = 1 << 20
BEGIN: Final = "<!-- loratool: what follows is written anew by each command -->"
END: Final = "<!-- loratool: end -->"
OURS: Final = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
AT_COMMIT: Final = re.compile(r"@[0-9a-f]{40}")
HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def read_card(path: Path) -> str | None:
    """Return the text of a card; ``None`` where there is none that can be edited."""
    try:
        if size_of(path) > LARGEST:
            return None
        return whole(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def licence_of(folder: Path) -> dict[str, str]:
    """Return the fields of the card in a folder that say under which licence it is, if any do."""
    try:
        said = read_front_matter(folder / CARD_NAME)
    except LoratoolError:
        return {}
    found = {key: said[key] for key in LICENCE if isinstance(said.get(key), str)}
    return found if "license" in found else {}


def hub_name(name: object) -> str | None:
    """Return the name of a base where it may be that of a repository, and is no absolute path."""
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card of an output says.

    Attributes:
        relation: What the output is to its base: ``adapter`` or ``merge``.
        base_model: The repository of the base, where known.
        library: What loads it, where known.
        former_library: What loaded the input, where that is another one.
        licence: Fields of the card that say under which licence it is, where they are known.
        tags: What it is found by.
        existing: The card that the input came with, if it did.
    """

    relation: str
    base_model: str | None = None
    library: str | None = None
    former_library: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ("lora", "loratool")
    existing: str | None = None

    def content(self, history: History, outcome: Outcome) -> bytes:
        """Return the card of what was made as ``history`` and ``outcome`` tell."""
        fields = {"base_model_relation": self.relation}
        if self.base_model is not None:
            fields = {"base_model": self.base_model} | fields
        library = {"library_name": self.library} if self.library is not None else {}
        stale = {"library_name": self.former_library} if self.former_library is not None else {}
        text = self.existing
        if text is None:
            names = [printable(AT_COMMIT.sub("", source.name)) for source in history.inputs]
            text = f"\n# {' + '.join(names) or ADAPTER}\n"
        section = "\n".join([BEGIN, *self._section(history, outcome), END])
        if OURS.search(text):
            text = OURS.sub(lambda match: section, text, count=1)
        else:
            text = f"{text.rstrip()}\n\n{section}\n"
        return with_fields(
            text,
            fields,
            defaults={**self.licence, **library},
            lists={"tags": self.tags},
            stale=stale,
        ).encode()

    def _section(self, history: History, outcome: Outcome) -> list[str]:
        """Return what was done: in words, and as the recipe that does it again."""
        document = history.document(outcome.digests)
        words = f"Written by loratool {document['version']} with `{history.verb}`"
        retention = outcome.weights.retention
        if self.relation == ADAPTER:  # as long whatever it is, so that a plan tells the size
            words += f"; relative error of the deltas {outcome.total_error:.1e}"
        elif retention is not None:
            words += f"; {min(retention, 1):.1%} of the update survived rounding"
        if history.verb not in ARGUMENTS:
            return [f"{words}."]
        recipe = format_step(step_of(document))
        return [f"{words}.", "", "```toml", recipe.rstrip("\n"), "```"]
