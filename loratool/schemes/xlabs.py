"""XLabs' trainer of Flux.1: attention processors, queries, keys and values in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.model import Site
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.names.paths.xlabs import XlabsPaths
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {
    "keys": r"(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight$",
}


class XlabsRoles(Roles):
    """Matrices; the rows of queries, keys and values share A."""

    def apart(self, site: Site) -> list[Site]:
        """Return the three projections that one pair of factors is of."""
        up = site.slots.get(Slot.UP)
        if ".qkv_lora" not in site.module or up is None or len(up.spec.shape) != 2:
            return [site]
        rows, rank = up.spec.shape
        if rows % 3:
            return [site]
        made = []
        for index, side in enumerate("qkv"):
            part = up.rows(index * rows // 3, rows // 3, rank)
            if part is not None:
                slots = {**site.slots, Slot.UP: part}
                made.append(replace(site, module=f"{site.module}.{side}", slots=slots))
        return made


SCHEME = Scheme(
    name="xlabs",
    summary="XLabs' trainer of Flux.1: processor.qkv_lora1 (read only)",
    example="double_blocks.0.processor.qkv_lora1.down.weight",
    keys=KeyTable(
        modules=r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?",
        templates=(
            Template("{module}.down.weight", Slot.DOWN),
            Template("{module}.up.weight", Slot.UP),
        ),
    ),
    paths=XlabsPaths(),
    scale=FoldedScale(),
    roles=XlabsRoles(has_convolutions=False),
    settings=Settings(),
    home=Home(),
    priority=4,
    is_written=False,
)
