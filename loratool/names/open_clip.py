"""OpenCLIP's text model, and transformers': the larger encoders of Stable Diffusion 2 and XL.

Source of the correspondence: the conversion script of transformers for CLIP, read backwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Fusion, Row, single

__all__ = ["ATTENTION", "OPEN_CLIP", "PARAMETERS", "PROJECTIONS", "TEXT_PROJECTION"]

LAYERS: Final = 48
NATIVE, HUB = "transformer.resblocks.*", "text_model.encoder.layers.*"

ATTENTION: Final = "self_attn"
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
"""The attention of transformers, and the projections of it that OpenCLIP has in one parameter."""

BLOCK: Final = {
    "attn.out_proj": f"{ATTENTION}.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

TEXT_PROJECTION: Final = "text_projection"
"""A matrix that OpenCLIP multiplies from the right: it is stored as ``(in, out)``."""
PARAMETERS: Final = {
    "positional_embedding": "text_model.embeddings.position_embedding",
    TEXT_PROJECTION: TEXT_PROJECTION,
}
"""Raw parameters, and the modules of transformers whose weight they are."""


def rows() -> Iterator[Row]:
    """Yield the table."""
    yield single("token_embedding", "text_model.embeddings.token_embedding")
    yield single("ln_final", "text_model.final_layer_norm")
    for native, hub in BLOCK.items():
        yield single(f"{NATIVE}.{native}", f"{HUB}.{hub}", LAYERS)
    parts = tuple(f"{HUB}.{ATTENTION}.{each}" for each in PROJECTIONS)
    yield Row(f"{NATIVE}.attn", Fusion(parts), LAYERS)


OPEN_CLIP: Final = Family("open-clip", "text_encoder", tuple(rows()))
"""Text models of any number of layers."""
