"""A scheme that nobody uses: transposed, colons for dots, strengths in a file of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.part import Part
from loratool.adapter.scaling import Scaling
from loratool.adapter.scheme import Context, Home, Names, Scheme, Written
from loratool.adapter.slots import Slot
from loratool.errors import AdapterError
from loratool.names.paths.component import EachAlone
from loratool.names.paths.dotted import from_paths
from loratool.schemes.parts.roles import FactorsOfTable, Roles
from loratool.schemes.parts.settings import Settings
from loratool.values.expr import Constant

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"\.turned_(in|out)$",
    "weights": ("turned.safetensors",),
    "sidecar": "turned.json",
}


@dataclass(frozen=True)
class ColonPaths(EachAlone):
    """Colons for dots."""

    follows_base: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        return module.replace(".", ":")

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        modules = dict.fromkeys(site.module for site in sites)
        dotted = {module: module.replace(":", ".") for module in modules}
        found = from_paths(tuple(dotted.values()))
        return replace(found, paths={module: (path,) for module, path in dotted.items()})


@dataclass(frozen=True)
class Strengths:
    """One number for each module, beside the tensors."""

    has_one_rank: bool = False

    def place(self, parts: Sequence[Part], *, fold: bool) -> list[Part]:
        if not fold:
            return list(parts)
        return [part.factored(part.down, part.up.scaled(part.scale), scale=1.0) for part in parts]

    def record(self, part: Part) -> Constant | None:
        return None


class TurnedSettings(Settings):
    """``turned.json``."""

    def read(
        self,
        sites: tuple[Site, ...],
        metadata: Mapping[str, str],
        sidecar: Mapping[str, Any] | None,
        where: Path,
    ) -> tuple[Site, ...]:
        strengths = (sidecar or {}).get("strengths", {})
        made = []
        for site in sites:
            found = strengths.get(site.module)
            if not isinstance(found, float):
                raise AdapterError(where, f"has no strength for {site.module!r}")
            made.append(
                replace(site, scaling=Scaling(found * site.rank, site.rank, multiplier=found))
            )
        return tuple(made)

    def config(self, written: Written) -> dict[str, Any] | None:
        return {"strengths": {item.name: float(item.part.scale) for item in written.modules}}

    def metadata(self, written: Written) -> dict[str, str]:
        return {"turned": str(len(written.modules))}


SCHEME = Scheme(
    name="turned",
    summary="a scheme that nobody uses",
    example="model:layers:0:self_attn:q_proj.turned_in",
    keys=KeyTable(
        modules=r"[^.]+",
        templates=(
            Template("{module}.turned_in", Slot.DOWN),
            Template("{module}.turned_out", Slot.UP),
        ),
    ),
    paths=ColonPaths(),
    scale=Strengths(),
    roles=Roles(embeddings=FactorsOfTable(), is_transposed=True, has_convolutions=False),
    settings=TurnedSettings(file="turned.json", stale="turned"),
    home=Home(weights_name="turned.safetensors"),
)
