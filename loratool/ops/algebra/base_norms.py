"""How large the weights of a base are that an adapter changes."""

from __future__ import annotations

import math
from pathlib import Path

from loratool.adapter.model import Adapter
from loratool.files.checkpoint import open_checkpoint
from loratool.files.inputs import InputFiles
from loratool.files.spec import StoredTensor
from loratool.math.namespace import squared_norm
from loratool.ops.algebra.joining import module_name
from loratool.ops.merging.context import BaseView
from loratool.ops.merging.experts import assign_parameters
from loratool.ops.merging.mergeable import check_base
from loratool.ops.merging.replication import layer_ranges, replicate
from loratool.ops.merging.sites import locate_site
from loratool.ops.merging.tied import find_tie
from loratool.values.rows import StoredRows

__all__ = ["weight_norms"]

BLOCK_ELEMENTS = 1 << 22


def weight_norms(adapter: Adapter, path: Path) -> dict[str, float]:
    """Return ``‖W‖_F`` of the weight that each module adapts, by the module's name.

    Raises:
        LoratoolError: The base cannot be read, lacks a module, or is quantised.
    """
    checkpoint = open_checkpoint(path)
    check_base(checkpoint)
    layers = layer_ranges(adapter.field("layer_replication"), adapter.path)
    base = BaseView(checkpoint, replicate(checkpoint, layers) if layers else None)
    tie = find_tie(base)
    hidden = tie if tie is not None and not tie.is_stored else None
    head = (hidden.head, base.shape(hidden.embedding)) if hidden else None
    assigned = assign_parameters(adapter, base)
    files = InputFiles({shard.path: shard.stamp for shard in checkpoint.shards})
    known: dict[str, float] = {}
    norms: dict[str, float] = {}
    try:
        for site in adapter.sites:
            squares = []
            for name in {name for name, _ in locate_site(site, adapter, base, assigned, head)}:
                stored = hidden.embedding if hidden and name == hidden.head else name
                if stored not in known:
                    known[stored] = _squared_norm(base.tensors[stored], files)
                squares.append(known[stored])
            norms[module_name(site)] = math.sqrt(math.fsum(squares))
    finally:
        files.close()
    return norms


def _squared_norm(stored: StoredTensor, files: InputFiles) -> float:
    spec = stored.spec
    width = spec.elements // spec.shape[0] if spec.shape else 1
    reader = StoredRows(stored, width, files)
    rows = spec.elements // width
    step = max(1, BLOCK_ELEMENTS // width)
    blocks = (reader.rows(start, min(step, rows - start)) for start in range(0, rows, step))
    return math.fsum(squared_norm(block) for block in blocks)
