"""``validate``: everything wrong with an adapter, as coded findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from loratool.adapter.findings import SEVERITIES, Finding, Findings, finding
from loratool.adapter.model import Adapter
from loratool.base.model import Model, open_model
from loratool.base.refusals import CODE
from loratool.base.trained_on import training_notes
from loratool.errors import AdapterError, HubError, LoratoolError, UnsupportedError
from loratool.files.missing import missing
from loratool.files.places import located
from loratool.loaders import loader_named
from loratool.loaders.checks import check_for
from loratool.loaders.loader import Loader
from loratool.schemes import scheme_named
from loratool.schemes.opening import open_adapter
from loratool.verbs.checks.base import check_against_base
from loratool.verbs.checks.config import check_config
from loratool.verbs.checks.tensors import check_tensors
from loratool.verbs.merging.recorded import base_at_hand

if TYPE_CHECKING:
    from loratool.verbs.checks.many import Validations

__all__ = ["Checks", "validate", "validate_many"]


def validate(
    adapter: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    deep: bool = False,
    adapter_name: str | None = None,
    target: str | None = None,
) -> Findings:
    """Check an adapter, alone or against the base that it is for.

    Args:
        adapter: File or folder.
        base: The model that it should fit; only headers are read.
        deep: Read the tensors too, for NaN, infinity and untrained factors.
        adapter_name: Which adapter, where there are several.
        target: A loader, such as ``vllm``: what it would refuse or misread is found too.

    Returns:
        Findings, errors first. An adapter that cannot be read is a finding like any other.

    Raises:
        LoratoolError: There is nothing at one of the paths, or the base cannot be read.
        OptionError: There is no such loader.
    """
    checks = Checks.of(base=base, deep=deep, adapter_name=adapter_name, target=target)
    path = located(adapter)
    if not path.exists():
        raise missing(path)
    try:
        opened = checks.open(path)
    except HubError:
        raise  # of the network, not of the adapter
    except LoratoolError as error:
        return Findings([finding("LT000", error.where, error.what, error.hint)])
    return checks.findings(opened, fspath(adapter))


def validate_many(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    recursive: bool = False,
    base: str | PathLike[str] | None = None,
    deep: bool = False,
    adapter_name: str | None = None,
    target: str | None = None,
) -> Validations:
    """Check many adapters, one after another; one that cannot be read does not stop the rest.

    Going through the result yields what was found of each, or why it cannot be read, as it is
    read; the base is opened once. Models in folders of adapters are left out, which a note says.

    Args:
        paths: Files and folders. Of a folder that is no adapter, every weights file in it is one,
            and every folder in it that is.
        recursive: Look into all folders.
        base: As in :func:`validate`.
        deep: As in :func:`validate`.
        adapter_name: As in :func:`validate`.
        target: As in :func:`validate`.

    Raises:
        LoratoolError: The base cannot be read, or there is no such loader.
    """
    from loratool.verbs.checks.many import Validations  # one path needs none of it

    several = [paths] if isinstance(paths, str | PathLike) else paths
    checks = Checks.of(base=base, deep=deep, adapter_name=adapter_name, target=target)
    return Validations(several, checks, recursive=recursive)


@dataclass(frozen=True, slots=True)
class Checks:
    """What is checked.

    Attributes:
        loader: What the adapter is for, where that is asked.
        model: The base that it should fit, opened.
        unread: That the base is in codes which are known and not read.
        deep: Whether tensors are read.
        adapter_name: Which adapter, where there are several.
    """

    loader: Loader | None
    model: Model | None
    unread: Finding | None
    deep: bool
    adapter_name: str | None

    @staticmethod
    def of(
        *,
        base: str | PathLike[str] | None,
        deep: bool,
        adapter_name: str | None,
        target: str | None,
    ) -> Checks:
        """Open what adapters are checked against.

        Raises:
            LoratoolError: The base cannot be read, or there is no such loader.
        """
        loader = loader_named(target) if target is not None else None
        return Checks(loader, *_model(base), deep, adapter_name)

    def open(self, path: Path) -> Adapter:
        """Open an adapter, with the names of the base where it takes those.

        Raises:
            LoratoolError: It cannot be read.
        """
        model, name = self.model, self.adapter_name
        opened = open_adapter(path, adapter_name=name)
        follows = scheme_named(opened.scheme).follows
        if model is None or (follows is None and not opened.unresolved):
            return opened
        return open_adapter(path, adapter_name=name, base_modules=model.paths, base=model.told)

    def findings(self, opened: Adapter, called: str | None = None) -> Findings:
        """Return everything that is wrong with an adapter.

        Args:
            opened: The adapter.
            called: What the caller calls it, for hints; by default its path.

        Raises:
            LoratoolError: The base is damaged.
        """
        found: list[Finding] = []
        try:
            found += check_tensors(opened, deep=self.deep)
            found += check_config(opened)
            found += scheme_named(opened.scheme).settings.findings(opened)
            if self.loader is not None:
                found += check_for(opened, self.loader)
        except AdapterError as error:
            found.append(finding("LT015", error.where, error.what, error.hint))
        if self.model is not None:
            found += check_against_base(opened, self.model)
        elif self.unread is not None:
            found.append(self.unread)
        else:
            notes = training_notes(opened.base_model)
            found += [finding("LT035", opened.path, note) for note in notes]
            near = base_at_hand(opened)
            if near is not None:
                what = f"it was not compared with the base that it records, {near}"
                again = f"loratool validate {quote(called or fspath(opened.path))}"
                hint = f"{again} --base {quote(near)}"
                found.append(finding("LT037", opened.path, what, hint))
        found.sort(key=lambda item: (SEVERITIES.index(item.severity), item.code))
        return Findings(dict.fromkeys(found), "nothing is wrong with it")


def _model(base: str | PathLike[str] | None) -> tuple[Model | None, Finding | None]:
    """Return the base, or that it is in codes which are known and not read.

    Raises:
        LoratoolError: It cannot be read.
    """
    if base is None:
        return None, None
    try:
        return open_model(located(base)), None
    except UnsupportedError as error:
        return None, finding(CODE, error.where, error.what, error.hint)
