"""The names of XLabs' trainer of Flux.1: an attention processor in each block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Final

from loratool.names.families import family_named
from loratool.names.family import Family, Fusion, Row

__all__ = ["MODULES", "native_of", "xlabs"]

MODULES: Final = (
    r"double_blocks\.\d+\.processor\.(qkv|proj)_lora[12]"
    r"|single_blocks\.\d+\.processor\.(qkv|proj)_lora"
)
"""What its modules look like."""

NATIVE: Final = {
    "double_blocks.*.processor.qkv_lora1": "double_blocks.*.img_attn.qkv",
    "double_blocks.*.processor.qkv_lora2": "double_blocks.*.txt_attn.qkv",
    "double_blocks.*.processor.proj_lora1": "double_blocks.*.img_attn.proj",
    "double_blocks.*.processor.proj_lora2": "double_blocks.*.txt_attn.proj",
    "single_blocks.*.processor.qkv_lora": "single_blocks.*.linear1_qkv",
    "single_blocks.*.processor.proj_lora": "single_blocks.*.linear2",
}
"""What the checkpoint calls them, or ComfyUI what is a part there; 1 is the image, 2 the text.

The queries, keys and values of a single block are the first rows of its ``linear1``; the
projection is all of its ``linear2``, with the inputs of the feed-forward layer too.
"""

NUMBER: Final = re.compile(r"(?<=_blocks\.)\d+")


@cache
def xlabs() -> Family:
    """Return Flux.1 by these names: its attention, and nothing else."""
    flux = family_named("flux")
    return flux.recut(_rows(flux))


def _rows(flux: Family) -> Iterator[Row]:
    table = {row.native: row for row in (*flux.rows, *flux.others)}
    for name, native in NATIVE.items():
        row = table[native]
        yield Row(name, Fusion(row.hub.modules), row.count)


def native_of(name: str) -> str | None:
    """Return the checkpoint's name of a module, ``None`` where there is none."""
    found = NUMBER.search(name)
    native = NATIVE.get(NUMBER.sub("*", name))
    return native.replace("*", found.group()) if native is not None and found else None
