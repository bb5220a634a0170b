"""litgpt's names of the modules of language models; queries, keys and values are in one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.gguf import plain_path
from loratool.names.paths.component import EachAlone

__all__ = ["FUSED", "SIDES", "LitgptPaths", "side_of"]

LEAVES: Final = {
    "attn.qkv.q": "self_attn.q_proj",
    "attn.qkv.k": "self_attn.k_proj",
    "attn.qkv.v": "self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""Modules of a layer of Llama's kind; q, k and v are parts of one."""
SIDES: Final = ("q", "k", "v")
FUSED: Final = "attn.qkv"
LAYER: Final = re.compile(r"transformer\.h\.(?P<layer>\d+)\.(?P<leaf>.+)", re.DOTALL)
HUB_LAYER: Final = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<leaf>.+)", re.DOTALL)
PLAIN_MLP: Final = re.compile(r"mlp\.(fc|experts\.|gate$)")
"""What models of another kind than Llama's have."""


def side_of(module: str) -> tuple[str, str] | None:
    """Return the fused module that a projection of transformers is in, and which of its parts."""
    match = HUB_LAYER.fullmatch(plain_path(module))
    if match is None or not match["leaf"].startswith("self_attn."):
        return None
    side = match["leaf"].removeprefix("self_attn.").removesuffix("_proj")
    found = f"transformer.h.{match['layer']}.{FUSED}"
    return (found, side) if side in SIDES and match["leaf"].endswith("_proj") else None


@dataclass(frozen=True)
class LitgptPaths(EachAlone):
    """``transformer.h.0.attn.qkv``.

    Attributes:
        kind: What the configuration calls the model; empty where nothing says that its modules
            are not those of Llama's kind.
    """

    is_dotted: bool = True
    keeps_unknown: bool = True
    kind: str = ""

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return what litgpt calls a module.

        Raises:
            UnsupportedError: It has none of that kind.
        """
        if context.accepts(module):
            return module
        plain = plain_path(module)
        match = HUB_LAYER.fullmatch(plain)
        names = {hub: own for own, hub in LEAVES.items()}
        leaf = names.get(match["leaf"]) if match is not None else None
        if plain == "lm_head":
            return plain
        if match is None or leaf is None or self.kind:
            what = f" ({self.kind})" if self.kind else ""
            raise UnsupportedError(
                module,
                f"is no module of a model of Llama's kind{what}, and others are not written for "
                "litgpt",
                hint=f"leave it out with {option('--drop', pattern_for([module], [module]))}, or "
                "merge the adapter into its base instead",
            )
        return f"transformer.h.{match['layer']}.{leaf}"

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the modules of transformers; those of the base, if it is given."""
        own = {plain_path(path): path for path in base}
        is_plain = any(
            (match := LAYER.fullmatch(site.module))
            and PLAIN_MLP.match(match["leaf"])
            and not match["leaf"].startswith(("mlp.fc_1", "mlp.fc_2"))
            for site in sites
        )
        found: dict[str, tuple[str, ...]] = {}
        for site in sites:
            path = "" if self.kind or is_plain else self._path(site.module)
            found[site.module] = (own.get(path, path),) if path else ()
        return Names(found)

    def _path(self, module: str) -> str:
        match = LAYER.fullmatch(module)
        if match is None:
            return module if module == "lm_head" else ""
        leaf = LEAVES.get(match["leaf"].replace("attn.attn.", "attn.qkv."))
        return f"model.layers.{match['layer']}.{leaf}" if leaf else ""

    def refusal(self, count: int) -> str | None:
        """Return what is missing, or why it is not read."""
        if self.kind:
            return f"{count} modules are of a model of another kind than Llama's: {self.kind}"
        return (
            f"{count} modules are not known: they fuse queries, keys and values, and which of them "
            "are adapted, or how many rows each has, nothing tells (hyperparameters.yaml and "
            "model_config.yaml beside the file, or --base and --enable-lora such as 1,0,1), or "
            "the model is of another kind than Llama's"
        )
