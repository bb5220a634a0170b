"""FourierFT (arXiv 2405.03003): the inverse Fourier transform of a few entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import number, whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.variant import (
    SHAPE,
    Array,
    Geometry,
    Read,
    Settings,
    Shapes,
    Slots,
    Variant,
)
from loratool.errors import UnsupportedError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["fourierft_spectrum"],
    "peft": {".fourierft_spectrum": "fourierft_spectrum"},
    "peft_types": ["FOURIERFT"],
    "evidence": 2,
    "priority": 10,
}

SPECTRUM: Final = Slot("fourierft_spectrum")


class FourierFt(Variant):
    """``scaling · Re F⁻¹(S)``: where the entries of S are, a seed tells. Each has two ranks."""

    name = "fourierft"
    words = "FourierFT, entries of a spectrum"
    shapes = MappingProxyType(
        {
            "fourierft_spectrum": "n",
        }
    )
    is_scaled = False
    has_factors = True
    needs_shape = True
    needs_places = True
    kernel_slots = frozenset()
    fields = frozenset(
        ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights")
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return scale and seed."""
        if config is None:
            return {}
        return {
            "scale": number(config, "scaling", 150.0, module),
            "seed": whole(config, "random_loc_seed", 777, module),
        }

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        (count,) = shapes[SPECTRUM]
        out, into = settings.get(SHAPE) or (0, 0)
        return Geometry(2 * count, out, into)

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """See :class:`Variant`."""
        if "seed" not in site.settings:
            yield "LT022", "has its seed and scale in adapter_config.json, which is not there"

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        if site.settings.get(SHAPE) is None:
            raise UnsupportedError(
                site.module,
                "is a FourierFT: only the base tells the shape of its weight",
                hint="give --base BASE; headers are enough",
            )

    def places(self, site: Site, shape: tuple[int, ...]) -> bool:
        """See :class:`Variant`."""
        return len(shape) == 2 and super().places(site, shape)

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        return site.in_features

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def factor_rank(self, site: Site) -> int:
        """See :class:`Variant`."""
        return min(site.geometry.rank, site.out_features, site.in_features)

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (SPECTRUM,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import summed
        from loratool.math.projections import fourier_factors, fourier_places

        values = read(site.slots[SPECTRUM]) * site.settings["scale"]
        out, into = site.settings[SHAPE]
        places = fourier_places(site.settings["seed"], values.shape[0], out, into)

        def some(part: slice) -> tuple[Array, Array]:
            chosen = places[0][part], places[1][part]
            return fourier_factors(values[part], chosen, out, into)

        up, down = summed(some, values.shape[0], min(out, into), 2)
        return down, up


VARIANT = FourierFt()
