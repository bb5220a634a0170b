"""The names of live models are those of the installed transformers, and merges are PEFT's.

``transformers_sweep`` does the same for every class that can be made small; run it as a program
for its table.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tiny_transformers as tiny
import torch
import transformers
import transformers_sweep as sweep
import transformers_table as made
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import (
    GroupWeightRename,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

import loratool
from loratool.names.transformers import naming_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EVERY = 20
"""Of the classes that can be built, each of so many is compared name by name."""
EVERY_TYPE = 30
"""Of the model types, each of so many is built."""
MERGED = {
    "aria_text": "AriaTextForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "detr": "DetrForObjectDetection",
    "gte": "GteForMaskedLM",
    "hrm_text": "HrmTextForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "inkling2_text": "Inkling2ForCausalLM",
    "inkling_text": "InklingForCausalLM",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "molmo2_text": "Molmo2TextModel",
    "nemotron_h": "NemotronHForCausalLM",
    "nomic_bert": "NomicBertForMaskedLM",
    "segformer": "SegformerForSemanticSegmentation",
    "swin": "SwinForImageClassification",
}


def stored() -> dict[str, object]:
    found: dict[str, object] = json.loads(made.TABLE.read_text(encoding="utf-8"))
    return found


def test_the_rules_are_those_of_the_installed_transformers() -> None:
    found, rules = stored(), made.rules()
    known = found["rules"]
    assert isinstance(known, dict)
    missing, gone = sorted(rules.keys() - known.keys()), sorted(known.keys() - rules.keys())
    changed = sorted(name for name in rules.keys() & known.keys() if rules[name] != known[name])
    again = "run tests/support/transformers_table.py"
    assert not (missing or gone or changed), f"{missing=} {gone=} {changed=}: {again}"
    assert found["transformers"] == transformers.__version__, again


def test_the_models_inside_of_models_are_those_of_the_installed_transformers() -> None:
    found = stored()
    known = found["classes"]
    assert isinstance(known, dict)
    model_types = dict.fromkeys((*tiny.model_types()[::EVERY_TYPE], *MERGED))
    classes, built, _ = made.trees(model_types)
    again = "run tests/support/transformers_table.py"
    for name in sorted(built):
        assert known.get(name) == classes.get(name), f"{name}: {again}"
    assert len(built) > 40


def test_names_are_turned_as_transformers_turns_them() -> None:
    classes = 0
    for index, (model_type, _, name) in enumerate(tiny.all_classes()):
        if index % EVERY and model_type not in MERGED:
            continue
        try:
            with torch.device("meta"):
                model = getattr(transformers, name)._from_config(tiny.tiny_config(model_type))
            files = list(revert_weight_conversion(model, dict(model.state_dict())))
        except Exception:
            continue  # it needs another library, or sizes of its own
        rules = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        naming = naming_of(model.config.to_dict() | {"architectures": [name]})
        assert (naming is None) == (not rules), name
        if naming is None:
            continue
        classes += 1
        renamings = [one for one in rules if isinstance(one, WeightRenaming)]
        converters = [one for one in rules if isinstance(one, WeightConverter)]
        for one in renamings:
            if isinstance(one, GroupWeightRename):
                one._active = True  # as for files that have the names it starts from
        for key in (*files, *model.state_dict()):
            expected, _ = rename_source_key(key, renamings, converters)
            assert naming.live(key).names[0] == expected, f"{name}: {key}"
    assert classes >= 15


@pytest.mark.parametrize("model_type", MERGED)
def test_merges_are_peft_s(model_type: str) -> None:
    found = sweep.sweep_class(model_type, MERGED[model_type], ("live", "files", "old"))
    told = {one.version: (one.outcome, one.why) for one in found}
    assert told["live"] == ("right", ""), told
    for version in ("files", "old"):
        assert told[version][0] == "right" or "names of the live model" in told[version][1], told


EXPERTS = {
    "mixtral": ("MixtralForCausalLM", ["w1", "w2", "w3"]),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", ["gate_proj", "up_proj", "down_proj"]),
}
"""Models with several experts, and with one: their classes, and the projections of an expert."""


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_apart_and_fused_by_peft_merge_alike(model_type: str, tmp_path: Path) -> None:
    name, leaves = EXPERTS[model_type]
    tiny.build(name, tiny.tiny_config(model_type)).save_pretrained(tmp_path / "base")
    model = sweep.load(name, tmp_path / "base")
    factors = {}
    for key, weight in load_file(tmp_path / "base" / "model.safetensors").items():
        if ".experts." in key:
            module = f"base_model.model.{key.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(3, weight.shape[1])
            factors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 3)
    apart, fused = tmp_path / "apart", tmp_path / "fused"
    apart.mkdir()
    save_file(factors, apart / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": leaves}
    (apart / "adapter_config.json").write_text(json.dumps(config))
    adapted = peft.PeftModel.from_pretrained(model, str(apart))
    adapted.save_pretrained(str(fused))
    ranks = {key: len(v) for key, v in load_file(fused / "adapter_model.safetensors").items()}
    gate_up = next(rows for key, rows in ranks.items() if "experts.base_layer.lora_A" in key)
    down = next(rows for key, rows in ranks.items() if "experts.lora_A" in key)
    assert gate_up == 2 * down  # PEFT keeps the ranks of gate and up apart
    truth = adapted.merge_and_unload().state_dict()
    for adapter in (apart, fused):
        loratool.merge(tmp_path / "base", [adapter], output=tmp_path / f"of {adapter.name}")
        found = sweep.load(name, tmp_path / f"of {adapter.name}").state_dict()
        for key, weight in truth.items():
            torch.testing.assert_close(found[key], weight, msg=f"{adapter.name}: {key}")
