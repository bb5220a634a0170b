"""The exception tree. Every failure that a user can cause or meet is one of these.

An error says where (a file, a tensor, a module), what was found against what was expected, and,
where one exists, the next step. It carries a code, that of its class or, where ``validate`` finds
the same fault, the finding's. The command line prints it as ``error: <where>: <what>`` and
``hint: <next step>``, or as JSON; nothing else in the package prints.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

__all__ = [
    "CODES",
    "SPOKEN",
    "AdapterError",
    "BaseModelError",
    "EngineError",
    "FileFormatError",
    "FullDiskError",
    "HubError",
    "LoratoolError",
    "MergeError",
    "MissingFileError",
    "MissingFolderError",
    "MissingModelError",
    "MissingModuleError",
    "OptionError",
    "OutputDeniedError",
    "OutputError",
    "OutputExistsError",
    "PluginError",
    "ReadingDeniedError",
    "StoreError",
    "UnreadableError",
    "UnsupportedError",
    "nearest_name",
    "printable",
    "spoken",
    "unreadable",
]

CODES: Final = {
    "LT300": "it cannot be done",
    "LT301": "there is nothing at the path",
    "LT302": "the system does not let it be read",
    "LT303": "the adapter cannot be used",
    "LT304": "the base cannot be used, or does not fit",
    "LT305": "understood, and not supported",
    "LT306": "the merge would be wrong",
    "LT307": "an option or argument is wrong",
    "LT308": "the output cannot be written",
    "LT309": "the output exists already",
    "LT310": "the folder of the output does not exist",
    "LT311": "the output may not be written",
    "LT312": "the disk is full",
    "LT313": "a plug-in is wrong",
    "LT314": "the hub does not give it",
    "LT315": "the store does not give it",
    "LT316": "the executor does not carry it out",
    "LT320": "out of memory",
    "LT321": "no more threads",
    "LT322": "interrupted",
    "LT323": "terminated",
    "LT324": "the system refused",
    "LT399": "a bug",
}
"""Codes that are no finding's, and what they are called. ``docs/findings.md`` explains each."""


class LoratoolError(Exception):
    """The root of all errors that loratool raises on purpose.

    Those that are also an ``OSError`` have its ``errno``, ``strerror`` and ``filename``.

    Args:
        where: The file, tensor or module that the error is about.
        what: What was found, and what was expected instead.
        hint: The next step, or ``None`` where there is none to offer.
        code: That of the finding which is the same fault; by default that of the class.
        number: The system's ``errno``, where it is another than that of the class.
    """

    code: str = "LT300"
    number: ClassVar[int | None] = None

    def __init__(
        self,
        where: object,
        what: str,
        *,
        hint: str | None = None,
        code: str | None = None,
        number: int | None = None,
    ) -> None:
        Exception.__init__(self, where, what, hint)  # not OSError's, which gives these a meaning
        self.where = spoken(str(where))
        self.what = spoken(what)
        self.hint = hint
        if code is not None:
            self.code = code
        if isinstance(self, OSError):
            _fill(self, self.number if number is None else number, self)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"

    def __repr__(self) -> str:
        hint = f", hint={self.hint!r}" if self.hint is not None else ""
        return f"{type(self).__name__}({self.where!r}, {self.what!r}{hint}, code={self.code!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.where, self.what, self.hint), self.__dict__

    def as_json(self) -> dict[str, str | None]:
        """Return the keys that the command line's JSON promises."""
        return {"code": self.code, "where": self.where, "message": self.what, "hint": self.hint}


def _fill(error: OSError, number: int | None, own: LoratoolError) -> None:
    """Give an error what Python's own of the system have."""
    error.errno, error.strerror, error.filename = number, own.what, own.where


def _again(kind: type[LoratoolError], where: str, what: str, hint: str | None) -> LoratoolError:
    """Return the error that was pickled."""
    return kind(where, what, hint=hint)


