"""TinyLoRA, as PEFT stores it: a matrix between the base's leading directions, of few numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import number, whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import Array, Geometry, Read, Settings, Shapes, Slots, Variant
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["tinylora_A", "tinylora_B", "tinylora_P"],
    "peft": {
        ".tinylora_A": "tinylora_A",
        ".tinylora_B": "tinylora_B",
        ".tinylora_P": "tinylora_P",
    },
    "peft_types": ["TINYLORA"],
    "evidence": 2,
    "priority": 10,
}

DOWN, UP, PROJECTIONS = Slot("tinylora_A"), Slot("tinylora_B"), Slot("tinylora_P")
VECTORS: Final = "tinylora_v"
ALL: Final = "all projections"
"""In settings: those of every module, in the order of the file."""
MODULES: Final = "modules"
"""In settings: how many modules there are."""


class TinyLora(Variant):
    """``B (Σ vᵢ Pᵢ) A``: v is shared by a group of modules, by their order in the live model.

    That order is not in the file; but a module's projections are drawn by a seed plus its place in
    it, so that the stored ones tell.
    """

    name = "tinylora"
    words = "TinyLoRA, few numbers between directions of the base"
    is_scaled = False
    has_factors = True
    kernel_slots = frozenset()
    shapes = MappingProxyType(
        {
            "tinylora_A": "rank in",
            "tinylora_B": "out rank",
            "tinylora_P": "numbers rank rank",
            f"{VECTORS}.0": "numbers",
        }
    )
    spare = frozenset(("tinylora_P",))
    fields = frozenset(
        (
            "init_v_bound",
            "projection_seed",
            "save_projection",
            "tinylora_dropout",
            "u",
            "weight_tying",
        )
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return the vectors, the projections of all modules, and how they are drawn and shared."""
        found: dict[str, Any] = {
            f"{VECTORS}.{key.rpartition('.')[2]}": tensor
            for key, tensor in tensors.items()
            if key.rpartition(".")[0].endswith(VECTORS)
        }
        owners = [tensor for key, tensor in tensors.items() if ".tinylora_P" in key]
        found[ALL] = tuple(owners)
        found[MODULES] = sum(1 for key in tensors if key.endswith(".tinylora_A"))
        if config is not None:
            found["seed"] = whole(config, "projection_seed", 42, module)
            found["tying"] = number(config, "weight_tying", 0.0, module)
        return found

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        return Geometry(shapes[DOWN][0], shapes[UP][0], shapes[DOWN][1])

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if "seed" not in site.settings:
            yield (
                "LT022",
                "shares its numbers with other modules in a way that only adapter_config.json "
                "tells, which is not there",
            )
        projections = site.slots.get(PROJECTIONS)
        if projections is None:
            return
        wanted = projections.spec.shape[:1]
        for name, tensor in site.settings.items():
            if name.startswith(VECTORS) and tensor.spec.shape != wanted:
                found = list(tensor.spec.shape)
                yield "LT003", f"shares {name} of shape {found}, expected {list(wanted)}"

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        if PROJECTIONS not in site.slots and site.settings[MODULES] > 1:
            raise UnsupportedError(
                site.module,
                "is a TinyLoRA without its projections (save_projection was false), which are "
                "drawn by the module's place in the live model, and no file tells that",
                hint="make save_projection true in adapter_config.json, load it with peft, and "
                "save it again",
            )

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (UP,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import weighted_sum

        down, up = read(site.slots[DOWN]), read(site.slots[UP])
        vector = read(self._vector(site))
        if PROJECTIONS in site.slots:
            projections = read(site.slots[PROJECTIONS])
        else:
            projections = self._drawn(site, vector, down.shape[0])
        return down, up @ weighted_sum(vector, projections)

    def _vector(self, site: Site) -> StoredTensor:
        """Return the numbers of a module: those of its group, by its place.

        Raises:
            AdapterError: Its place is not to be told, or the file has no numbers for it.
        """
        modules, tying = site.settings[MODULES], site.settings["tying"]
        groups = max(1, round(modules * (1.0 - tying)))
        name = f"{VECTORS}.0"
        if groups > 1:
            place = _places(site.settings[ALL], site.settings["seed"]).get(
                site.slots[PROJECTIONS].spec.name
            )
            if place is None:
                raise AdapterError(
                    site.module,
                    "has projections that were not drawn by the seed of the configuration, which "
                    "would tell the numbers that go with them",
                    hint="merge it with peft, and save the model",
                )
            name = f"{VECTORS}.{min(place // max(1, modules // groups), groups - 1)}"
        found = site.settings.get(name)
        if not isinstance(found, StoredTensor):
            raise AdapterError(site.module, f"shares the numbers {name}, which are not there")
        return found

    def _drawn(self, site: Site, like: Array, rank: int) -> Array:
        """Return the projections of an only module."""
        from loratool.math.namespace import beside
        from loratool.math.projections import tinylora_projections

        return beside(tinylora_projections(site.settings["seed"], like.shape[0], rank), like)


@lru_cache(maxsize=2)
def _places(projections: tuple[StoredTensor, ...], seed: int) -> Mapping[str, int]:
    """Return the place of each module in the live model by the key of its projections.

    None where the places of all modules are not those of one order, as where several adapters of
    one model were drawn by those of the first.
    """
    from loratool.math.projections import drawn_place
    from loratool.values.arrays import decode

    found: dict[str, int] = {}
    for stored in projections:
        place = drawn_place(decode(stored), seed, len(projections))
        if place is None or place in found.values():
            return {}
        found[stored.spec.name] = place
    return found


VARIANT = TinyLora()
