"""``validate``: everything wrong with an adapter, as coded findings."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from loratool.adapter.findings import SEVERITIES, Finding, Findings, finding
from loratool.base.model import Model, open_model
from loratool.base.refusals import CODE
from loratool.base.trained_on import training_notes
from loratool.errors import AdapterError, LoratoolError, UnsupportedError
from loratool.files.missing import missing
from loratool.loaders import loader_named
from loratool.loaders.checks import check_for
from loratool.schemes import scheme_named
from loratool.schemes.opening import open_adapter
from loratool.verbs.checks.base import check_against_base
from loratool.verbs.checks.config import check_config
from loratool.verbs.checks.tensors import check_tensors

__all__ = ["validate"]


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
    loader = loader_named(target) if target is not None else None
    path = Path(adapter)
    if not path.exists():
        raise missing(path)
    model, unread = _model(base)
    try:
        opened = open_adapter(path, adapter_name=adapter_name)
        follows = scheme_named(opened.scheme).follows
        if model is not None and (follows is not None or opened.unresolved):
            opened = open_adapter(
                path, adapter_name=adapter_name, base_modules=model.paths, base=model.told
            )
    except LoratoolError as error:
        return Findings([finding("LT000", error.where, error.what, error.hint)])
    found: list[Finding] = []
    try:
        found += check_tensors(opened, deep=deep)
        found += check_config(opened)
        found += scheme_named(opened.scheme).settings.findings(opened)
        if loader is not None:
            found += check_for(opened, loader)
    except AdapterError as error:
        found.append(finding("LT015", error.where, error.what, error.hint))
    if model is not None:
        found += check_against_base(opened, model)
    elif unread is not None:
        found.append(unread)
    else:
        notes = training_notes(opened.base_model)
        found += [finding("LT035", opened.path, note) for note in notes]
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
        return open_model(Path(base)), None
    except UnsupportedError as error:
        return None, finding(CODE, error.where, error.what, error.hint)
