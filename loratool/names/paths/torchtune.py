"""torchtune's names of the modules of language models, and its order of the rows of some."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.gguf import Attention, plain_path
from loratool.names.paths.component import EachAlone

__all__ = ["BASE_HINT", "TorchtunePaths", "is_paired"]

LEAVES: Final = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""Modules of a layer, and what transformers calls them."""
WHOLE: Final = {"output": "lm_head"}
LAYER: Final = re.compile(r"layers\.(?P<layer>\d+)\.(?P<leaf>.+)", re.DOTALL)
HUB_LAYER: Final = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<leaf>.+)", re.DOTALL)
PAIRED: Final = re.compile(r"(?:^|\.)layers\.\d+\.(self_)?attn\.(?P<side>[qk])_proj")
BASE_HINT: Final = "give --base BASE: the model, or the folder with its config.json"


def is_paired(module: str) -> bool:
    """Whether a module makes queries or keys, whose rows rotary embeddings pair."""
    return PAIRED.search(module) is not None


@dataclass(frozen=True)
class TorchtunePaths(EachAlone):
    """``layers.0.attn.q_proj``; queries and keys keep this name until their heads are known.

    Attributes:
        attention: The attention heads, where something tells them.
        permutes: Whether torchtune has their rows in pairs; ``None`` where nothing tells.
    """

    is_dotted: bool = True
    keeps_unknown: bool = True
    attention: Attention | None = None
    permutes: bool | None = None

    @property
    def knows_rows(self) -> bool:
        """Whether the order of the rows of queries and keys is known."""
        return self.permutes is False or (self.permutes is True and self.attention is not None)

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return what torchtune calls a module.

        Raises:
            UnsupportedError: It has none of that kind, or nothing tells how its rows lie.
        """
        if context.accepts(module):
            return module
        plain = plain_path(module)
        match = HUB_LAYER.fullmatch(plain)
        names = {hub: own for own, hub in LEAVES.items()}
        if match is not None and match["leaf"] in names:
            found = f"layers.{match['layer']}.{names[match['leaf']]}"
        else:
            found = next((own for own, hub in WHOLE.items() if hub == plain), "")
        if not found:
            raise UnsupportedError(
                module,
                "is no module of torchtune's language models",
                hint=f"leave it out with {option('--drop', pattern_for([module], [module]))}, or "
                "merge the adapter into its base instead",
            )
        if is_paired(found) and not self.knows_rows:
            raise UnsupportedError(
                module,
                "has rows in an order of torchtune's own in some models, and nothing tells which "
                "this is, or it is none that is known",
                hint=BASE_HINT,
            )
        return found

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the modules of transformers; those of the base, if it is given."""
        own = {plain_path(path): path for path in base}
        found = {}
        for site in sites:
            path = self._path(site.module)
            found[site.module] = (own.get(path, path),) if path else ()
        return Names(found)

    def _path(self, module: str) -> str:
        if is_paired(module) and not self.knows_rows:
            return ""
        match = LAYER.fullmatch(module)
        if match is None:
            return WHOLE.get(module, "")
        leaf = LEAVES.get(match["leaf"])
        return f"model.layers.{match['layer']}.{leaf}" if leaf else ""

    def refusal(self, count: int) -> str | None:
        """Return what is missing."""
        if self.knows_rows:
            return f"{count} modules are none of torchtune's language models"
        return (
            f"the rows of {count} modules are in an order that the kind of model and its "
            f"attention heads decide ({BASE_HINT})"
        )
