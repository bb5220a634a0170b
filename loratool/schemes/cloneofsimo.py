"""cloneofsimo/lora: the place of each module in its model, and tokens beside the factors."""

from __future__ import annotations

import re
from typing import Final

from loratool.adapter.scheme import KeyScheme, Spelling, Template
from loratool.adapter.slots import AdapterKey, Slot

__all__ = ["SCHEME"]

KEY: Final = re.compile(r"(?P<module>(unet|text_encoder):\d{1,6}):(?P<side>down|up)")


class PositionalScheme(KeyScheme):
    """Modules are numbers; which is which only the architecture tells."""

    def parse(self, key: str) -> AdapterKey | None:
        match = KEY.fullmatch(key)
        return AdapterKey(match["module"], Slot(match["side"])) if match else None

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
