"""A merged classifier loads in transformers, whatever layers its head is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import loratool
from loratool.errors import MergeError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "eos_token_id": 2,
}
DISTIL = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
XLNET = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48, "vocab_size": 60}
FUNNEL = {
    "d_model": 32,
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
    "n_head": 2,
    "d_head": 16,
    "d_inner": 48,
    "vocab_size": 60,
}
LLAMA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}
# family, configuration, head, PEFT's task, targets, what the adapter saves
CASES: dict[str, tuple[str, dict[str, Any], str, str, list[str], list[str]]] = {
    "distilbert": (
        "DistilBert",
        DISTIL,
        "SequenceClassification",
        "SEQ_CLS",
        ["q_lin"],
        ["pre_classifier", "classifier"],
    ),
    "distilbert tokens": (
        "DistilBert",
        DISTIL,
        "TokenClassification",
        "TOKEN_CLS",
        ["q_lin"],
        ["classifier"],
    ),
    "distilbert answers": (
        "DistilBert",
        DISTIL,
        "QuestionAnswering",
        "QUESTION_ANS",
        ["q_lin"],
        ["qa_outputs"],
    ),
    "bert": ("Bert", SMALL, "SequenceClassification", "SEQ_CLS", ["query"], ["classifier"]),
    "roberta": ("Roberta", SMALL, "SequenceClassification", "SEQ_CLS", ["query"], ["classifier"]),
    "electra": ("Electra", SMALL, "SequenceClassification", "SEQ_CLS", ["query"], ["classifier"]),
    "deberta": (
        "DebertaV2",
        SMALL | {"pooler_hidden_size": 32},
        "SequenceClassification",
        "SEQ_CLS",
        ["query_proj"],
        ["pooler", "classifier"],
    ),
    "bart": (
        "Bart",
        BART,
        "SequenceClassification",
        "SEQ_CLS",
        ["q_proj"],
        ["classification_head"],
    ),
    "llama": ("Llama", LLAMA, "SequenceClassification", "SEQ_CLS", ["q_proj"], ["score"]),
    "modernbert": (
        "ModernBert",
        SMALL
        | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        | {"cls_token_id": 3, "sep_token_id": 4},
        "SequenceClassification",
        "SEQ_CLS",
        ["Wqkv"],
        ["head", "classifier"],
    ),
    "xlnet": (
        "XLNet",
        XLNET,
        "SequenceClassification",
        "SEQ_CLS",
        ["layer_1"],
        ["sequence_summary", "logits_proj"],
    ),
    "funnel": (
        "Funnel",
        FUNNEL,
        "SequenceClassification",
        "SEQ_CLS",
        ["q_head"],
        ["classifier"],
    ),
}


@pytest.mark.parametrize("labels", [2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_loads(case: str, labels: int, tmp_path: Path) -> None:
    family, settings, head, task, targets, saved = CASES[case]
    if task == "QUESTION_ANS" and labels != 2:
        pytest.skip("answers have a start and an end")
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}For{head}")
    base_labels = 4 if labels == 5 else 2
    base = model_class(config_class(**settings, num_labels=base_labels))
    base.save_pretrained(tmp_path / "base")
    again = {"num_labels": labels, "ignore_mismatched_sizes": True}
    model = model_class.from_pretrained(tmp_path / "base", **again)
    wanted = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved, task_type=task)
    tuned = peft.get_peft_model(model, wanted)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")

    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged, told = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert merged.config.num_labels == labels
    words = torch.tensor([[5, 6, 7, 8, 2]])
    mask = torch.ones_like(words)
    with torch.no_grad():
        expected = tuned.eval()(input_ids=words, attention_mask=mask)
        found = merged.eval()(input_ids=words, attention_mask=mask)
    for one, other in zip(expected[:2], found[:2], strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.allclose(one, other, atol=1e-5)


def test_heads_that_disagree_are_no_number_of_labels(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(**DISTIL, num_labels=3)
    model = transformers.DistilBertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    paths = []
    for name, head, labels in (("a", "classifier", 3), ("b", "score", 2)):
        tuned = peft.get_peft_model(
            transformers.DistilBertForSequenceClassification(config),
            peft.LoraConfig(r=4, target_modules=["q_lin"], init_lora_weights=False),
        )
        tuned.save_pretrained(tmp_path / name)
        add_head(tmp_path / name, head, labels)
        paths.append(tmp_path / name)
    with pytest.raises(MergeError, match="different numbers of outputs"):
        loratool.merge(tmp_path / "base", paths, tmp_path / "out")


def add_head(folder: Path, head: str, labels: int) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    key = f"base_model.model.{head}.weight"
    save_file({**load_file(path), key: torch.randn(labels, 32)}, path, metadata={"format": "pt"})
