"""Megatron's names of the modules of language models of Llama's kind, fused as it has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from loratool.adapter.leaving import option, pattern_for
from loratool.adapter.model import Site
from loratool.adapter.scheme import Context, Names
from loratool.errors import UnsupportedError
from loratool.names.gguf import plain_path
from loratool.names.paths.component import EachAlone

__all__ = ["FUSED", "MegatronPaths", "part_of"]

LEAVES: Final = {
    "self_attention.linear_qkv.q": "self_attn.q_proj",
    "self_attention.linear_qkv.k": "self_attn.k_proj",
    "self_attention.linear_qkv.v": "self_attn.v_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc1.gate": "mlp.gate_proj",
    "mlp.linear_fc1.up": "mlp.up_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
FUSED: Final = {"linear_qkv": ("q", "k", "v"), "linear_fc1": ("gate", "up")}
"""Layers that are several projections of transformers, in the order of their rows."""
HUB_LAYER: Final = re.compile(r"model\.layers\.(?P<layer>[0-9]{1,9})\.(?P<leaf>.+)", re.DOTALL)
LAYER: Final = re.compile(
    r"(?:.+\.)?(?:decoder|encoder)\.layers\.(?P<layer>[0-9]{1,9})\.(?P<leaf>.+)", re.DOTALL
)
EXPERT: Final = re.compile(r"mlp\.experts\.(?P<number>[0-9]{1,9})\.(?P<leaf>linear_.+)", re.DOTALL)
WHOLE: Final = {"output_layer": "lm_head"}


@dataclass(frozen=True)
class MegatronPaths(EachAlone):
    """``decoder.layers.0.self_attention.linear_qkv``.

    Attributes:
        kind: What the model is, where its modules are not those of Llama's kind.
        experts: What transformers calls the layers of an expert, if it is known.
    """

    is_dotted: bool = True
    keeps_unknown: bool = True
    kind: str = ""
    experts: Mapping[str, str] = field(default_factory=dict)

    def name(self, module: str, component: str | None, local: str, context: Context) -> str:
        """Return what Megatron calls a module.

        Raises:
            UnsupportedError: It has none of that kind.
        """
        if context.accepts(module):
            return module
        plain = plain_path(module)
        match = HUB_LAYER.fullmatch(plain)
        leaf = next(
            (own for own, hub in LEAVES.items() if match is not None and hub == match["leaf"]), None
        )
        if match is not None and leaf is not None and not self.kind:
            return f"decoder.layers.{match['layer']}.{leaf}"
        whole = next((own for own, hub in WHOLE.items() if hub == plain), None)
        if whole is not None:
            return whole
        what = f" ({self.kind})" if self.kind else ""
        raise UnsupportedError(
            module,
            f"is no module of a model of Llama's kind{what}, and others are not written in "
            "Megatron's names",
            hint=f"leave it out with {option('--drop', pattern_for([module], [module]))}, or "
            "merge the adapter into its base instead",
        )

    def unspell(
        self, sites: Sequence[Site], metadata: Mapping[str, str], base: Collection[str]
    ) -> Names:
        """Return the modules of transformers; those of the base, if it is given."""
        own = {plain_path(path): path for path in base}
        found: dict[str, tuple[str, ...]] = {}
        for site in sites:
            path = "" if self.kind else self._path(site.module)
            found[site.module] = (own.get(path, path),) if path else ()
        return Names(found)

    def _path(self, module: str) -> str:
        match = LAYER.fullmatch(module)
        if match is None:
            return WHOLE.get(module.rpartition(".")[2], "")
        expert = EXPERT.fullmatch(match["leaf"])
        leaf = LEAVES.get(match["leaf"])
        if expert is not None and expert["leaf"] in self.experts:
            leaf = self.experts[expert["leaf"]].format(expert["number"])
        return f"model.layers.{match['layer']}.{leaf}" if leaf else ""

    def refusal(self, count: int) -> str | None:
        """Return what is missing, or why it is not read."""
        if self.kind:
            return f"{count} modules are of a model of another kind than Llama's: {self.kind}"
        return (
            f"{count} modules are not known: Megatron fuses queries, keys and values, and gate and "
            "up, and how many rows each has the attention heads and the activation of the base "
            "decide, and so they do how experts are called (give --base BASE: the model, or the "
            "folder with its config.json); experts on several ranks are not read"
        )


def part_of(module: str) -> tuple[str, str] | None:
    """Return the fused layer that a projection of transformers is in, and which of its parts."""
    match = HUB_LAYER.fullmatch(plain_path(module))
    leaf = next(
        (own for own, hub in LEAVES.items() if match is not None and hub == match["leaf"]), ""
    )
    fused, _, part = leaf.rpartition(".")
    if match is None or fused.rpartition(".")[2] not in FUSED:
        return None
    return f"decoder.layers.{match['layer']}.{fused}", part
