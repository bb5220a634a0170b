"""What cannot be converted, said before anything is decided; and what may be left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loratool.adapter.model import Adapter, Site
from loratool.adapter.scheme import Scheme
from loratool.errors import OptionError, UnsupportedError

__all__ = ["Dropping", "check_config", "check_nesting", "check_options"]


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


def check_config(adapter: Adapter, scheme: Scheme, *, has_initial: bool) -> None:
    """Refuse what no weights equal, or whose base an initialisation changed.

    Raises:
        UnsupportedError: It is such an adapter.
    """
    config = adapter.config
    if adapter.is_conditional and not scheme.settings.keeps_invocation:
        raise UnsupportedError(
            adapter.path,
            "alora_invocation_tokens: it is an activated LoRA, which acts after its tokens only",
        )
    if config is None:
        return
    for field, words in (
        ("arrow_config", "an Arrow router, which mixes adapters by input"),
        ("layer_replication", "for a stack of replicated layers, which only PEFT can name"),
    ):
        if config.flag(field):
            raise UnsupportedError(adapter.path, f"{field}: it is {words}")
    if config.init.changes_base and not has_initial:
        named = " --to peft" if scheme.paths.is_narrow else ""  # which has few modules' names
        raise UnsupportedError(
            adapter.path,
            config.init.refusal,
            hint=f"give the adapter as it was initialised, with --initial FOLDER{named}",
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
                hint="merge the adapter into its base: loratool merge BASE ADAPTER -o OUT",
            )
