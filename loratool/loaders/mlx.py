"""mlx-lm: one rank and one multiplier for all modules, named relative to their block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter
from loratool.loaders.checks import MISREADS, NOTES, REFUSES, listed, mending, warning
from loratool.loaders.loader import Fate, Feature, Loader, Mend, Rule
from loratool.loaders.scales import MULTIPLIER

__all__ = ["CLAIM", "LOADER"]

CLAIM: Final = {"for": "mlx"}

BLOCK: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.([0-9]{1,9})\.(?P<local>.+)$", re.DOTALL)


def _blocks(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    """Yield what mlx-lm's configuration and the modules' places in the blocks say."""
    where = adapter.folder / "adapter_config.json"
    raw = (adapter.sidecar or {}).get("lora_parameters")
    parameters: dict[str, Any] = raw if isinstance(raw, dict) else {}
    missing = [name for name in ("rank", "scale", "dropout") if name not in parameters]
    if missing:
        yield finding(
            REFUSES, where, f"lora_parameters does not say {', '.join(missing)}", _redo(loader)
        )
    rank = parameters.get("rank")
    other = [
        s.label for s in adapter.sites if s.is_plain and isinstance(rank, int) and s.rank != rank
    ]
    if other and len({site.rank for site in adapter.sites}) == 1:
        yield finding(
            REFUSES,
            where,
            f"lora_parameters says rank {rank}, but the factors have {adapter.sites[0].rank}",
            _redo(loader),
        )
    matches = {site.module: BLOCK.search(site.module) for site in adapter.sites}
    keys = parameters.get("keys")
    if isinstance(keys, list):
        left = [
            module
            for module, match in matches.items()
            if module not in keys and (match is None or match["local"] not in keys)
        ]
        if left:
            yield finding(
                MISREADS,
                where,
                f"lora_parameters.keys does not name {listed(left)}: mlx-lm makes no layer for it",
                _redo(loader),
            )
    outside = [module for module, match in matches.items() if match is None]
    if outside:
        yield finding(
            NOTES,
            adapter.weights,
            f"has modules outside the blocks ({listed(outside)}): only newer releases of mlx-lm "
            "adapt them, by their full path in lora_parameters.keys",
        )
    yield from _uneven(adapter)


def _redo(loader: Loader) -> str:
    return f"write it anew: {mending(Mend.CONVERT, loader)}"


def _uneven(adapter: Adapter) -> Iterator[Finding]:
    blocks: dict[str, set[int]] = defaultdict(set)
    for site in adapter.sites:
        match = BLOCK.search(site.module)
        if match is not None:
            blocks[match["local"]].add(int(match[1]))
    every = set().union(*blocks.values()) if blocks else set()
    partial = sorted(local for local, numbers in blocks.items() if numbers != every)
    if partial:
        yield warning(
            MISREADS,
            adapter.weights,
            f"adapts {listed(partial)} in some of the {len(every)} blocks only: mlx-lm makes a "
            "layer in every one of them, and a strict loader misses its factors",
        )


LOADER = Loader(
    name="mlx",
    title="mlx-lm",
    summary="transposed factors of one rank, and the multiplier in adapter_config.json",
    source="mlx-lm: mlx_lm/tuner/utils.py, mlx_lm/tuner/lora.py",
    scheme="mlx",
    reads=frozenset(("mlx",)),
    scale=MULTIPLIER,
    checks=(_blocks,),
    fold=False,
    uniform_rank=True,
    mixed_ranks=Rule(
        Fate.REFUSED, "mlx-lm makes all modules with the rank of its configuration", Mend.CONVERT
    ),
    file_names=("adapters.safetensors",),
    rules={
        Feature.BIASES: Rule(Fate.REFUSED, "mlx-lm's layers have no bias of their own"),
        Feature.SAVED: Rule(Fate.REFUSED, "mlx-lm has no place for them beside the factors"),
        Feature.NORMS: Rule(Fate.REFUSED, "mlx-lm has no place for them beside the factors"),
        Feature.TOKEN_ROWS: Rule(Fate.REFUSED, "mlx-lm has no place for new values of tokens"),
        Feature.PARAMETERS: Rule(
            Fate.REFUSED, "mlx-lm stores the factors of experts as (experts, rank, in)"
        ),
        Feature.CONVOLUTION: Rule(Fate.REFUSED, "mlx-lm adapts linear layers and embeddings only"),
        Feature.CP: Rule(Fate.REFUSED, "mlx-lm reads plain factors only"),
        Feature.LOHA: Rule(Fate.REFUSED, "mlx-lm reads LoRA and DoRA only", Mend.TO_LORA),
        Feature.LOKR: Rule(Fate.REFUSED, "mlx-lm reads LoRA and DoRA only", Mend.TO_LORA),
        Feature.COMPACT: Rule(Fate.REFUSED, "mlx-lm reads plain factors only", Mend.CONVERT),
        Feature.BASE_DEPENDENT: Rule(Fate.REFUSED, "mlx-lm reads plain factors only"),
        Feature.UNFACTORED: Rule(Fate.REFUSED, "mlx-lm reads LoRA and DoRA only", Mend.APPROXIMATE),
        Feature.CHANGED_BASE: Rule(Fate.MISREAD, "mlx-lm adds it to the base as it is"),
        Feature.CONDITIONAL: Rule(Fate.MISREAD, "mlx-lm applies it to every token"),
    },
)
