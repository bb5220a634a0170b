"""cloneofsimo/lora: the place of each module in its model, and tokens beside the factors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.scheme import Home, Scheme, Written
from loratool.adapter.slots import AdapterKey, Slot
from loratool.names.paths.numbered import NumberedPaths
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings
from loratool.schemes.parts.tokens import token_of
from loratool.values.expr import Expr

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {"keys": r"^((unet|text_encoder):\d+:(down|up)|\d+)$"}

KEY: Final = re.compile(r"(?P<module>(unet|text_encoder):\d{1,6}):(?P<side>down|up)")


LISTED: Final = re.compile(r"0|[1-9]\d{0,5}")
"""A place in the list that files were before they had names: up, down, up, down, …"""


class NumberedKeys(KeyTable):
    """Keys with numbers for modules; which is which only the architecture tells."""

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
            raise KeyError(f"there is no name for {key.slot.value}")
        return f"{key.module}:{key.slot.value}"


@dataclass(frozen=True, slots=True)
class SimoTokens:
    """``<token>``, a single vector as such."""

    def key(self, name: str) -> str | None:
        """Return the name of a token's embedding."""
        token = token_of(name)
        return f"<{token}>" if token is not None else None

    def stored(self, value: Expr) -> Expr:
        """Return its values without the dimension that a single vector needs elsewhere."""
        is_single = len(value.shape) == 2 and value.shape[0] == 1
        return value.reshaped(value.shape[1:]) if is_single else value


class SimoSettings(Settings):
    """Ranks, kinds of layers and tokens in the metadata."""

    def metadata(self, written: Written) -> dict[str, str]:
        """Return what cloneofsimo/lora stores beside positional factors."""
        names = {item.name: item.part for item in written.modules}
        found = {f"{name}:rank": str(part.rank) for name, part in names.items()}
        components = {name.partition(":")[0] for name in names}
        if "unet" in components:
            found["unet"] = json.dumps(["CrossAttention", "Attention", "GEGLU"])
        if "text_encoder" in components:
            found["text_encoder"] = json.dumps(["CLIPAttention"])
        return found | {name: "<embed>" for name in written.extras if token_of(name) is not None}

    def notes(self, written: Written) -> Iterator[str]:
        """Yield which order the numbers are in."""
        yield (
            "its modules are numbered in the order that cloneofsimo/lora had when it was written: "
            "attention, feed-forward, cross-attention"
        )


SCHEME = Scheme(
    name="cloneofsimo",
    summary="cloneofsimo/lora: modules by their position in Stable Diffusion",
    example="unet:0:down",
    keys=NumberedKeys(
        modules=r"(unet|text_encoder):\d+",
        templates=(
            Template("{module}:down", Slot.DOWN),
            Template("{module}:up", Slot.UP),
        ),
    ),
    paths=NumberedPaths(),
    scale=FoldedScale(),
    roles=Roles(),
    settings=SimoSettings(stale=r"unet|text_encoder|(unet|text_encoder):\d+:rank|<.+>"),
    home=Home(tokens=SimoTokens()),
)
