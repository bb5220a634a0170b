"""mlx-lm: one rank and one multiplier for all modules, named relative to their block."""

from __future__ import annotations

from loratool.ops.targets.target import Fate, Feature, Mend, Rule, ScaleReading, Target

__all__ = ["TARGET"]

TARGET = Target(
    name="mlx",
    title="mlx-lm",
    summary="transposed factors of one rank, and the multiplier in adapter_config.json",
    source="mlx-lm: mlx_lm/tuner/utils.py, mlx_lm/tuner/lora.py",
    scheme="mlx",
    reads=frozenset(("mlx",)),
    scale=ScaleReading.MULTIPLIER,
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
