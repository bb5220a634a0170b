"""What makes a report show itself: on a terminal, in a notebook, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratool.display.document import Document
    from loratool.display.terminal import Rendered

__all__ = ["Shown"]


class Shown:
    """A report that people see the same everywhere: what :meth:`document` says."""

    __slots__ = ()

    def document(self) -> Document:
        """Return what people see of it."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return it as text."""
        from loratool.display.terminal import plain_text

        return plain_text(self.document())

    def __rich__(self) -> Rendered:
        """Return what ``rich`` prints of it."""
        from loratool.display.terminal import Rendered

        return Rendered(self.document())

    def _repr_html_(self) -> str:
        """Return what a notebook shows of it."""
        from loratool.display.html import fragment

        return fragment(self.document())

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        """Return both for IPython, which would otherwise ask a dataclass for its ``repr``."""
        return {"text/plain": str(self), "text/html": self._repr_html_()}
