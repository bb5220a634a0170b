"""AnimateDiff's motion modules: the original names and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loratool.names.family import Family, Row, single
from loratool.names.vocabulary import Vocabulary

__all__ = ["CLAIM", "FAMILIES"]

CLAIM: Final = {
    "families": ["animatediff"],
    "segments": ["down_blocks", "mid_block", "up_blocks"],
}
"""How paths begin, in either naming."""

LEVELS: Final = 4
MODULES: Final = {
    **{f"down_blocks.{level}": 2 for level in range(LEVELS)},
    "mid_block": 1,
    **{f"up_blocks.{level}": 3 for level in range(LEVELS)},
}
"""How many motion modules each block has; those for Stable Diffusion XL have a level less."""

ENDS: Final = ("norm", "proj_in", "proj_out")
BLOCK: Final = {
    **{
        f"attention_blocks.{number}.{leaf}": f"attn{number + 1}.{leaf}"
        for number in range(2)
        for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    },
    **{f"norms.{number}": f"norm{number + 1}" for number in range(2)},
    "ff_norm": "norm3",
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
}


def rows() -> Iterator[Row]:
    """Yield the table."""
    for block, count in MODULES.items():
        for number in range(count):
            hub = f"{block}.motion_modules.{number}"
            native = f"{hub}.temporal_transformer"
            for name in ENDS:
                yield single(f"{native}.{name}", f"{hub}.{name}")
            for name, other in BLOCK.items():
                inner = "transformer_blocks.*"
                yield single(f"{native}.{inner}.{name}", f"{hub}.{inner}.{other}")


PLACES: Final = ("down_blocks.*", "mid_block", "up_blocks.*")


def names(between: str, inside: tuple[str, ...]) -> Vocabulary:
    """Return the names of motion modules in blocks of any number."""
    return Vocabulary(
        f"{place}.motion_modules.*{between}.{inner}"
        for place in PLACES
        for inner in (*ENDS, *(f"transformer_blocks.*.{each}" for each in inside))
    )


ANIMATEDIFF: Final = Family(
    "animatediff",
    "unet",
    tuple(rows()),
    names("", tuple(BLOCK.values())),
    names(".temporal_transformer", tuple(BLOCK)),
    is_trained_native=False,
)
"""The modules that look along the frames, of all releases; the rest is a Stable Diffusion."""

FAMILIES: Final = (ANIMATEDIFF,)
