"""The exception tree. Every failure that a user can cause or meet is one of these.

An error says where (a file, a tensor, a module), what was found against what was expected, and,
where one exists, the next step. The command line prints it as ``error: <where>: <what>`` and
``hint: <next step>``; nothing else in the package prints.
"""

from __future__ import annotations

__all__ = [
    "SPOKEN",
    "AdapterError",
    "BaseModelError",
    "FileFormatError",
    "HubError",
    "LoratoolError",
    "MergeError",
    "MissingModuleError",
    "OptionError",
    "OutputError",
    "PluginError",
    "UnsupportedError",
    "printable",
    "spoken",
]


class LoratoolError(Exception):
    """The root of all errors that loratool raises on purpose.

    Args:
        where: The file, tensor or module that the error is about.
        what: What was found, and what was expected instead.
        hint: The next step, or ``None`` where there is none to offer.
    """

    def __init__(self, where: object, what: str, *, hint: str | None = None) -> None:
        super().__init__(where, what, hint)
        self.where = str(where)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class FileFormatError(LoratoolError):
    """A file that breaks the rules of its own format, or is not what its name says."""


class HubError(LoratoolError):
    """A model of the Hugging Face hub that is not in the cache and cannot be fetched."""


class AdapterError(LoratoolError):
    """An adapter that cannot be read, or whose parts contradict each other."""


class BaseModelError(LoratoolError):
    """A base model that cannot be read, or that the adapter does not fit."""


class MissingModuleError(BaseModelError):
    """A base model that has no module of the name that an adapter has."""


class UnsupportedError(LoratoolError):
    """Something that is understood but cannot be done rightly, refused by name."""


class MergeError(LoratoolError):
    """A merge whose result would be wrong, empty, or not finite."""


class OptionError(LoratoolError):
    """An option whose value makes no sense, or not together with another."""


class OutputError(LoratoolError):
    """The output cannot be written: it exists, there is no space, or the folder is not there."""


class PluginError(LoratoolError):
    """A plug-in that cannot be imported, or that claims what another one does."""


SPOKEN: dict[str, str] = {}
"""Paths on the disk that stand for something else, and what that is called."""


def spoken(text: str) -> str:
    """Return ``text`` with what paths stand for in their place."""
    for path, name in SPOKEN.items():
        text = text.replace(path, name)
    return text


def printable(text: object) -> str:
    """Return ``text`` with every control, format and bidirectional character escaped.

    Names in files come from strangers; a terminal must show them, not obey them.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in spoken(str(text))
    )
