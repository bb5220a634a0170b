"""The kinds of model that litgpt has, and what transformers calls their modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from loratool.names.gguf import architecture_of, plain_path

__all__ = ["LLAMA", "SIDES", "WHOLE", "Kind", "kind_beside", "kind_of"]

SIDES: Final = ("q", "k", "v")
FUSED: Final = "attn.qkv"
WHOLE: Final = "attn.qkv.whole"
"""Queries, keys and values with their rows in the order of transformers."""
LAYER: Final = re.compile(r"transformer\.h\.(?P<layer>[0-9]{1,9})\.(?P<leaf>.+)", re.DOTALL)
INSIDE: Final = re.compile(r"([0-9]{1,9})\.(.+)", re.DOTALL)
EXPERT: Final = re.compile(r"(?<=\.experts\.)[0-9]{1,9}(?=\.)")
OLDER: Final = "attn.attn"
"""What ``attn.qkv`` was called before, with its rows in another order."""


@dataclass(frozen=True)
class Kind:
    """Models whose modules have the same names.

    Attributes:
        layers: Where transformers has the layers.
        leaves: What transformers calls modules of a layer, by what litgpt does; ``*`` stands for
            the number of an expert.
        head: What transformers calls the head.
        cut: Projections of transformers that are several in litgpt, in the order of their rows.
        by_groups: Whether the rows of queries, keys and values alternate in transformers, group by
            group of heads, which makes all of them one module. litgpt has them one after another.
    """

    layers: str
    leaves: Mapping[str, str]
    head: str = "lm_head"
    cut: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_groups: bool = False

    @cached_property
    def _own(self) -> dict[str, str]:
        return {hub: own for own, hub in self.leaves.items()}

    def hub(self, module: str) -> str:
        """Return what transformers calls a module of litgpt's; empty where there is none."""
        match = LAYER.fullmatch(module)
        if match is None:
            return self.head if module == "lm_head" else ""
        leaf = re.sub(rf"^{re.escape(OLDER)}(?=\.|$)", FUSED, match["leaf"])
        found = _with_expert(self.leaves, leaf)
        return f"{self.layers}.{match['layer']}.{found}" if found else ""

    def litgpt(self, module: str) -> str:
        """Return what litgpt calls a module of transformers; empty where there is none."""
        if module == self.head:
            return "lm_head"
        found = self._inside(module)
        own = _with_expert(self._own, found[1]) if found is not None else ""
        return f"transformer.h.{found[0]}.{own}" if found is not None and own else ""

    def parts(self, module: str) -> tuple[str, ...]:
        """Return what a projection of transformers is in litgpt, where that is several."""
        found = self._inside(module)
        names = self.cut.get(found[1], ()) if found is not None else ()
        return tuple(f"transformer.h.{found[0]}.{name}" for name in names) if found else ()

    def _inside(self, module: str) -> tuple[str, str] | None:
        """Return the number of a layer and the path in it."""
        plain, start = plain_path(module), f"{self.layers}."
        match = INSIDE.fullmatch(plain.removeprefix(start)) if plain.startswith(start) else None
        return (match[1], match[2]) if match is not None else None


def _with_expert(names: Mapping[str, str], leaf: str) -> str:
    number = EXPERT.search(leaf)
    found = names.get(EXPERT.sub("*", leaf), "")
    return found.replace("*", number[0]) if number is not None else found


APART: Final = {f"{FUSED}.{side}": f"self_attn.{side}_proj" for side in SIDES}
OUTPUT: Final = {"attn.proj": "self_attn.o_proj"}
GATED: Final = {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"}
PLAIN: Final = {"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
PARTS: Final = tuple(f"{FUSED}.{side}" for side in SIDES)

LLAMA: Final = Kind(
    "model.layers", APART | OUTPUT | {f"mlp.{own}": f"mlp.{hub}" for own, hub in GATED.items()}
)
MIXTRAL: Final = Kind(
    "model.layers",
    APART
    | OUTPUT
    | {"mlp.gate": "block_sparse_moe.gate"}
    | {
        f"mlp.experts.*.{own}": f"block_sparse_moe.experts.*.{hub}"
        for own, hub in (("fc_1", "w1"), ("fc_2", "w3"), ("proj", "w2"))
    },
)
QWEN3_MOE: Final = Kind(
    "model.layers",
    APART
    | OUTPUT
    | {"mlp.gate": "mlp.gate"}
    | {f"mlp.experts.*.{own}": f"mlp.experts.*.{hub}" for own, hub in GATED.items()},
)
PHI: Final = Kind(
    "model.layers",
    APART | {"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
)
PHI_3: Final = Kind(
    LLAMA.layers,
    LLAMA.leaves,
    cut={"self_attn.qkv_proj": PARTS, "mlp.gate_up_proj": ("mlp.fc_1", "mlp.fc_2")},
)
NEOX: Final = Kind(
    "gpt_neox.layers",
    {WHOLE: "attention.query_key_value", "attn.proj": "attention.dense"} | PLAIN,
    head="embed_out",
    cut={"attention.query_key_value": PARTS},
    by_groups=True,
)
FALCON: Final = Kind(
    "transformer.h",
    {WHOLE: "self_attention.query_key_value", "attn.proj": "self_attention.dense"} | PLAIN,
    cut={"self_attention.query_key_value": PARTS},
    by_groups=True,
)

CLASSES: Final = {
    "FalconForCausalLM": FALCON,
    "GPTNeoXForCausalLM": NEOX,
    "MixtralForCausalLM": MIXTRAL,
    "Phi3ForCausalLM": PHI_3,
    "PhiForCausalLM": PHI,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
}
LIKE_LLAMA: Final = frozenset(
    ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "mistral3")
)
"""llama.cpp's names of the kinds of model whose modules are those of Llama's."""


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """Return the kind of model that the configuration of transformers tells, if litgpt has it."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    found = CLASSES.get(first) if isinstance(first, str) else None
    architecture = architecture_of(config)
    if found is None and architecture is not None and architecture.name in LIKE_LLAMA:
        return LLAMA
    return found


def kind_beside(model: Mapping[str, Any]) -> Kind | None:
    """Return the kind of model that litgpt's ``model_config.yaml`` tells, if it does.

    litgpt itself goes by the name, then by the class of the MLP.
    """
    name, mlp = model.get("name"), model.get("mlp_class_name")
    is_gated = mlp in ("LLaMAMLP", "GemmaMLP")
    if not isinstance(name, str) or not name:
        return LLAMA if is_gated else None
    lower = name.lower()
    if "falcon" in lower:
        return FALCON if mlp in (None, "GptNeoxMLP") else LLAMA if is_gated else None
    if lower.startswith("phi"):
        return PHI_3 if is_gated else PHI
    if mlp == "LLaMAMoE":
        return QWEN3_MOE if lower.startswith("qwen3") else MIXTRAL
    return LLAMA if is_gated else NEOX
