"""vLLM: reads PEFT's files, but of the configuration only ``r`` and ``lora_alpha``."""

from __future__ import annotations

from typing import Final

from loratool.loaders.loader import Fate, Feature, Fusion, Loader, Mend, Rule
from loratool.loaders.scales import GLOBAL_STABILISED

__all__ = ["CLAIM", "LOADER"]

CLAIM: Final = {"for": "vllm"}

LOADER = Loader(
    name="vllm",
    title="vLLM",
    summary="PEFT's files with the scale in B, one rank, and no patterns",
    source="vllm/lora/peft_helper.py, lora_model.py, utils.py, config/lora.py",
    scheme="peft",
    reads=frozenset(("peft",)),
    tolerates={
        "module-path": "keys without 'base_model.model.', which older releases refuse and newer "
        "ones take as they are"
    },
    scale=GLOBAL_STABILISED,
    fold=True,
    uniform_rank=True,
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    default_rank=16,
    rank_option="--max-lora-rank",
    file_names=("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),
    required=("r", "lora_alpha", "target_modules"),
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
    fused="vLLM knows such a module only where the base itself has it in one (Phi-3)",
    wrapped=Rule(
        Fate.MISREAD,
        "vLLM checks only the last part of a name, finds no such module and serves the base",
        Mend.CONVERT,
    ),
    named=Rule(Fate.REFUSED, "vLLM takes lora_A.weight and lora_B.weight only", Mend.CONVERT),
    rules={
        Feature.DORA: Rule(Fate.REFUSED, "vLLM does not support DoRA", Mend.APPROXIMATE),
        Feature.BIASES: Rule(Fate.REFUSED, "vLLM does not support biases of adapters"),
        Feature.SAVED: Rule(Fate.REFUSED, "vLLM wants modules_to_save to be null"),
        Feature.NORMS: Rule(Fate.REFUSED, "vLLM reads factors only"),
        Feature.TOKEN_ROWS: Rule(Fate.REFUSED, "vLLM has no place for new values of tokens"),
        Feature.EMBEDDING: Rule(
            Fate.NOTED, "vLLM takes it where the base's vocabulary has just that size"
        ),
        Feature.HEAD: Rule(Fate.NOTED, "vLLM takes it for models that declare their head"),
        Feature.PARAMETERS: Rule(Fate.NOTED, "vLLM takes them for some mixtures of experts"),
        Feature.CONVOLUTION: Rule(Fate.REFUSED, "vLLM adapts linear layers and embeddings only"),
        Feature.COMPACT: Rule(Fate.REFUSED, "vLLM reads plain factors only", Mend.CONVERT),
        Feature.CP: Rule(Fate.REFUSED, "vLLM reads plain factors only"),
        Feature.LOHA: Rule(Fate.REFUSED, "vLLM reads LoRA only", Mend.TO_LORA),
        Feature.LOKR: Rule(Fate.REFUSED, "vLLM reads LoRA only", Mend.TO_LORA),
        Feature.BASE_DEPENDENT: Rule(Fate.REFUSED, "vLLM reads plain factors only"),
        Feature.UNFACTORED: Rule(Fate.REFUSED, "vLLM reads LoRA only", Mend.APPROXIMATE),
        Feature.CHANGED_BASE: Rule(
            Fate.MISREAD, "vLLM does not read init_lora_weights and serves it on the base as it is"
        ),
        Feature.CONDITIONAL: Rule(Fate.MISREAD, "vLLM applies it to every token"),
    },
)
