"""The attention processors of Flux.1, as XLabs' trainer names them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.family import Family
from loratool.names.paths.component import EachAlone
from loratool.names.pipelines import FIRST
from loratool.names.xlabs import native_of, xlabs

__all__ = ["XlabsPaths"]

PREFIX: Final = "diffusion_model."
"""What some tools put before them."""


@dataclass(frozen=True)
class XlabsPaths(EachAlone):
    """``double_blocks.0.processor.qkv_lora1``."""

    has_components: bool = True
    is_narrow: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the processor's name.

        Raises:
            UnsupportedError: It is none of an attention of Flux.1.
        """
        if component not in (None, FIRST) or not context.accepts(local):
            raise UnsupportedError(
                module,
                f"is no attention of Flux.1, and the scheme {context.scheme!r} has names for "
                "nothing else",
                hint="write another scheme, such as with --to kohya",
            )
        return local

    def own(self, family: Family) -> Family:
        """Return Flux.1 by XLabs' names; other families have none."""
        return xlabs() if family.name == "flux" else family.recut(())

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return which modules the processors adapt."""
        paths = {}
        for site in sites:
            native = native_of(site.module.removeprefix(PREFIX))
            paths[site.module] = (f"{FIRST}.{native}",) if native else ()
        return Names(paths, "flux", frozenset((FIRST,)), is_native=True)

    def writes_native(
        self, wish: str | None, families: Sequence[str], *, is_native: bool
    ) -> bool | None:
        """Return that it is so."""
        return True
