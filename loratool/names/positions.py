"""The order in which cloneofsimo/lora numbers the modules of Stable Diffusion 1 and 2.

It walked the model in the order in which modules were registered (``_find_modules_v2``): down
blocks, up blocks, and the middle block last. Inside a transformer block the feed-forward layer
came between the two attentions; diffusers later moved it behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["TEXT_PROJECTIONS", "UNET_MODULES", "text_paths", "unet_paths"]

ATTENTION: Final = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD: Final = "ff.net.0.proj"
OLD_ORDER: Final = (
    *(f"attn1.{leaf}" for leaf in ATTENTION),
    FEED_FORWARD,
    *(f"attn2.{leaf}" for leaf in ATTENTION),
)
NEW_ORDER: Final = (
    *(f"attn1.{leaf}" for leaf in ATTENTION),
    *(f"attn2.{leaf}" for leaf in ATTENTION),
    FEED_FORWARD,
)
BLOCKS: Final = (
    *(f"down_blocks.{i}.attentions.{j}" for i in (0, 1, 2) for j in (0, 1)),
    *(f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in (0, 1, 2)),
    "mid_block.attentions.0",
)
UNET_MODULES: Final = len(BLOCKS) * len(OLD_ORDER)
TEXT_PROJECTIONS: Final = ("k_proj", "v_proj", "q_proj", "out_proj")
GROWTH: Final = 8
"""Outputs over inputs of the gated feed-forward layer."""


def unet_paths(shapes: Sequence[tuple[int, int]] = ()) -> list[str] | None:
    """Return the paths of the numbered modules of the U-Net.

    Args:
        shapes: Outputs and inputs of each, to tell the two orders apart; by default the older
            order, in which most files were written.

    Returns:
        One path for each number, or ``None`` where the shapes fit neither order.
    """
    for order in (OLD_ORDER, NEW_ORDER):
        paths = [f"{block}.transformer_blocks.0.{leaf}" for block in BLOCKS for leaf in order]
        if not shapes or _fits(paths, shapes):
            return paths
    return None


def _fits(paths: Sequence[str], shapes: Sequence[tuple[int, int]]) -> bool:
    if len(paths) != len(shapes):
        return False
    return all(
        (out == GROWTH * into) == path.endswith(FEED_FORWARD)
        for path, (out, into) in zip(paths, shapes, strict=True)
    )


def text_paths(count: int) -> list[str] | None:
    """Return the paths of ``count`` numbered modules of the text encoder."""
    if count % len(TEXT_PROJECTIONS):
        return None
    return [
        f"text_model.encoder.layers.{layer}.self_attn.{leaf}"
        for layer in range(count // len(TEXT_PROJECTIONS))
        for leaf in TEXT_PROJECTIONS
    ]
