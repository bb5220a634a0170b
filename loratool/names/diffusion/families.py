"""The families that are known, and which of them names belong to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from loratool.errors import OptionError
from loratool.names.diffusion.family import Family
from loratool.names.diffusion.flux import FLUX
from loratool.names.diffusion.flux2 import FLUX2
from loratool.names.diffusion.sd3 import SD3, SD3_LARGE
from loratool.names.diffusion.unet import SD1, SDXL
from loratool.names.diffusion.wan import WAN

__all__ = ["FAMILIES", "family_named", "family_of"]

FAMILIES: Final = (SD1, SDXL, FLUX, FLUX2, SD3, SD3_LARGE, WAN)


def family_named(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        OptionError: There is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise OptionError(name, "no such family of models", hint=f"known are {known}")


def family_of(modules: Collection[str]) -> Family | None:
    """Return the family that the modules of a backbone belong to.

    It is the only family that has every one of them, in either naming and within its depth.
    Where the names that are present occur in several families, none is chosen: those of
    ``mid_block`` alone occur in ``sd1`` and ``sdxl``, the hub's names of the attentions of the
    first blocks in ``flux``, ``flux2`` and ``sd3``, the native names of the first blocks'
    attentions and feed-forward layers (but not of their modulation) in ``flux`` and ``flux2``.
    The one exception: what fits both depths of Stable Diffusion 3 is the smaller one's, since
    adapters seldom leave out every block from the 25th on.

    Names cannot tell a family from another model that is built of the same modules and has no
    more of them.

    Args:
        modules: Paths without the component's prefix, hub or native.

    Returns:
        The family, or ``None`` if there is none or more than one.
    """
    fitting = [
        family for family in FAMILIES if modules and all(family.has(module) for module in modules)
    ]
    if fitting == [SD3, SD3_LARGE]:
        return SD3
    return fitting[0] if len(fitting) == 1 else None
