"""The native names of OneTrainer's files: every part of a fused projection is one of its own.

The key sets of its releases from March 2025 to June 2026 (the "OMI" standard), which are near those
of the original checkpoints: ``img_attn.qkv.0`` is what diffusers calls ``attn.to_q``. Families that
those releases had no key sets for go by diffusers' names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cache
from typing import Final

from loratool.names.families import family_named
from loratool.names.family import Family, Fusion, Row

__all__ = ["is_last_of", "omi"]

FAMILIES: Final = frozenset(
    (
        "chroma",
        "flux",
        "hidream",
        "hunyuan-video",
        "pixart",
        "sd1",
        "sd3",
        "sd3-large",
        "sdxl",
        "stable-cascade",
    )
)
"""What OneTrainer has key sets for."""

RENAMED: Final = {
    "chroma": {"img_in": "img_in.proj"},
    "flux": {"img_in": "img_in.proj"},
    "hunyuan-video": {
        "mlp.fc1": "mlp.fc0",
        "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.linear_1",
        "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.linear_2",
    },
    "stable-cascade": {
        "attn.to_q": "attn.in_proj.0",
        "attn.to_k": "attn.in_proj.1",
        "attn.to_v": "attn.in_proj.2",
    },
}
"""Ends of native names that differ from those of the checkpoints."""

CONTEXT: Final = re.compile(
    r"joint_blocks\.(?P<number>[0-9]{1,9})\.context_block\.adaLN_modulation\.1"
)


def omi(family: Family) -> Family | None:
    """Return a family by OneTrainer's names; ``None`` where those are diffusers'."""
    return _named(family.name) if family.name in FAMILIES else None


@cache
def _named(name: str) -> Family:
    family = family_named(name)
    return family.recut(_rows(family))


def _rows(family: Family) -> Iterator[Row]:
    for row in family.rows:
        native = _renamed(row.native, family.name)
        if len(row.hub.modules) == 1:
            yield Row(native, row.hub, row.count)
            continue
        for index, module in enumerate(row.hub.modules):
            yield Row(f"{native}.{index}", Fusion((module,)), row.count)


def _renamed(native: str, family: str) -> str:
    for old, new in RENAMED.get(family, {}).items():
        if native.endswith(old):
            return native.removesuffix(old) + new
    return native


def is_last_of(local: str, others: Collection[str]) -> bool | None:
    """Whether OneTrainer took a modulation of Stable Diffusion 3 for that of the last block.

    It exchanges the halves of what is followed by no other block in the file, whatever the model
    has. ``None`` for modules where that does not matter.

    Args:
        local: The path inside the transformer.
        others: Those of all modules in the file.
    """
    match = CONTEXT.fullmatch(local)
    if match is None:
        return None
    following = f"joint_blocks.{int(match['number']) + 1}"
    return not any(other.startswith(following) for other in others)
