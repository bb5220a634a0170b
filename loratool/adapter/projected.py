"""What variants have in common that scale random projections, shared by all modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from loratool.adapter.config import LoraConfig
from loratool.adapter.model import Site
from loratool.adapter.variant import (
    LARGEST,
    SHAPE,
    Array,
    Read,
    Settings,
    Slots,
    Variant,
)
from loratool.errors import AdapterError, UnsupportedError
from loratool.files.spec import StoredTensor

__all__ = ["Projected"]


class Projected(Variant):
    """The projections are stored, once or for every module, or drawn again from a seed.

    Attributes:
        shared: What A and B are called.
    """

    shared: ClassVar[tuple[str, str]]
    is_scaled = False
    has_factors = True
    needs_shape = True
    needs_places = True

    def seed(self, module: str, config: LoraConfig) -> Mapping[str, Any]:
        """Return what the projections are drawn by."""
        raise NotImplementedError

    def drawn_rank(self, site: Site) -> int:
        """Return the rank that a module's tensors tell, which has to be that of all."""
        return site.geometry.rank

    def drawn(self, site: Site, like: Array) -> tuple[Array, Array]:
        """Return the projections as they were drawn, the same for all modules."""
        raise NotImplementedError

    def settings(
        self,
        module: str,
        slots: Slots,
        config: LoraConfig | None,
        tensors: Mapping[str, StoredTensor],
    ) -> Mapping[str, Any]:
        """Return the projections that the file has, and the seed of those that it has not."""
        found: dict[str, Any] = dict(self.seed(module, config)) if config is not None else {}
        first = next(iter(slots.values())).spec.name.rpartition(".")[0]
        for key, tensor in tensors.items():
            owner, _, name = key.rpartition(".")
            if name not in self.shared:
                continue
            if owner == first:
                found[key] = tensor  # each module may have a copy
            if owner == first or name not in found:
                found[name] = tensor
        for key, tensor in tensors.items():
            owner, _, name = key.rpartition(".")
            if name in self.shared and "." not in owner:
                found[key] = found[name] = tensor
        return found

    def inputs(self, settings: Settings) -> int:
        """Return the inputs of the base's layer, 0 where there is none at hand."""
        shape = settings.get(SHAPE)
        return shape[1] if shape is not None else 0

    def check(self, site: Site, shape: tuple[int, ...] | None) -> None:
        """See :class:`Variant`."""
        if shape is None:
            raise UnsupportedError(
                site.module,
                f"is a {self.name}: only the base tells how many inputs it has",
                hint="give --base BASE; headers are enough",
            )
        if all(name in site.settings for name in self.shared):
            self.check_sizes(site, shape)
            return
        what = f"is a {self.name} without its shared projections (save_projection was false)"
        if "seed" not in site.settings:
            raise UnsupportedError(
                site.module,
                f"{what}, and only adapter_config.json tells the seed that they are drawn by",
                hint="put the adapter_config.json beside it that it was saved with",
            )
        if site.settings.get(LARGEST) is None:
            raise UnsupportedError(
                site.module,
                f"{what}; how they are drawn depends on the largest of all modules, and some were "
                "left out or are not in the base",
                hint="give all modules, and the base that it was trained on (-w MODULE=0 leaves a "
                "module out of a merge)",
            )

    def problems(self, site: Site) -> Iterator[tuple[str, str]]:
        """Yield that copies of the projections differ, or that only one of the two is there."""
        kinds: dict[str, set[tuple[int, ...]]] = {name: set() for name in self.shared}
        for key, tensor in site.settings.items():
            name = key.rpartition(".")[2]
            if name in kinds and isinstance(tensor, StoredTensor):
                kinds[name].add(tensor.spec.shape)
        for name, shapes in kinds.items():
            if len(shapes) > 1:
                listed = " and ".join(str(list(shape)) for shape in sorted(shapes))
                yield "LT003", f"has copies of {name} of the shapes {listed}"
        told, rank = site.settings.get("rank"), self.drawn_rank(site)
        if told is not None and told != rank:
            yield "LT005", f"has rank {rank}, but the configuration says {told}"
        if sum(1 for shapes in kinds.values() if shapes) == 1:
            yield "LT001", f"has only one of {' and '.join(self.shared)}"

    def check_sizes(self, site: Site, shape: tuple[int, ...]) -> None:
        """Make sure that stored projections are large enough for a weight.

        Raises:
            AdapterError: They are not.
        """
        one, other = (site.settings[name].spec.shape for name in self.shared)
        into = self.width(site, shape)
        if one[1] < into or other[0] < site.out_features:
            raise AdapterError(
                site.module,
                f"shares projections of the shapes {list(one)} and {list(other)}, which are too "
                f"small for {site.out_features} × {into}",
                hint="is this the base that it was trained on?",
                code="LT022",
            )

    def width(self, site: Site, shape: tuple[int, ...] | None = None) -> int:
        """See :class:`Variant`."""
        if shape is None:
            return self.inputs(site.settings)
        if len(shape) > 1 and shape == site.settings.get(SHAPE):
            return shape[1]
        return shape[1] if shape[0] == site.out_features else shape[0]

    def outputs_together(self, site: Site) -> int:
        """See :class:`Variant`."""
        return 1

    def projections(self, site: Site, read: Read, like: Array) -> tuple[Array, Array]:
        """Return A and B, stored or drawn, as arrays of the library of ``like``."""
        if all(name in site.settings for name in self.shared):
            one, other = (read(site.settings[name]) for name in self.shared)
            return one, other
        return self.drawn(site, like)
