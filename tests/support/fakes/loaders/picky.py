"""A loader of no real program: it wants no ``o_proj``, and takes every alpha for 1."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapter.findings import Finding, finding
from loratool.adapter.model import Adapter
from loratool.loaders.checks import REFUSES
from loratool.loaders.loader import Fate, Feature, Loader, Mend, Rule, ScaleReading

CLAIM = {"for": "picky"}


def _outputs(adapter: Adapter, loader: Loader) -> Iterator[Finding]:
    for site in adapter.sites:
        if site.module.endswith("o_proj"):
            yield finding(REFUSES, adapter.weights, f"has {site.module}")


LOADER = Loader(
    name="picky",
    title="Picky",
    summary="PEFT's files without o_proj, the scale in B",
    source="nowhere",
    scheme="module-path",
    reads=frozenset(("module-path",)),
    scale=ScaleReading("1, whatever the file says", lambda adapter: lambda site: 1.0),
    fold=True,
    checks=(_outputs,),
    rules={
        Feature.DORA: Rule(Fate.REFUSED, "Picky has no magnitudes", Mend.APPROXIMATE),
        Feature.LOHA: Rule(Fate.REFUSED, "Picky reads LoRA only", Mend.TO_LORA),
        Feature.EMBEDDING: Rule(Fate.NOTED, "Picky takes it on Sundays"),
    },
)
