"""FourierFT (arXiv 2405.03003): the inverse Fourier transform of a few entries."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loratool.adapter.config import LoraConfig
from loratool.adapter.details import number, whole
from loratool.adapter.model import Site
from loratool.adapter.slots import Slot
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
from loratool.files.spec import StoredTensor

if TYPE_CHECKING:
    from loratool.math.spectra import SparseSpectrum

__all__ = ["VARIANT"]

CLAIM = {
    "signs": ["fourierft_spectrum"],
    "peft": {".fourierft_spectrum": "fourierft_spectrum"},
    "peft_types": ["FOURIERFT"],
    "evidence": 2,
    "priority": 10,
}

SPECTRUM: Final = Slot("fourierft_spectrum")


class Transformed(Change):
    """``W + scaling · Re F⁻¹(S)``, as many rows of it as are asked for."""

    grain = (1, 0)

    def __init__(self, spectrum: SparseSpectrum) -> None:
        self.spectrum = spectrum

    def difference(self, part: Array, row: int, column: int) -> Array:
        """See :class:`Change`."""
        from loratool.math.namespace import array_namespace, beside

        rows = self.spectrum.rows(row, row + part.shape[0])
        found = beside(rows[:, column : column + part.shape[1]], part)
        return array_namespace(part).astype(found, part.dtype, copy=False)


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
    has_change = True
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
        from loratool.math.exact_variants import split_matrix
        from loratool.math.namespace import beside
        from loratool.math.projections import fourier_factors, fourier_places

        values = read(site.slots[SPECTRUM]) * site.settings["scale"]
        out, into = site.settings[SHAPE]
        if 2 * values.shape[0] > min(out, into):
            whole = beside(self._spectrum(site, values).rows(0, out), values)
            up, down = split_matrix(whole)
        else:
            places = fourier_places(site.settings["seed"], values.shape[0], out, into)
            up, down = fourier_factors(values, places, out, into)
        return down, up

    def change(
        self, site: Site, values: Mapping[Slot, Array], shape: tuple[int, ...], scale: float
    ) -> Change:
        """See :class:`Variant`."""
        return Transformed(self._spectrum(site, values[SPECTRUM] * site.settings["scale"]))

    def _spectrum(self, site: Site, values: Array) -> SparseSpectrum:
        from loratool.math.namespace import on_host
        from loratool.math.projections import fourier_places
        from loratool.math.spectra import SparseSpectrum

        out, into = site.settings[SHAPE]
        places = fourier_places(site.settings["seed"], values.shape[0], out, into)
        return SparseSpectrum(on_host(values).astype("float64"), places, out, into)


VARIANT = FourierFt()