class FileFormatError(LoratoolError):
    """A file that breaks the rules of its own format, or is not what its name says."""

    code = "LT000"


class UnreadableError(FileFormatError, OSError):
    """A file that the system does not let be read."""

    code = "LT302"
    number = errno.EIO


class MissingFileError(UnreadableError, FileNotFoundError):
    """A path with nothing at it."""

    code = "LT301"
    number = errno.ENOENT


class ReadingDeniedError(UnreadableError, PermissionError):
    """A file or folder that this user may not read."""

    number = errno.EACCES


class HubError(LoratoolError):
    """A model of the Hugging Face hub that is not in the cache and cannot be fetched."""

    code = "LT314"


class StoreError(LoratoolError):
    """A file of an object store or web server that cannot be had."""

    code = "LT315"


class MissingModelError(HubError, MissingFileError):
    """A name of which there is nothing: on the disk, in the cache of the hub, or there."""

    code = "LT301"


class EngineError(LoratoolError):
    """What carries calls out cannot be reached, or takes none any more."""

    code = "LT316"


class AdapterError(LoratoolError):
    """An adapter that cannot be read, or whose parts contradict each other."""

    code = "LT303"


class BaseModelError(LoratoolError):
    """A base model that cannot be read, or that the adapter does not fit."""

    code = "LT304"


class MissingModuleError(BaseModelError):
    """A base model that has no module of the name that an adapter has."""

    code = "LT021"


class UnsupportedError(LoratoolError):
    """Something that is understood but cannot be done rightly, refused by name."""

    code = "LT305"


class MergeError(LoratoolError):
    """A merge whose result would be wrong, empty, or not finite."""

    code = "LT306"


class OptionError(LoratoolError, ValueError):
    """An option whose value makes no sense, or not together with another."""

    code = "LT307"

    @classmethod
    def none_of(cls, option: str, given: object, known: Iterable[str]) -> OptionError:
        """Return the error for a value that is none of those there are, with the nearest one.

        Args:
            option: The option, such as ``--to``.
            given: Its value.
            known: What it may be.
        """
        names = tuple(known)
        near = nearest_name(str(given), names)
        hint = f"did you mean {option} {near}?" if near is not None else None
        return cls(option, f"{given!r} is none of {', '.join(names)}", hint=hint)


class OutputError(LoratoolError):
    """The output cannot be written: it exists, there is no space, or the folder is not there."""

    code = "LT308"


class OutputExistsError(OutputError, FileExistsError):
    """Something is at the output's place, and is not to be replaced."""

    code = "LT309"
    number = errno.EEXIST


class MissingFolderError(OutputError, FileNotFoundError):
    """The folder that the output would be in does not exist."""

    code = "LT310"
    number = errno.ENOENT


class OutputDeniedError(OutputError, PermissionError):
    """This user may not write there."""

    code = "LT311"
    number = errno.EACCES


class FullDiskError(OutputError, OSError):
    """There is no room for the output."""

    code = "LT312"
    number = errno.ENOSPC


class PluginError(LoratoolError):
    """A plug-in that cannot be imported, or that claims what another one does."""

    code = "LT313"


def nearest_name(given: str, known: Sequence[str]) -> str | None:
    """Return the name that is spelled most like the given one, if one is near."""
    from difflib import get_close_matches

    plain = {name.casefold().replace("_", "-"): name for name in known}
    near = get_close_matches(given.casefold().replace("_", "-"), plain, n=1)
    return plain[near[0]] if near else None


def unreadable(where: object, error: OSError, *, hint: str | None = None) -> UnreadableError:
    """Return what is to be raised where the system refused to read ``where``."""
    kind = UnreadableError
    if isinstance(error, FileNotFoundError):
        kind = MissingFileError
    elif isinstance(error, PermissionError):
        kind = ReadingDeniedError
    what = f"cannot be read: {error.strerror or error}"
    return kind(where, what, hint=hint, number=error.errno)


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
