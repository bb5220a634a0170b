"""llama.cpp: its converter takes PEFT's files to GGUF, with one alpha for all modules.

The scheme ``gguf`` is what it makes of them, and needs no converter.
"""

from __future__ import annotations

from typing import Final

from loratool.loaders.loader import Fate, Feature, Fusion, Loader, Mend, Rule
from loratool.loaders.scales import GLOBAL_ALPHA

__all__ = ["CLAIM", "LOADER"]

CLAIM: Final = {"for": "llamacpp"}

LOADER = Loader(
    name="llamacpp",
    title="llama.cpp",
    summary="PEFT's files for convert_lora_to_gguf.py; --to gguf writes what it makes",
    source="llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.cpp",
    scheme="peft",
    reads=frozenset(("peft", "gguf")),
    direct=frozenset(("gguf",)),
    tolerates={
        "module-path": "keys without 'base_model.model.', which llama.cpp's converter takes as "
        "they are; PEFT would apply nothing"
    },
    scale=GLOBAL_ALPHA,
    fold=True,
    uniform_rank=True,
    file_names=("adapter_model.safetensors", "adapter_model.bin"),
    required=("lora_alpha",),
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
    fused="llama.cpp has such a tensor only where the base itself has it in one (Phi-3)",
    wrapped=Rule(Fate.REFUSED, "llama.cpp's converter knows no such tensors", Mend.CONVERT),
    named=Rule(
        Fate.REFUSED,
        "llama.cpp's converter takes lora_A.weight and lora_B.weight only",
        Mend.CONVERT,
    ),
    rules={
        Feature.DORA: Rule(
            Fate.REFUSED, "llama.cpp's converter stops at magnitudes", Mend.APPROXIMATE
        ),
        Feature.BIASES: Rule(Fate.REFUSED, "llama.cpp's converter stops at biases"),
        Feature.SAVED: Rule(Fate.REFUSED, "llama.cpp's converter stops at whole weights"),
        Feature.NORMS: Rule(
            Fate.MISREAD, "llama.cpp's converter keeps them, and nothing reads them"
        ),
        Feature.TOKEN_ROWS: Rule(Fate.REFUSED, "llama.cpp's converter stops at trained tokens"),
        Feature.HEAD: Rule(
            Fate.NOTED, "llama.cpp's converter stops where the base ties its head to the embedding"
        ),
        Feature.PARAMETERS: Rule(Fate.REFUSED, "llama.cpp's converter does not read them"),
        Feature.CONVOLUTION: Rule(Fate.REFUSED, "llama.cpp's converter takes matrices only"),
        Feature.COMPACT: Rule(
            Fate.REFUSED, "llama.cpp's converter reads plain factors only", Mend.CONVERT
        ),
        Feature.CP: Rule(Fate.REFUSED, "llama.cpp's converter reads plain factors only"),
        Feature.LOHA: Rule(Fate.REFUSED, "llama.cpp's converter reads LoRA only", Mend.TO_LORA),
        Feature.LOKR: Rule(Fate.REFUSED, "llama.cpp's converter reads LoRA only", Mend.TO_LORA),
        Feature.BASE_DEPENDENT: Rule(
            Fate.REFUSED, "llama.cpp's converter reads plain factors only"
        ),
        Feature.UNFACTORED: Rule(
            Fate.REFUSED, "llama.cpp's converter reads LoRA only", Mend.APPROXIMATE
        ),
        Feature.CHANGED_BASE: Rule(
            Fate.MISREAD,
            "llama.cpp's converter does not read init_lora_weights; it is added to the base as it "
            "is",
        ),
    },
)
