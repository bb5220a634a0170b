"""Which parameters share one weight: by names, configuration and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.base.model import Model, open_model
from loratool.base.ties import Tie

TABLE, OTHER = torch.randn(9, 4), torch.randn(9, 4)
BIAS = torch.randn(9)
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
BART = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
MARIAN = {"model_type": "marian", "architectures": ["MarianMTModel"], "is_encoder_decoder": True}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SHARED = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
IN_MODEL = tuple(f"model.{table}" for table in SHARED)
WORDS = "bert.embeddings.word_embeddings"

Stored = dict[str, torch.Tensor]


@pytest.fixture
def opened(make_base: Callable[..., Path]) -> Callable[..., Model]:
    """Write a model with both stacks of an encoder-decoder, and open it."""

    def make(
        stored: Stored,
        config: dict[str, Any],
        stacks: Sequence[str] = (),
        tasks: Sequence[str] = (),
    ) -> Model:
        layers = {f"{stack}.layers.0.fc.weight": torch.randn(2, 3) for stack in stacks}
        return open_model(make_base(stored | layers, config)).as_trained(tasks=tasks)

    return make


BOTH = ("encoder", "decoder")
BOTH_IN_MODEL = ("model.encoder", "model.decoder")


@pytest.mark.parametrize(
    ("config", "stored", "stacks", "names"),
    [
        (T5, ["shared"], BOTH, (*SHARED, "lm_head")),
        (T5, ["decoder.embed_tokens"], BOTH, (*SHARED, "lm_head")),
        (T5, ["lm_head"], BOTH, (*SHARED, "lm_head")),
        (T5, [*SHARED, "lm_head"], BOTH, (*SHARED, "lm_head")),
        (T5 | {"tie_word_embeddings": False}, ["shared"], BOTH, (*SHARED, "lm_head")),
        (T5 | {"architectures": ["T5EncoderModel"]}, ["shared"], BOTH[:1], SHARED[:2]),
        (BART, ["model.shared"], BOTH_IN_MODEL, (*IN_MODEL, "lm_head")),
        (BART, ["shared"], BOTH, (*SHARED, "lm_head")),
        (BART | {"architectures": ["BartModel"]}, ["shared"], BOTH, SHARED),
        (BART | {"tie_word_embeddings": False}, ["model.shared"], BOTH_IN_MODEL, ()),
        (
            BART | {"architectures": ["BartForCausalLM"]},
            ["lm_head"],
            BOTH_IN_MODEL[1:],
            ("model.decoder.embed_tokens", "lm_head"),
        ),
        (MARIAN, ["model.shared"], BOTH_IN_MODEL, (*IN_MODEL, "lm_head")),
        (
            MARIAN | {"share_encoder_decoder_embeddings": False},
            ["model.encoder.embed_tokens", "model.decoder.embed_tokens"],
            BOTH_IN_MODEL,
            ("model.decoder.embed_tokens", "lm_head"),
        ),
        (
            {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
            ["model.decoder.embed_tokens"],
            BOTH_IN_MODEL,
            ("model.decoder.embed_tokens", "proj_out"),
        ),
        (
            {"model_type": "prophetnet", "architectures": ["ProphetNetForConditionalGeneration"]},
            ["prophetnet.word_embeddings"],
            ("prophetnet.encoder", "prophetnet.decoder"),
            (
                "prophetnet.word_embeddings",
                "prophetnet.encoder.word_embeddings",
                "prophetnet.decoder.word_embeddings",
                "lm_head",
            ),
        ),
        (
            {"model_type": "led", "architectures": ["LEDForConditionalGeneration"]},
            ["led.shared"],
            ("led.encoder", "led.decoder"),
            ("led.shared", "led.encoder.embed_tokens", "led.decoder.embed_tokens", "lm_head"),
        ),
        (BERT, [WORDS], (), (WORDS, "cls.predictions.decoder")),
        (BERT, ["cls.predictions.decoder"], ("bert.encoder",), (WORDS, "cls.predictions.decoder")),
        (BERT | {"architectures": ["BertModel"]}, ["embeddings.word_embeddings"], (), ()),
        (
            {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]},
            ["model.embeddings.tok_embeddings"],
            (),
            ("model.embeddings.tok_embeddings", "decoder"),
        ),
        (LLAMA, ["model.embed_tokens"], ("model",), ("model.embed_tokens", "lm_head")),
        (
            LLAMA | {"tie_word_embeddings": True},
            ["lm_head"],
            ("model",),
            ("model.embed_tokens", "lm_head"),
        ),
        (LLAMA | {"tie_word_embeddings": False}, ["lm_head"], ("model",), ()),
        ({}, ["shared"], BOTH, ()),
    ],
)
def test_a_tie_names_every_parameter_of_the_weight(
    config: dict[str, Any],
    stored: list[str],
    stacks: Sequence[str],
    names: tuple[str, ...],
    opened: Callable[..., Model],
) -> None:
    model = opened({f"{module}.weight": TABLE.clone() for module in stored}, config, stacks)
    expected = [tuple(f"{module}.weight" for module in names)] if names else []
    assert [tie.names for tie in model.ties] == expected
    for tie in model.ties:
        assert set(tie.stored) == {name for name in tie.names if name in model.tensors}
        for name in set(tie.names) - set(tie.stored):
            assert model.hidden[name] == tie.source
            place = model.find(name.removesuffix(".weight"))
            assert place is not None
            assert (place.pieces[0].name, place.tie) == (name, tie)


def test_what_is_stored_with_other_values_is_apart(opened: Callable[..., Model]) -> None:
    stored = {"shared.weight": TABLE, "lm_head.weight": OTHER}
    model = opened(stored, T5 | {"tie_word_embeddings": False}, BOTH)
    names = tuple(f"{table}.weight" for table in SHARED)
    assert model.ties == (Tie(names, names[:1], names[0]),)
    assert model.tie is None
    assert model.hidden == dict.fromkeys(names[1:], names[0])


@pytest.mark.parametrize("stored", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
def test_a_head_shares_the_bias_of_the_module_that_it_is_in(
    stored: str, opened: Callable[..., Model]
) -> None:
    model = opened({f"{WORDS}.weight": TABLE, stored: BIAS}, BERT)
    names = ("cls.predictions.bias", "cls.predictions.decoder.bias")
    assert model.ties[1] == Tie(names, (stored,))
    assert model.parameter("cls.predictions.decoder", "bias") == names[1]
    assert model.shape(names[1]) == (9,)


def test_a_bias_apart_is_no_twin(opened: Callable[..., Model]) -> None:
    config = {"model_type": "esm", "architectures": ["EsmForMaskedLM"]}
    stored = {"esm.embeddings.word_embeddings.weight": TABLE, "lm_head.bias": BIAS}
    (tie,) = opened(stored, config).ties
    assert tie.names[1] == "lm_head.decoder.weight"


def test_the_head_is_that_of_the_task(opened: Callable[..., Model]) -> None:
    stored = {"shared.weight": TABLE}
    config = BART | {"architectures": ["BartModel"]}
    (tie,) = opened(stored, config, BOTH, ["SEQ_2_SEQ_LM"]).ties
    assert tie.head == "lm_head.weight"


def test_the_new_head_of_deberta_has_no_weight(opened: Callable[..., Model]) -> None:
    config = {"model_type": "deberta-v2", "architectures": ["DebertaV2ForMaskedLM"]}
    stored = {"deberta.embeddings.word_embeddings.weight": TABLE}
    model = opened(stored, config | {"legacy": False})
    assert model.ties == ()
    assert model.config.reads_directly("deberta.embeddings.word_embeddings")
    assert not model.config.reads_directly("deberta.encoder.layer.0.output.dense")


@pytest.mark.parametrize(
    ("config", "stacks", "input_"),
    [
        (BART, BOTH_IN_MODEL, "model.shared.weight"),
        (MARIAN, BOTH_IN_MODEL, "model.encoder.embed_tokens.weight"),
    ],
)
def test_trained_rows_are_those_of_the_input(
    config: dict[str, Any], stacks: Sequence[str], input_: str, opened: Callable[..., Model]
) -> None:
    (tie,) = opened({"model.shared.weight": TABLE}, config, stacks).ties
    assert tie.input == input_


def test_several_heads_are_tied_to_nothing(opened: Callable[..., Model]) -> None:
    stored = {f"{part}.lm_head.weight": TABLE.clone() for part in ("a", "b")}
    model = opened({"model.embed_tokens.weight": TABLE} | stored, LLAMA)
    assert model.ties == ()
    assert model.find("model.embed_tokens") is not None
