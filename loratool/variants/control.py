"""Control LoRAs, for a weight with more inputs than the base's (ComfyUI's ``reshape_weight``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.adapter.model import Site
from loratool.adapter.plain import Plain
from loratool.adapter.slots import Slot
from loratool.files.container import read_bytes

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["reshape_weight"],
    "suffixes": {".reshape_weight": "reshape_weight"},
    "priority": 3,
}

RESHAPE: Final = Slot("reshape_weight")
SIZES: Final = {"I64": 8, "I32": 4}


class Control(Plain):
    """The base's weight gets zeros up to a shape of the file's; A sees the new inputs too."""

    name = "control"
    words = "a control LoRA, for a weight with more inputs (reshape_weight)"
    undetermined = (
        "is a control LoRA: the weight has to grow first (reshape_weight), so that it cannot "
        "{verb} without a base"
    )
    remedy = "merge it into its base: loratool merge BASE ADAPTER -o OUT"

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        spec = site.slots[RESHAPE].spec
        if spec.dtype not in SIZES or len(spec.shape) != 1 or not 2 <= spec.shape[0] <= 5:
            shape = list(spec.shape)
            yield "LT003", f"has a reshape_weight of {spec.dtype} {shape}, expected a few integers"

    def grown(self, site: Site) -> tuple[int, ...] | None:
        """See :class:`Variant`."""
        tensor = site.slots[RESHAPE]
        data, size = read_bytes(tensor), SIZES[tensor.spec.dtype]
        steps = range(0, len(data), size)
        return tuple(int.from_bytes(data[i : i + size], "little", signed=True) for i in steps)


VARIANT = Control()
