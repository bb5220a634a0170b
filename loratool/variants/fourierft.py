"""FourierFT (arXiv 2405.03003): the inverse Fourier transform of a few entries."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import number, whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.spectrum import Spectrum
from loratool.adapter.variant import (
    SHAPE,
    Array,
    Geometry,
    Read,
    Settings,
    Shapes,
    Slots,
)
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


class FourierFt(Spectrum):
    """``scaling · Re F⁻¹(S)``: where the entries of S are, a seed tells. Each has two ranks."""

    name = "fourierft"
    called = "FourierFT"
    words = "FourierFT, entries of a spectrum"
    shapes = MappingProxyType(
        {
            "fourierft_spectrum": "n",
        }
    )
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
