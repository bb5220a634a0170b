"""XLabs' trainer of Flux.1: attention processors with factors for queries, keys and values."""

from __future__ import annotations

from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import Slot
from loratool.names.paths.xlabs import XlabsPaths
from loratool.names.xlabs import MODULES
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {"keys": r"_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight$"}

SCHEME = Scheme(
    name="xlabs",
    summary="XLabs' trainer of Flux.1: processors of its attention",
    example="double_blocks.0.processor.qkv_lora1.down.weight",
    keys=KeyTable(
        modules=rf"(diffusion_model\.)?({MODULES})",
        templates=(
            Template("{module}.down.weight", Slot.DOWN),
            Template("{module}.up.weight", Slot.UP),
        ),
    ),
    paths=XlabsPaths(),
    scale=FoldedScale(),
    roles=Roles(has_convolutions=False),
    settings=Settings(),
    home=Home(),
    priority=1,
)
