"""Module names of diffusion models: the original checkpoints', diffusers', and flattened ones.

"Hub" names are module paths of diffusers (for text encoders, of transformers) without the
component's prefix; "native" names are those of the checkpoints that the models were published in.
"""

from __future__ import annotations

from loratool.names.diffusion.families import FAMILIES, family_named, family_of
from loratool.names.diffusion.family import Family, Fusion
from loratool.names.diffusion.flattening import KINDS, unflatten

__all__ = ["FAMILIES", "KINDS", "Family", "Fusion", "family_named", "family_of", "unflatten"]
