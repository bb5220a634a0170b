"""What cannot be converted, said before anything is decided; and what may be left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loratool.adapter.model import Adapter, Site
from loratool.adapter.scheme import Scheme
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.schemes import scheme_named

__all__ = ["Dropping", "check_config", "check_names", "check_nesting", "check_options"]


class Dropping:
    """What ``--drop`` leaves out, and what it has left out so far."""

    def __init__(self, patterns: Sequence[str]) -> None:
        try:
            self.patterns = [re.compile(text) for text in patterns]
        except re.error as error:
            raise OptionError("--drop", f"not a regular expression: {error}") from None
        self.found: list[tuple[str, str]] = []
        self._used: set[str] = set()

    def takes(self, name: str) -> bool:
        """Whether ``name`` is left out; then it is noted."""
        hits = [pattern.pattern for pattern in self.patterns if pattern.search(name)]
        if hits:
            self.found.append((name, "dropped as asked"))
            self._used.update(hits)
        return bool(hits)

    def unused(self) -> Iterator[str]:
        """Yield a note on every pattern that means nothing."""
        for pattern in self.patterns:
            if pattern.pattern not in self._used:
                yield f"--drop {pattern.pattern!r} means no module, and no tensor that is no delta"


def check_options(scheme: Scheme, *, rank: int | None, to_lora: bool, name: str | None) -> None:
    """Refuse options that mean nothing without another, or cannot be written.

    Raises:
        OptionError: There is one.
    """
    if rank is not None and not to_lora:
        raise OptionError("--rank", "is that of what --to-lora approximates, and needs it")
    if (
        scheme.keys.names_adapter
        and name is not None
        and (not name or any(char in name for char in "./\\"))
    ):
        raise OptionError("--name", f"{name!r} is no name of an adapter: no dots, no slashes")


def check_names(adapter: Adapter, scheme: Scheme | None = None) -> None:
    """Refuse to go on with modules whose names are not known, where they have to be.

    Args:
        adapter: The adapter.
        scheme: The scheme to write; in their own scheme flattened names stay what they are.

    Raises:
        AdapterError: There are some; the message lists them.
    """
    if adapter.mixed:
        count = len(adapter.mixed)
        raise AdapterError(
            adapter.path,
            f"mixes schemes: it was read as {adapter.scheme!r}, and {count} of its keys are "
            f"factors in another, such as {adapter.mixed[0]!r}",
            hint="convert one part at a time, leaving out the other with --skip",
        )
    own = scheme_named(adapter.scheme)
    is_kept = scheme is not None and scheme.name == own.name and own.paths.keeps_unknown
    if not adapter.unresolved or is_kept:
        return
    name, paths = next(iter(adapter.unresolved.items()))
    count = len(adapter.unresolved)
    listed = ", ".join(repr(n) for n in list(adapter.unresolved)[:3])
    more = f" and {count - 3} more" if count > 3 else ""
    if len(paths) == 1:
        raise AdapterError(
            adapter.path,
            f"{count} module names mean the same as another: {listed}{more} ({paths[0]!r})",
            hint="leave out all but one with --skip",
        )
    if paths:
        raise AdapterError(
            adapter.path,
            f"{count} module names could stand for several paths: {name!r} for "
            f"{' or '.join(map(repr, paths[:4]))}",
            hint="give --base, whose names settle it (only its headers are read)",
        )
    reason = own.paths.refusal(count)
    if reason is not None:
        raise AdapterError(adapter.path, reason)
    raise AdapterError(
        adapter.path,
        f"{count} module names are not known: {listed}{more}",
        hint="give --base, whose names settle it (only its headers are read), or leave them out "
        "with --skip",
    )


def check_config(adapter: Adapter, *, has_initial: bool) -> None:
    """Refuse what no weights equal, or whose base an initialisation changed.

    Raises:
        UnsupportedError: It is such an adapter.
    """
    config = adapter.config
    if config is None:
        return
    for field, words in (
        ("alora_invocation_tokens", "an activated LoRA, which acts after its tokens only"),
        ("arrow_config", "an Arrow router, which mixes adapters by input"),
        ("layer_replication", "for a stack of replicated layers, which only PEFT can name"),
    ):
        if config.flag(field):
            raise UnsupportedError(adapter.path, f"{field}: it is {words}")
    if config.init.changes_base and not has_initial:
        raise UnsupportedError(
            adapter.path,
            config.init.refusal,
            hint="give the adapter as it was initialised: --initial FOLDER",
        )


def check_nesting(sites: Sequence[Site], adapter: Adapter, scheme: Scheme) -> None:
    """Refuse what only PEFT's configuration can say about a module.

    Raises:
        UnsupportedError: There is such a module, and the scheme has no configuration of PEFT.
    """
    if scheme.settings.names_targets:
        return
    for site in sites:
        if site.parameters or site.nesting:
            what = (
                "adapts a raw parameter (target_parameters), such as fused experts"
                if site.parameters
                else "is inside an nn.MultiheadAttention"
            )
            raise UnsupportedError(
                f"{adapter.path}: {site.label}",
                f"{what}, which only PEFT's configuration can say",
                hint="leave it out with --skip, or merge the adapter into its base",
            )
