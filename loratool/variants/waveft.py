"""WaveFT (arXiv 2505.12532): the inverse wavelet transform of a few coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import flag, number, whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
from loratool.adapter.sparse import AtPlaces
from loratool.adapter.spectrum import Spectrum
from loratool.adapter.variant import (
    SHAPE,
    Array,
    Change,
    Geometry,
    Read,
    Settings,
    Shapes,
    Slots,
)
from loratool.errors import UnsupportedError
from loratool.files.spec import StoredTensor

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["waveft_spectrum"],
    "peft": {".waveft_spectrum": "waveft_spectrum"},
    "peft_types": ["WAVEFT"],
    "evidence": 2,
    "priority": 10,
}

SPECTRUM: Final = Slot("waveft_spectrum")
ORDERS: Final = {f"db{order}": order for order in range(1, 11)}
"""The wavelets that are known, and their vanishing moments."""


class WaveFt(Spectrum):
    """``scaling · W⁻¹(S)``: where the coefficients of S are, a seed tells. Each is one rank."""

    name = "waveft"
    called = "WaveFT"
    words = "WaveFT, coefficients of wavelets"
    shapes = MappingProxyType(
        {
            "waveft_spectrum": "n",
        }
    )
    has_change = True
    fields = frozenset(
        (
            "n_frequency",
            "n_frequency_pattern",
            "proportional_parameters",
            "scaling",
            "random_loc_seed",
            "use_idwt",
            "wavelet_family",
        )
    )

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return scale, seed and wavelet."""
        if config is None:
            return {}
        is_transformed = flag(config, "use_idwt", True, module)
        return {
            "scale": number(config, "scaling", 25.0, module),
            "seed": whole(config, "random_loc_seed", 777, module),
            "wavelet": config.raw.get("wavelet_family", "db1") if is_transformed else None,
        }

    def geometry(self, shapes: Shapes, settings: Settings) -> Geometry:
        """See :class:`Variant`."""
        (count,) = shapes[SPECTRUM]
        out, into = settings.get(SHAPE) or (0, 0)
        return Geometry(count, out, into)

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        wavelet = site.settings["wavelet"]
        if wavelet is not None and wavelet not in ORDERS:
            raise UnsupportedError(
                site.module,
                f"is a WaveFT of the wavelet {wavelet!r:.40}; only Daubechies' are known, db1 to "
                "db10",
                hint="merge it with peft, and save the model",
            )
        super().check(site, shape)

    def followed(self, slots: Mapping[Slot, Any]) -> tuple[Slot, ...]:
        """See :class:`Variant`."""
        return (SPECTRUM,)

    def factors(self, site: Site, read: Read, width: int | None = None) -> tuple[Array, Array]:
        """See :class:`Variant`."""
        from loratool.math.exact_variants import summed
        from loratool.math.projections import fourier_places
        from loratool.math.wavelets import entry_factors, wavelet_factors

        values = read(site.slots[SPECTRUM]) * site.settings["scale"]
        out, into = site.settings[SHAPE]
        places = fourier_places(site.settings["seed"], values.shape[0], out, into)
        order = ORDERS.get(site.settings["wavelet"])

        def some(part: slice) -> tuple[Array, Array]:
            chosen = places[0][part], places[1][part]
            if order is None:
                return entry_factors(values[part], chosen, out, into)
            return wavelet_factors(values[part], chosen, out, into, order)

        up, down = summed(some, values.shape[0], min(out, into), 1)
        return down, up

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        from loratool.math.places import Places
        from loratool.math.projections import fourier_places
        from loratool.math.wavelets import wavelet_entries

        numbers = values[SPECTRUM] * site.settings["scale"]
        out, into = site.settings[SHAPE]
        order = ORDERS.get(site.settings["wavelet"])
        places = fourier_places(site.settings["seed"], numbers.shape[0], out, into)
        if order is None:
            return AtPlaces(site, Places(places[0], places[1], numbers), shape)
        rows, columns, added = wavelet_entries(numbers, places, out, into, order)
        return AtPlaces(site, Places(rows, columns, added), shape)


VARIANT = WaveFt()
