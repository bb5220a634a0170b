"""Options whose values have names: listed, completed, and corrected where one is misspelled."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.cli.synonyms import SCHEME_SYNONYMS
from loratool.errors import OptionError, printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = [
    "COMPONENT",
    "DEVICE",
    "DTYPE",
    "EXECUTOR",
    "FAMILY",
    "LOADER",
    "SCHEME",
    "Named",
    "choice",
]

DEVICES: Final = re.compile(r"auto|cpu|cuda(:\d+)?(,cuda:\d+)*")


GPU: Final = dict.fromkeys(("gpu", "nvidia", "cuda:"), "cuda")


class Named(click.ParamType[str]):
    """A value with a name out of several, which are listed when somebody asks.

    Attributes:
        name: What stands for it in ``--help``, in small letters.
        known: Returns the names; nothing is imported for them before.
        meant: What others call one of them.
        form: What else it may be, where names are only the usual values.
    """

    def __init__(
        self,
        name: str,
        known: Callable[[], Sequence[str]],
        meant: dict[str, str] | None = None,
        form: re.Pattern[str] | None = None,
    ) -> None:
        self.name = name
        self.known = known
        self.meant = meant or {}
        self.form = form

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return tuple(self.known())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        given = str(value)
        if param is not None and given == param.default:
            return given  # without a look at the names, which may import much
        names = self.names
        if given in names or (self.form is not None and self.form.fullmatch(given)):
            return given
        option = max(param.opts, key=len) if param is not None else self.name
        meant = self.meant.get(given.casefold())
        if meant is not None and meant in names:
            raise OptionError(
                option, f"'{printable(given)}' is called {meant} here", hint=f"{option} {meant}"
            )
        raise OptionError.none_of(option, given, names)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that a word may become."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.names if name.startswith(incomplete)]


class _Engine(Named):
    """A name of an engine. The processes of an MPI job part here, before anything else is done."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from loratool.engines.names import MPI, parse_name

        given = str(value)
        if parse_name(given).kind == MPI and (ctx is None or not ctx.resilient_parsing):
            from loratool.engines.mpi import join

            join()
        return given


def choice(name: str, place: str) -> Named:
    """Return what takes one of the names that a verb has.

    Args:
        name: What stands for it.
        place: Where they are, such as ``loratool.verbs.compose:METHODS``; imported only when
            somebody asks for them.
    """
    module, _, constant = place.partition(":")

    def known() -> Sequence[str]:
        found: Sequence[str] = getattr(import_module(module), constant)
        return found

    return Named(name, known)


def _schemes() -> Sequence[str]:
    from loratool.schemes import scheme_names

    return scheme_names()


def _loaders() -> Sequence[str]:
    from loratool.loaders import loader_names

    return loader_names()


def _families() -> Sequence[str]:
    from loratool.names.families import known_families

    return known_families()


def _components() -> Sequence[str]:
    from loratool.names.pipelines import COMPONENTS

    return COMPONENTS


def _dtypes() -> Sequence[str]:
    from loratool.files.dtypes import OUTPUT_DTYPES, SHORT_DTYPES

    return (*OUTPUT_DTYPES, *SHORT_DTYPES)


def _engines() -> Sequence[str]:
    from loratool.engines.names import NAMES

    return NAMES


DTYPES: Final = {
    "bf": "bfloat16",
    "float": "float32",
    "full": "float32",
    "half": "float16",
    "f16": "float16",
    "f32": "float32",
    "b16": "bfloat16",
}
EXECUTOR: Final = _Engine("engine", _engines)
DTYPE: Final = Named("dtype", _dtypes, DTYPES)
SCHEME: Final = Named("scheme", _schemes, SCHEME_SYNONYMS)
LOADER: Final = Named("loader", _loaders)
FAMILY: Final = Named("family", _families)
COMPONENT: Final = Named("component", _components)
DEVICE: Final = Named("device", lambda: ("auto", "cpu", "cuda", "cuda:0", "cuda:1"), GPU, DEVICES)
