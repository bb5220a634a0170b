"""TensorRT-LLM's numbers of modules, and the modules of transformers that they are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import AdapterError, UnsupportedError
from loratool.names.gguf import plain_path
from loratool.names.paths.component import EachAlone

__all__ = ["LONGEST", "MODULE", "NUMBERS", "TrtllmPaths"]

MODULE: Final = re.compile(
    r"layer\.(?P<layer>[0-9]{1,9})\.module\.(?P<module>[0-9]{1,9})\.rank\.(?P<rank>[0-9]{1,9})(?P<dora>\.dora)?"
    r"(\.(?P<part>.+))?"
)
NUMBERS: Final = re.compile(
    r"layer\.(?P<layer>[0-9]{1,9})\.module\.(?P<module>[0-9]{1,9})", re.ASCII
)
"""A row whose halves are known."""
LEAVES: Final = {
    "0.q": "self_attn.q_proj",
    "0.k": "self_attn.k_proj",
    "0.v": "self_attn.v_proj",
    "1": "self_attn.q_proj",
    "2": "self_attn.k_proj",
    "3": "self_attn.v_proj",
    "4": "self_attn.o_proj",
    "5": "mlp.gate_proj",
    "5.up": "mlp.up_proj",
    "5.gate": "mlp.gate_proj",
    "6": "mlp.down_proj",
    "7": "mlp.up_proj",
    "18.up": "mlp.up_proj",
    "18.gate": "mlp.gate_proj",
}
"""attn_qkv, attn_q, attn_k, attn_v, attn_dense, mlp_h_to_4h, mlp_4h_to_h, mlp_gate, mlp_gate_up."""
WRITTEN: Final = {LEAVES[number]: number for number in ("1", "2", "3", "4", "5", "6", "7")}
"""Modules of a layer, and the numbers that they are written under."""
HUB_LAYER: Final = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<leaf>.+)", re.DOTALL)
LONGEST: Final = "longest"
"""Under which a site remembers how long the rows of its file are."""


@dataclass(frozen=True)
class TrtllmPaths(EachAlone):
    """Numbers of layers and modules; known once a base tells how many inputs each has."""

    is_dotted: bool = True
    keeps_unknown: bool = True

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return the numbers of a module's layer and of what it is there.

        Raises:
            UnsupportedError: It has none.
        """
        match = HUB_LAYER.fullmatch(plain_path(module))
        number = WRITTEN.get(match["leaf"]) if match is not None else None
        if match is None or number is None:
            raise UnsupportedError(
                module,
                "is no module of a model of Llama's kind, and others are not written for "
                "TensorRT-LLM",
                hint=f"leave it out with {option('--drop', pattern_for([module], [module]))}, or "
                "write PEFT's scheme, which TensorRT-LLM reads too: --to peft",
            )
        return f"layer.{match['layer']}.module.{number}"

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the modules of transformers; those of the base, if it is given.

        Raises:
            AdapterError: The longest row is not as long as the base makes it.
        """
        own = {plain_path(path): path for path in base}
        found: dict[str, tuple[str, ...]] = {}
        needed: dict[str, int] = defaultdict(int)
        longest = 0
        for site in sites:
            if plain := NUMBERS.fullmatch(site.module):
                leaf = LEAVES.get(plain["module"])
                path = f"model.layers.{plain['layer']}.{leaf}"
                found[site.module] = (own.get(path, path),) if leaf else ()
                continue
            match = MODULE.fullmatch(site.module)
            if match is None or LONGEST not in site.settings:
                found[site.module] = ()
                continue
            part = f".{match['part']}" if match["part"] else ""
            leaf = LEAVES.get(match["module"] + part)
            path = f"model.layers.{match['layer']}.{leaf}" if leaf else ""
            found[site.module] = (own.get(path, path),) if path else ()
            longest = site.settings[LONGEST]
            key = f"{match['layer']}.{match['module']}"
            both = [stored.spec.elements for stored in site.slots.values()]
            # The parts of a fused row share A.
            needed[key] += sum(both) if part[1:] in ("", "q", "up") else both[1]
        is_known = len(needed) == len({site.module.partition(".rank")[0] for site in sites})
        most = max(needed.values(), default=0)
        if is_known and most != longest:
            raise AdapterError(
                "the rows",
                f"are as long as {longest} numbers, of this base they would be {most}",
                hint="is this the base that it was trained on?",
                code="LT022",
            )
        return Names(found)

    def refusal(self, count: int) -> str | None:
        """Return what is missing."""
        return (
            f"{count} rows hold A and B one after the other, and how many inputs each module has "
            "the base tells (give --base BASE: a model of Llama's kind, or the folder with its "
            "config.json); attention across models and experts are not read"
        )
