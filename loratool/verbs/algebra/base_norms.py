"""How large the weights of a base are that an adapter changes."""

from __future__ import annotations

import math
from pathlib import Path

from loratool.adapter.model import Adapter
from loratool.base.experts import assign_parameters
from loratool.base.fitting import fit
from loratool.base.model import open_model
from loratool.base.refusals import check_base
from loratool.base.replication import layer_ranges
from loratool.codecs.weights import Weight
from loratool.files.inputs import InputFiles
from loratool.math.namespace import squared_norm
from loratool.values.rows import StoredRows
from loratool.verbs.algebra.modules import module_name

__all__ = ["weight_norms"]

BLOCK_ELEMENTS = 1 << 22


def weight_norms(adapter: Adapter, path: Path) -> dict[str, float]:
    """Return ``‖W‖_F`` of the weight that each module adapts, by the module's name.

    Raises:
        LoratoolError: The base cannot be read, lacks a module, or is quantised.
    """
    base = open_model(path)
    check_base(base)
    layers = layer_ranges(adapter.field("layer_replication"), adapter.path)
    base = base.as_trained(layers=layers)
    assigned = assign_parameters(adapter, base)
    files = InputFiles(base.stamps)
    known: dict[str, float] = {}
    norms: dict[str, float] = {}
    try:
        for site in adapter.sites:
            squares = []
            for name in {place.name for place in fit(site, adapter, base, assigned)}:
                stored = base.hidden.get(name, name)
                if stored not in known:
                    known[stored] = _squared_norm(base.tensors[stored], files)
                squares.append(known[stored])
            norms[module_name(site)] = math.sqrt(math.fsum(squares))
    finally:
        files.close()
    return norms


def _squared_norm(stored: Weight, files: InputFiles) -> float:
    spec = stored.spec
    width = spec.elements // spec.shape[0] if spec.shape else 1
    reader = StoredRows(stored, width, files)
    rows = spec.elements // width
    step = max(1, BLOCK_ELEMENTS // width)
    blocks = (reader.rows(start, min(step, rows - start)) for start in range(0, rows, step))
    return math.fsum(squared_norm(block) for block in blocks)
