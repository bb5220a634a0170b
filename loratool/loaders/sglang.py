"""SGLang: reads PEFT's files with one rank and ``lora_alpha / r``, whatever else is said."""

from __future__ import annotations

from typing import Final

from loratool.loaders.loader import Fate, Feature, Fusion, Loader, Mend, Rule
from loratool.loaders.scales import GLOBAL

__all__ = ["CLAIM", "LOADER"]

CLAIM: Final = {"for": "sglang"}

LOADER = Loader(
    name="sglang",
    title="SGLang",
    summary="PEFT's files with the scale in B, one rank, and no patterns",
    source="sglang/srt/lora/lora.py, lora_config.py, mem_pool.py, utils.py",
    scheme="peft",
    reads=frozenset(("peft",)),
    tolerates={
        "module-path": "keys without 'base_model.model.', which SGLang takes by their layer's "
        "number; PEFT would apply nothing"
    },
    scale=GLOBAL,
    fold=True,
    uniform_rank=True,
    mixed_ranks=Rule(
        Fate.REFUSED, "SGLang's buffers have the rank r of the configuration", Mend.CONVERT
    ),
    required=("r", "lora_alpha", "target_modules", "peft_type"),
    regex_targets=Rule(
        Fate.REFUSED, "SGLang takes a list, or the words 'all' and 'all-linear'", Mend.CONVERT
    ),
    config={
        "bias": "none",
        "lora_bias": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    },
    fusions={
        "qkv_proj": Fusion(("q_proj", "k_proj", "v_proj"), heads=True),
        "gate_up_proj": Fusion(("gate_proj", "up_proj")),
    },
    fused="SGLang knows such a module only where its own model has it under that name",
    rules={
        Feature.PATTERNS: Rule(
            Fate.REFUSED,
            "SGLang refuses patterns that change a value, and older releases ignore them",
            Mend.CONVERT,
        ),
        Feature.DORA: Rule(Fate.REFUSED, "SGLang has no place for magnitudes", Mend.APPROXIMATE),
        Feature.BIASES: Rule(Fate.MISREAD, "SGLang does not read biases"),
        Feature.SAVED: Rule(Fate.MISREAD, "SGLang does not read modules_to_save"),
        Feature.NORMS: Rule(Fate.MISREAD, "SGLang does not read whole weights"),
        Feature.TOKEN_ROWS: Rule(Fate.MISREAD, "SGLang does not read new values of tokens"),
        Feature.EMBEDDING: Rule(
            Fate.NOTED, "SGLang takes it where embed_tokens is among its target modules"
        ),
        Feature.HEAD: Rule(Fate.NOTED, "SGLang takes it where lm_head is among its target modules"),
        Feature.PARAMETERS: Rule(Fate.NOTED, "SGLang takes them in new releases only"),
        Feature.CONVOLUTION: Rule(Fate.REFUSED, "SGLang adapts linear layers and embeddings only"),
        Feature.COMPACT: Rule(Fate.REFUSED, "SGLang reads plain factors only", Mend.CONVERT),
        Feature.CP: Rule(Fate.REFUSED, "SGLang reads plain factors only"),
        Feature.LOHA: Rule(Fate.REFUSED, "SGLang reads LoRA only", Mend.TO_LORA),
        Feature.LOKR: Rule(Fate.REFUSED, "SGLang reads LoRA only", Mend.TO_LORA),
        Feature.BASE_DEPENDENT: Rule(Fate.REFUSED, "SGLang reads plain factors only"),
        Feature.UNFACTORED: Rule(Fate.REFUSED, "SGLang reads LoRA only", Mend.APPROXIMATE),
        Feature.CHANGED_BASE: Rule(
            Fate.MISREAD,
            "SGLang does not read init_lora_weights and serves it on the base as it is",
        ),
        Feature.CONDITIONAL: Rule(Fate.MISREAD, "SGLang applies it to every token"),
    },
)
