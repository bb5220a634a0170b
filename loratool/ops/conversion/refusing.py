"""What cannot be converted, said before anything is decided; and what may be left out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loratool.adapter.model import Adapter, Site
from loratool.adapter.scheme import KeyScheme, ScaleRule
from loratool.errors import AdapterError, OptionError, UnsupportedError
from loratool.ops.merging.mergeable import HARMLESS_INITS

__all__ = ["Dropping", "check_config", "check_names", "check_nesting"]


class Dropping:
    """What ``--drop`` leaves out, and what it has left out so far."""

    def __init__(self, patterns: Sequence[str]) -> None:
        try:
            self.patterns = [re.compile(text) for text in patterns]
        except re.error as error:
            raise OptionError("--drop", f"not a regular expression: {error}") from None
        self.found: list[tuple[str, str]] = []

    def takes(self, name: str) -> bool:
        """Whether ``name`` is left out; then it is noted."""
        if any(pattern.search(name) for pattern in self.patterns):
            self.found.append((name, "dropped as asked"))
            return True
        return False


def check_names(adapter: Adapter) -> None:
    """Refuse to go on with modules whose names are not known.

    Raises:
        AdapterError: There are some; the message lists them.
    """
    if not adapter.unresolved:
        return
    name, paths = next(iter(adapter.unresolved.items()))
    count = len(adapter.unresolved)
    listed = ", ".join(repr(n) for n in list(adapter.unresolved)[:3])
    more = f" and {count - 3} more" if count > 3 else ""
    if paths:
        raise AdapterError(
            adapter.path,
            f"{count} module names could stand for several paths: {name!r} for "
            f"{' or '.join(map(repr, paths[:4]))}",
            hint="give --base, whose names settle it (only its headers are read)",
        )
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
    is_changed = config.init not in HARMLESS_INITS or config.init in ("pissa", "olora")
    if is_changed and not has_initial:
        raise UnsupportedError(
            adapter.path,
            f"init_lora_weights is {config.init!r}: its delta is relative to a base that the "
            "initialisation changed",
            hint="give the adapter as it was initialised: --initial FOLDER",
        )


def check_nesting(sites: Sequence[Site], adapter: Adapter, scheme: KeyScheme) -> None:
    """Refuse what only PEFT's configuration can say about a module.

    Raises:
        UnsupportedError: There is such a module, and the scheme has no configuration of PEFT.
    """
    if scheme.scale is ScaleRule.CONFIG:
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
