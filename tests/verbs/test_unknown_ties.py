"""Tables that a loader may tie to a head of which the files tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loratool

Make = Callable[..., Path]
CTRL = {"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"]}
BERT2BERT = {
    "model_type": "encoder-decoder",
    "architectures": ["EncoderDecoderModel"],
    "decoder": {"model_type": "bert"},
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
TABLE = "decoder.bert.embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("config", "table", "head", "is_noted"),
    [
        (CTRL, "transformer.w", None, True),
        (BERT2BERT, TABLE, None, False),  # a tie that is known
        (CTRL, "transformer.w", "lm_head", False),
        (CTRL | {"tie_word_embeddings": False}, "transformer.w", None, False),
        (LLAMA, "model.embed_tokens", None, False),
    ],
)
def test_a_note_says_so(
    config: dict[str, object],
    table: str,
    head: str | None,
    is_noted: bool,
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    names = [f"{table}.weight", *([f"{head}.weight"] if head else [])]
    base = make_base({name: torch.randn(30, 8) for name in names}, config)
    factors = {
        f"{table}.lora_embedding_A": torch.randn(4, 30),
        f"{table}.lora_embedding_B": torch.randn(8, 4),
    }
    adapter = make_adapter(factors, target_modules=[table.rpartition(".")[2]])
    report = loratool.merge(base, [adapter], tmp_path / "out")
    assert any("stores no output head" in note for note in report.notes) == is_noted
