"""diffusers: PEFT's keys behind a component; its converters of other schemes lose things."""

from __future__ import annotations

from loratool.ops.targets.target import Fate, Feature, Mend, Rule, ScaleReading, Target

__all__ = ["TARGET"]

NO_LYCORIS = "diffusers reads A and B only"

TARGET = Target(
    name="diffusers",
    title="diffusers",
    summary="PEFT's keys behind unet., transformer., text_encoder., with the scale in B",
    source="diffusers: loaders/lora_conversion_utils.py, loaders/lora_pipeline.py",
    scheme="diffusers",
    reads=frozenset(("diffusers", "diffusers-legacy", "kohya")),
    tolerates={
        "comfy": "names of the original checkpoint, which diffusers converts for some models"
    },
    scale=ScaleReading.DIFFUSERS,
    fold=True,
    rules={
        Feature.DORA: Rule(
            Fate.MISREAD,
            "diffusers strips the magnitudes with a warning and applies a plain LoRA",
            Mend.APPROXIMATE,
        ),
        Feature.LOHA: Rule(Fate.REFUSED, NO_LYCORIS, Mend.TO_LORA),
        Feature.LOKR: Rule(Fate.REFUSED, NO_LYCORIS, Mend.TO_LORA),
        Feature.CP: Rule(Fate.REFUSED, "diffusers does not read lora_mid", Mend.TO_LORA),
        Feature.UNFACTORED: Rule(Fate.REFUSED, NO_LYCORIS, Mend.APPROXIMATE),
        Feature.BIASES: Rule(Fate.NOTED, "diffusers' converters drop diff_b for most models"),
        Feature.SAVED: Rule(Fate.MISREAD, "diffusers leaves them out"),
        Feature.NORMS: Rule(Fate.MISREAD, "diffusers leaves them out"),
        Feature.TOKEN_ROWS: Rule(Fate.MISREAD, "diffusers leaves them out"),
        Feature.BASE_DEPENDENT: Rule(Fate.MISREAD, "diffusers adds its factors as a plain LoRA"),
        Feature.PARAMETERS: Rule(Fate.MISREAD, "diffusers leaves them out"),
    },
)
