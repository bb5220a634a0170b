"""PEANuT (arXiv 2410.01870), as PEFT stores it: a small network of the columns of the weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import chosen, number, whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Change, Geometry, Settings, Shapes, Slots, Variant
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["peanut_A", "peanut_B"],
    "peft": {
        ".peanut_A.weight": "peanut_A",
        ".peanut_B.weight": "peanut_B",
        ".peanut_encoders.0.weight": "peanut_encoder_0",
        ".peanut_encoders.1.weight": "peanut_encoder_1",
        ".peanut_encoders.2.weight": "peanut_encoder_2",
        ".peanut_encoders.3.weight": "peanut_encoder_3",
        ".peanut_decoders.0.weight": "peanut_decoder_0",
        ".peanut_decoders.1.weight": "peanut_decoder_1",
        ".peanut_decoders.2.weight": "peanut_decoder_2",
        ".peanut_decoders.3.weight": "peanut_decoder_3",
    },
    "peft_types": ["PEANUT"],
    "evidence": 2,
    "priority": 10,
}

DOWN, UP = Slot("peanut_A"), Slot("peanut_B")
DEEPEST: Final = 4
ENCODERS: Final = tuple(Slot(f"peanut_encoder_{index}") for index in range(DEEPEST))
DECODERS: Final = tuple(Slot(f"peanut_decoder_{index}") for index in range(DEEPEST))


class Network(Change):
    """``W + s B g(… f(A W))``; of several such all look at the original weight."""

    grain = (0, 1)
    of_original = True

    def __init__(
        self,
        ends: tuple[Array, Array],
        inner: tuple[Sequence[Array], Sequence[Array]],
        activation: str,
        scale: float,
    ) -> None:
        from loratool.math.activations import ACTIVATIONS

        self.ends = ends
        self.inner = inner
        self.activation = ACTIVATIONS[activation]
        self.scale = scale

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        down, up = self.ends
        found = self.activation(down @ part)
        seen: list[Array] = []
        for encoder in self.inner[0]:
            seen.append(found)
            found = self.activation(encoder @ found)
        for decoder in self.inner[1]:
            found = self.activation(decoder @ found) + seen.pop()
        return (up @ found) * self.scale


class Peanut(Variant):
    """Each layer of the network goes into r numbers, of each column of the weight."""

    name = "peanut"
    words = "PEANuT, a small network of the base's weight"
    is_scaled = False
    needs_base = True
    has_change = True
    needs_whole = True
    fields = frozenset(("act_fn", "depth", "scaling"))

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return what the network is made of."""
        if config is None:
            return {}
        from loratool.math.activations import ACTIVATIONS

        return {
            "depth": whole(config, "depth", 0, module),
            "activation": chosen(config, "act_fn", tuple(ACTIVATIONS), "relu", module),
            "scale": number(config, "scaling", 1.0, module),
        }

    def expected(self, slots: Slots) -> Mapping[str, str]:
        """See :class:`Variant`."""
        inner = {str(slot): "rank rank" for slot in (*ENCODERS, *DECODERS) if slot in slots}
        return MappingProxyType({DOWN: "rank out", UP: "out rank", **inner})

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(shapes[DOWN][0], shapes[UP][0], 0)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        depth = site.settings.get("depth")
        if depth is None:
            yield "LT022", "has its act_fn and scaling in adapter_config.json, which is not there"
            return
        if depth > DEEPEST:
            yield "LT022", f"is a network of depth {depth}; at most {DEEPEST} is known"
        for name, found in (("encoders", ENCODERS), ("decoders", DECODERS)):
            present = [index for index, slot in enumerate(found) if slot in site.slots]
            if present != list(range(min(depth, DEEPEST))):
                yield "LT001", f"has {len(present)} {name}, and a depth of {depth}"

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        depth = site.settings["depth"]
        inner = [values[s] for s in ENCODERS[:depth]], [values[s] for s in DECODERS[:depth]]
        settings = site.settings["activation"], site.settings["scale"]
        return Network((values[DOWN], values[UP]), (inner[0], inner[1]), *settings)


VARIANT = Peanut()
