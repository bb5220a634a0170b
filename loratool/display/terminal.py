"""A document on a terminal, by way of ``rich``, and as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.display.document import Document
from loratool.display.layout import lines_of
from loratool.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

__all__ = ["Rendered", "plain_text"]


def plain_text(
    document: Document, width: int | None = None, clean: Callable[[object], str] = printable
) -> str:
    """Return a document as text without colours; no line is folded where there is no width."""
    lines = (
        "".join(span.text for span in line).rstrip() for line in lines_of(document, width, clean)
    )
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A document that ``rich`` can print."""

    document: Document
    clean: Callable[[object], str] = printable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield its lines, as wide as there is room for."""
        from rich.text import Text

        for line in lines_of(self.document, options.max_width, self.clean):
            yield Text.assemble(
                *((span.text, span.style) for span in line), no_wrap=True, overflow="ignore"
            )
