"""A merge that changes some of the names of one weight, and what a loader makes of it."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import read_all
from safetensors.torch import save_file
from samples import lora

import loratool
from loratool.errors import MergeError, UnsupportedError

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
TOKENS, WIDTH, SCALE = 10, 6, 2.0
TABLE, BIAS = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS)
MODULES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
LAYERS = {f"{stack}.layers.0.q.weight": torch.randn(4, WIDTH) for stack in ("encoder", "decoder")}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
BART = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}
WORDS, HEAD = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
MASKED = {f"{WORDS}.weight": TABLE, "cls.predictions.bias": BIAS}


def change(module: str, kind: str) -> tuple[Tensors, torch.Tensor]:
    """Return what an adapter stores to change a tied module, and the weight that comes out."""
    if kind == "saved":
        saved = torch.randn(TOKENS, WIDTH)
        return {f"{module}.weight": saved}, saved
    first, second = torch.randn(4, WIDTH), torch.randn(TOKENS, 4)
    if module == "lm_head":
        stored = {"lora_A.weight": first, "lora_B.weight": second}
    else:
        stored = {"lora_embedding_A": second.T, "lora_embedding_B": first.T}
    tensors = {f"{module}.{leaf}": value for leaf, value in stored.items()}
    return tensors, TABLE + SCALE * second @ first


def load(tensors: Tensors, names: list[str], *, is_tied: bool) -> Tensors:
    """Return the parameters as transformers ties them: to the first, or to one that is there."""
    found = {name: tensors[name] for name in names if name in tensors}
    if not is_tied:
        return found
    for number, name in enumerate(names[1:], 1):
        if names[0] in found:
            found.setdefault(name, found[names[0]])
        elif name in found:
            found[names[0]] = found[name]
        else:
            found[name] = next(found[each] for each in names[number:] if each in found)
    return found


@settings(deadline=None)
@given(
    config=st.sampled_from([T5, BART]),
    stored=st.sets(st.sampled_from(MODULES), min_size=1),
    changed=st.dictionaries(st.sampled_from(MODULES), st.sampled_from(["lora", "saved"])),
)
def test_a_loader_finds_every_parameter_as_the_adapter_made_it(
    config: dict[str, Any], stored: set[str], changed: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("base", "adapter"):
            (folder / part).mkdir()
        base = {f"{module}.weight": TABLE.clone() for module in MODULES if module in stored}
        save_file(base | LAYERS, folder / "base/model.safetensors", {"format": "pt"})
        (folder / "base/config.json").write_text(json.dumps(config))
        tensors = lora("encoder.layers.0.q", 4, WIDTH)
        expected = {f"{module}.weight": TABLE for module in MODULES}
        for module, kind in changed.items():
            added, expected[f"{module}.weight"] = change(module, kind)
            tensors |= added
        saved = [module for module, kind in changed.items() if kind == "saved"]
        told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": saved}
        (folder / "adapter/adapter_config.json").write_text(json.dumps(told))
        save_file(
            {f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()},
            folder / "adapter/adapter_model.safetensors",
        )

        loratool.merge(folder / "base", [folder / "adapter"], folder / "out")
        merged = json.loads((folder / "out/config.json").read_text())
        is_tied = merged.get("tie_word_embeddings", True)
        assert is_tied is (not changed or config is T5)
        found = load(read_all(folder / "out"), list(expected), is_tied=is_tied)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-5)
        assert not loratool.verify(
            folder / "out", base=folder / "base", adapters=[folder / "adapter"]
        )
        found_wrong = loratool.validate(folder / "adapter", base=folder / "base")
        assert not [item for item in found_wrong if item.severity == "error"]


def test_where_the_flag_means_more_only_what_differs_is_written(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"shared.weight": TABLE} | LAYERS, T5)
    report = loratool.merge(base, [make_adapter(lora("lm_head", TOKENS, WIDTH))], tmp_path / "out")
    assert read_all(tmp_path / "out").keys() - LAYERS == {"shared.weight", "lm_head.weight"}
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert report.added == 1
    assert any("transformers 5" in note for note in report.notes)


def test_a_dry_run_says_what_is_written_apart(make_base: Make, make_adapter: Make) -> None:
    base = make_base({"shared.weight": TABLE} | LAYERS, BART)
    plan = loratool.plan_merge(base, [make_adapter(lora("lm_head", TOKENS, WIDTH))])
    added = {step.spec.name for step in plan.steps() if step.added}
    assert added == {f"{module}.weight" for module in MODULES[1:]}
    (note,) = plan.notes
    assert all(repr(name) in note for name in added)


def test_a_head_takes_its_bias_along(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    factors = lora(HEAD, TOKENS, WIDTH)
    loratool.merge(make_base(MASKED, BERT), [make_adapter(factors)], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(merged[f"{WORDS}.weight"], TABLE)
    for bias in ("cls.predictions.bias", f"{HEAD}.bias"):
        assert torch.equal(merged[bias], BIAS)
    delta = factors[f"{HEAD}.lora_B.weight"] @ factors[f"{HEAD}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{HEAD}.weight"], TABLE + SCALE * delta)


def test_a_bias_can_change_on_one_side_alone(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    saved = {f"{HEAD}.bias": torch.randn(TOKENS), f"{HEAD}.weight": TABLE.clone()}
    layer = {"bert.q.weight": torch.randn(4, WIDTH)}
    adapter = make_adapter(saved | lora("bert.q", 4, WIDTH), modules_to_save=["decoder"])
    loratool.merge(make_base(MASKED | layer, BERT), [adapter], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    assert torch.equal(merged["cls.predictions.bias"], BIAS)
    assert torch.equal(merged[f"{HEAD}.bias"], saved[f"{HEAD}.bias"])
    assert torch.equal(merged[f"{HEAD}.weight"], TABLE)


def test_a_saved_head_that_is_not_stored_is_weighed(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    saved = torch.randn(TOKENS, WIDTH)
    layer = {"bert.q.weight": torch.randn(4, WIDTH)}
    tensors = lora("bert.q", 4, WIDTH) | {f"{HEAD}.weight": saved}
    adapter = make_adapter(tensors, modules_to_save=["decoder"])
    loratool.merge(make_base(MASKED | layer, BERT), [adapter], tmp_path / "out", weights=[0.25])
    merged = read_all(tmp_path / "out")[f"{HEAD}.weight"]
    torch.testing.assert_close(merged, 0.75 * TABLE + 0.25 * saved)


def test_adapters_on_either_side_are_each_added_to_theirs(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"shared.weight": TABLE} | LAYERS, BART)
    sides = {module: change(module, "lora") for module in ("encoder.embed_tokens", "lm_head")}
    adapters = [make_adapter(tensors, name=module) for module, (tensors, _) in sides.items()]
    loratool.merge(base, adapters, tmp_path / "out", weights=[1, -1])
    merged = read_all(tmp_path / "out")
    for module, sign in zip(sides, (1, -1), strict=True):
        wanted = TABLE + sign * (sides[module][1] - TABLE)
        torch.testing.assert_close(merged[f"{module}.weight"], wanted, rtol=1e-6, atol=1e-5)
    assert torch.equal(merged["decoder.embed_tokens.weight"], TABLE)


@pytest.mark.parametrize("has_other_rows", [False, True])
def test_rows_of_the_input_hold_for_all_but_those_with_rows_of_their_own(
    has_other_rows: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    key = "token_adapter.trainable_tokens_delta"
    rows = {"shared": ([3, 7], torch.randn(2, WIDTH))}
    if has_other_rows:
        rows["lm_head"] = ([1], torch.randn(1, WIDTH))
    tensors = {f"{module}.{key}": value for module, (_, value) in rows.items()}
    adapter = make_adapter(
        lora("encoder.layers.0.q", 4, WIDTH) | tensors,
        trainable_token_indices={module: places for module, (places, _) in rows.items()},
    )
    loratool.merge(make_base({"shared.weight": TABLE} | LAYERS, BART), [adapter], tmp_path / "out")
    names = [f"{module}.weight" for module in MODULES]
    found = load(read_all(tmp_path / "out"), names, is_tied=not has_other_rows)
    for module in MODULES:
        wanted = TABLE.clone()
        places, values = rows.get(module, rows["shared"] if not has_other_rows else ([], None))
        if places:
            wanted[places] = values
        assert torch.equal(found[f"{module}.weight"], wanted), module


def test_trained_rows_of_a_head_with_a_bias_are_noted(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    tensors = {f"{WORDS}.token_adapter.trainable_tokens_delta": torch.randn(1, WIDTH)}
    layer = {"bert.q.weight": torch.randn(4, WIDTH)}
    adapter = make_adapter(lora("bert.q", 4, WIDTH) | tensors, trainable_token_indices=[2])
    report = loratool.merge(make_base(MASKED | layer, BERT), [adapter], tmp_path / "out")
    assert any("stays as it is" in note for note in report.notes)
    assert read_all(tmp_path / "out").keys() == (MASKED | layer).keys()


def test_a_weight_that_a_head_reads_itself_is_refused_and_can_be_left_out(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    words, query = "deberta.embeddings.word_embeddings", "deberta.q"
    config = {"model_type": "deberta-v2", "architectures": ["DebertaV2ForMaskedLM"]}
    stored = {f"{words}.weight": TABLE, f"{query}.weight": torch.randn(4, WIDTH)}
    base = make_base(stored, config | {"legacy": False})
    factors = {
        f"{words}.lora_embedding_A": torch.randn(4, TOKENS),
        f"{words}.lora_embedding_B": torch.randn(WIDTH, 4),
    }
    adapter = make_adapter(lora(query, 4, WIDTH) | factors)
    with pytest.raises(UnsupportedError, match="without calling the module") as refusal:
        loratool.merge(base, [adapter], tmp_path / "out")
    found = loratool.validate(adapter, base=base)
    assert [item.code for item in found if item.severity == "error"] == ["LT022"]
    hint = re.search(r"--skip '(.+)'", refusal.value.hint or "")
    assert hint is not None
    loratool.merge(base, [adapter], tmp_path / "out", skip=[hint[1]])
    merged = read_all(tmp_path / "out")
    assert torch.equal(merged[f"{words}.weight"], TABLE)
    assert not torch.equal(merged[f"{query}.weight"], stored[f"{query}.weight"])


def test_copies_of_a_tied_weight_are_meant_for_all_its_names(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """PEFT stores them beside the deltas; only what it trains alone it lists."""
    larger = torch.randn(TOKENS + 2, WIDTH)
    copies = {f"{module}.weight": larger.clone() for module in ("shared", "lm_head")}
    adapter = make_adapter(lora("encoder.layers.0.q", 4, WIDTH) | copies)
    stored = {"shared.weight": TABLE, "final_logits_bias": BIAS[None]}
    config = BART | {"vocab_size": TOKENS, "decoder_vocab_size": TOKENS}
    loratool.merge(make_base(stored | LAYERS, config), [adapter], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    assert merged.keys() == stored.keys() | LAYERS
    assert torch.equal(merged["shared.weight"], larger)
    assert torch.equal(merged["final_logits_bias"][0, :TOKENS], BIAS)
    assert merged["final_logits_bias"][0, TOKENS:].tolist() == [0, 0]
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told == config | {"vocab_size": TOKENS + 2, "decoder_vocab_size": TOKENS + 2}


def test_copies_of_a_tied_weight_that_differ_are_refused_unless_listed(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"shared.weight": TABLE} | LAYERS, BART)
    copies = {f"{module}.weight": torch.randn(TOKENS, WIDTH) for module in ("shared", "lm_head")}
    tensors = lora("encoder.layers.0.q", 4, WIDTH) | copies
    with pytest.raises(MergeError, match="one weight for both") as refusal:
        loratool.merge(base, [make_adapter(tensors)], tmp_path / "out")
    assert "modules_to_save" in (refusal.value.hint or "")
    adapter = make_adapter(tensors, name="listed", modules_to_save=["shared", "lm_head"])
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    for name, value in copies.items():
        assert torch.equal(merged[name], value)
    assert torch.equal(merged["decoder.embed_tokens.weight"], TABLE)


def test_a_head_keeps_the_copy_that_the_embedding_came_with(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """A copy that is not the base's is what was trained on, of every name of the weight."""
    copy = torch.randn(TOKENS, WIDTH)
    factors, _ = change("lm_head", "lora")
    adapter = make_adapter(factors | {"shared.weight": copy})
    base = make_base({"shared.weight": TABLE} | LAYERS, BART)
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    for module in MODULES[:3]:
        assert torch.equal(merged[f"{module}.weight"], copy)
    delta = SCALE * factors["lm_head.lora_B.weight"] @ factors["lm_head.lora_A.weight"]
    torch.testing.assert_close(merged["lm_head.weight"], copy + delta, rtol=1e-6, atol=1e-5)


def test_what_was_untied_is_extracted_and_merges_back(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"shared.weight": TABLE} | LAYERS, BART | {"is_encoder_decoder": True})
    sides = ("encoder.embed_tokens", "lm_head")
    tensors = {key: value for side in sides for key, value in change(side, "lora")[0].items()}
    loratool.merge(base, [make_adapter(tensors)], tmp_path / "one")
    loratool.extract(base, tmp_path / "one", tmp_path / "again", rank=4, embeddings=True)
    loratool.merge(base, [tmp_path / "again"], tmp_path / "two")
    first, second = read_all(tmp_path / "one"), read_all(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-4)
