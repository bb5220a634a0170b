"""cloneofsimo/lora: the place of each module in its model, and tokens beside the factors."""

from __future__ import annotations

import re
from typing import Final

from loratool.adapter.scheme import KeyScheme, Spelling, Template
from loratool.adapter.slots import AdapterKey, Slot

__all__ = ["SCHEME"]

KEY: Final = re.compile(r"(?P<module>(unet|text_encoder):\d{1,6}):(?P<side>down|up)")


LISTED: Final = re.compile(r"0|[1-9]\d{0,5}")
"""A place in the list that files were before they had names: up, down, up, down, …"""


class PositionalScheme(KeyScheme):
    """Modules are numbers; which is which only the architecture tells."""

    def parse(self, key: str) -> AdapterKey | None:
        match = KEY.fullmatch(key)
        if match is not None:
            return AdapterKey(match["module"], Slot(match["side"]))
        if LISTED.fullmatch(key) is not None:
            number = int(key)
            return AdapterKey(f"unet:{number // 2}", Slot.DOWN if number % 2 else Slot.UP)
        return None

    def format(self, key: AdapterKey) -> str:
        if key.slot not in (Slot.DOWN, Slot.UP):
            raise KeyError(f"{self.name} has no name for {key.slot.value}")
        return f"{key.module}:{key.slot.value}"


SCHEME = PositionalScheme(
    name="cloneofsimo",
    summary="cloneofsimo/lora: modules by their position in Stable Diffusion",
    example="unet:0:down",
    writes=True,
    spelling=Spelling.POSITION,
    modules=r"(unet|text_encoder):\d+",
    templates=(
        Template("{module}:down", Slot.DOWN),
        Template("{module}:up", Slot.UP),
    ),
)
