"""Any model of the installed transformers, tiny: its classes, and a generic way to shrink one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["KINDS", "all_classes", "build", "classes_of", "model_types", "tiny_config"]

KINDS: Final = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "objects": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "segments": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "universal": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "zero-shot": "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",
    "plain": "MODEL_MAPPING_NAMES",
}
"""The kinds of models: a class of a model type is looked for in each; ``plain`` comes last."""

SIZES: Final = (
    (
        r"(num_)?(hidden_|encoder_|decoder_)?layers|n_layers?|depth|num_.*_(layers|blocks)|.*n_layer",
        2,
    ),
    (r".*(num_key_value_heads|kv_heads|kv_n_heads|num_kv_heads|attention_groups)|head_kv", 2),
    (r".*(attention_heads|num_heads|n_heads?|decoder_heads|encoder_heads|heads)", 4),
    (r".*(head_dim|head_size|d_kv|d_head|attention_head_size|dim_head)", 8),
    (r"q_lora_rank|kv_lora_rank|.*_lora_rank", 12),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim", 8),
    (
        r".*(intermediate|ffn|d_ff|n_inner|feed_?forward|mlp_hidden|d_inner|shared_expert).*"
        r"(size|dim|d_ff|n_inner|length)?",
        48,
    ),
    (r".*(num_experts_per_tok|top_?k|moe_k|num_experts_per_token|num_selected_experts)", 2),
    (r"n_group|topk_group|num_expert_groups|n_groups", 1),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)", 4),
    (r".*vocab_size", 99),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size", 8),
    (r"max_position_embeddings|n_positions|max_.*positions|n_ctx|max_length|max_seq.*", 64),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|model_dim|emb_dim|dim|projection_dim|"
        r"width|embedding_size|output_dim|hidden_channels|decoder_hidden_size|embed_size)",
        32,
    ),
)
"""Sizes by the names of the attributes that have them; the first that fits holds."""
TOKEN: Final = re.compile(r".*_token(_id|_index|_ids)?|.*_token_id.*|.*token_index")
LISTED: Final = re.compile(r".*(sizes?|dims?|channels|planes|widths?|hidden|features|embed.*)$")


TIMM: Final = ("detr", "conditional_detr", "deformable_detr", "dab-detr", "table-transformer")
"""Models whose backbone is timm's by default; they have transformers' ResNet here."""
CHANGES: Final[dict[str, dict[str, Any]]] = {
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "esm": {"vocab_size": 33},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "reformer": {"axial_pos_embds_dim": [16, 16]},
    "beit": {
        "num_hidden_layers": 4,
        "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
        "out_indices": [1, 2, 3, 4],
    },
}


def model_types() -> list[str]:
    """Return every model type that has a class, in order."""
    found: set[str] = set()
    for mapping in KINDS.values():
        found |= set(getattr(modeling_auto, mapping))
    return sorted(found & set(CONFIG_MAPPING))


def classes_of(model_type: str) -> dict[str, str]:
    """Return the classes of a model type by their kind; the plain one only if it is alone."""
    found: dict[str, str] = {}
    for kind, mapping in KINDS.items():
        name = getattr(modeling_auto, mapping).get(model_type)
        for one in [name] if isinstance(name, str) else (name or ())[:1]:
            if one not in found.values() and not (kind == "plain" and found):
                found[kind] = one
    return found


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a configuration of a model type with small sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[model_type](**_alike(model_type))
        _shrink(config, seen=set())
        for key, value in (CHANGES.get(model_type, {}) | changes).items():
            setattr(config, key, value)
        if getattr(config, "use_timm_backbone", False) or model_type in TIMM:
            config.use_timm_backbone = False
            config.backbone = None
            config.backbone_config = CONFIG_MAPPING["resnet"](
                embedding_size=8,
                hidden_sizes=[8, 8, 8, 8],
                depths=[1, 1, 1, 1],
                out_features=["stage2", "stage3", "stage4"],
            )
        try:
            return type(config).from_dict(config.to_dict())  # what is derived, derived again
        except Exception:
            return config


def _alike(model_type: str) -> dict[str, Any]:
    """Return settings with which all layers of a configuration are alike."""
    kind = CONFIG_MAPPING[model_type]
    if "gemma4" not in model_type and "embedding_gemma2" not in model_type:
        return {}
    if "text_config" in getattr(kind, "sub_configs", {}):
        return {"text_config": {"per_layer_config": {}}}
    return {"per_layer_config": {}} if model_type.endswith("_text") else {}


def _shrink(config: Any, seen: set[int]) -> None:
    if id(config) in seen:
        return
    seen.add(id(config))
    for kind in type(config).__mro__:  # sizes need not fit for a forward pass
        if "__class_validators__" in vars(kind):
            kind.__class_validators__ = []  # type: ignore[attr-defined]
    before = dict(vars(config))
    names = {config.attribute_map.get(name, name) for name in before}
    for name in sorted(names | set(before)):
        value = before.get(name)
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value, seen)
            continue
        new = _small(name, value)
        if new is not value:
            try:
                setattr(config, name, new)
            except Exception:
                continue
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = None
    heads = before.get("num_attention_heads")
    heads = min(heads, 4) if isinstance(heads, int) else None
    if heads and "num_key_value_heads" in before and before["num_key_value_heads"] is None:
        config.num_key_value_heads = heads
    if "head_dim" in before and before["head_dim"] is None and isinstance(heads, int):
        config.head_dim = getattr(config, "hidden_size", 32) // heads
    rope = before.get("rope_parameters")
    if isinstance(rope, dict) and ("mrope_section" in rope or "ernie4_5_vl" in config.model_type):
        config.rope_parameters = rope | {"mrope_section": [1, 1, 2]}
    if "vocab_size_per_layer_input" in before:
        config.vocab_size_per_layer_input = getattr(config, "vocab_size", 99)
    if isinstance(before.get("stage_names"), list):
        count = len(before.get("depths") or ()) or getattr(config, "num_hidden_layers", 2)
        stem = [name for name in before["stage_names"][:1] if name == "stem"]
        config.stage_names = [*stem, *(f"stage{i + 1}" for i in range(count))]
        config._out_features, config._out_indices = [f"stage{count}"], [count - (not stem)]
    layers = next((v for n, v in before.items() if n in ("num_hidden_layers", "n_layer")), None)
    count = getattr(config, "num_hidden_layers", None)
    for name, value in before.items():
        if isinstance(value, list) and isinstance(count, int) and len(value) == layers:
            setattr(config, name, _spread(value, count))


def _spread(values: list[Any], count: int) -> list[Any]:
    """Return ``count`` of the values, of different kinds if there are such."""
    try:
        kinds = list(dict.fromkeys(values))
    except TypeError:
        return values[:count]
    return (kinds + values)[:count] if len(kinds) <= count else values[:count]


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if TOKEN.fullmatch(name):
            return value % 90
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                return min(value, size) if value > 0 else value
        return value
    if isinstance(value, tuple):
        return type(value)(_small(name, list(value)))
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        if re.fullmatch(r"depths|num_blocks|layers|num_.*blocks", name):
            return [1 for _ in value]
        if re.search(r"heads", name):
            return [min(one, 2) for one in value]
        if LISTED.fullmatch(name) and max(value) > 32:
            return [16 if one <= sum(value) / len(value) else 32 for one in value]
    return value


def build(class_name: str, config: Any, *, seed: int = 0, most: int = 16_000_000) -> nn.Module:
    """Return a model of a class with random weights.

    Raises:
        ValueError: It has more than ``most`` parameters.
    """
    kind = getattr(transformers, class_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            size = sum(p.numel() for p in kind._from_config(config).parameters())
        if size > most:
            raise ValueError(f"too large to shrink: {size} parameters")
        model = kind._from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.float().eval()


def all_classes() -> Iterator[tuple[str, str, str]]:
    """Yield model type, kind and class of every class."""
    for model_type in model_types():
        for kind, name in classes_of(model_type).items():
            yield model_type, kind, name
