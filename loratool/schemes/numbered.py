"""Research code on SAM and vision transformers: ``w_a_000``, ``w_b_000``, two pairs a block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from loratool.adapter.keys import KeyTable, Template
from loratool.adapter.scheme import Home, Scheme
from loratool.adapter.slots import AdapterKey, Slot
from loratool.files.spec import StoredTensor
from loratool.names.paths.blocks import BlockPaths
from loratool.schemes.parts.roles import Roles
from loratool.schemes.parts.scales import FoldedScale
from loratool.schemes.parts.settings import Settings

__all__ = ["CLAIM", "SCHEME"]

CLAIM: Final = {"keys": r"^w_[ab]_\d{3,}$"}

KEY: Final = re.compile(r"w_(?P<side>[ab])_(?P<number>\d{3,9})", re.ASCII)
ROLES: Final = {
    ("a", 0): Slot("first down"),
    ("b", 0): Slot("first up"),
    ("a", 1): Slot("last down"),
    ("b", 1): Slot("last up"),
}
"""Even numbers are of queries, the first rows of a projection; odd ones of values, the last."""


class NumberedKeys(KeyTable):
    """Pairs of factors in the order of the blocks: of queries, then of values."""

    def _parse(self, key: str) -> AdapterKey | None:
        match = KEY.fullmatch(key)
        if match is None or f"{int(match['number']):03d}" != match["number"]:
            return None
        block, place = divmod(int(match["number"]), 2)
        return AdapterKey(str(block), ROLES[match["side"], place])

    def format(self, key: AdapterKey) -> str:
        for (side, place), slot in ROLES.items():
            if slot is key.slot and key.module.isdecimal():
                return f"w_{side}_{2 * int(key.module) + place:03d}"
        raise KeyError(f"there is no name for {key.slot.value}")

    def recognise(self, tensors: Mapping[str, StoredTensor]) -> int:
        """Count factors where there are as many of values as of queries."""
        found = [key for name in tensors if (key := self.parse(name)) is not None]
        sides = [sum(key.slot is role for key in found) for role in ROLES.values()]
        return len(found) if len(set(sides)) == 1 else 0


SCHEME = Scheme(
    name="numbered",
    summary="SAM and ViT research code: pairs of factors by number (read only)",
    example="w_a_000",
    keys=NumberedKeys(
        templates=tuple(Template("{module}", slot, is_factor=True) for slot in ROLES.values()),
        modules=r"\d+",
    ),
    paths=BlockPaths(),
    scale=FoldedScale(),
    roles=Roles(has_variants=True),
    settings=Settings(),
    home=Home(),
    priority=4,
    is_written=False,
)
