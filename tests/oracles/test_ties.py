"""A merge into tied weights, loaded in transformers, computes what the unmerged adapter does."""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file, save_model
from torch import nn

import loratool
from loratool.base.model import open_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 40,
}
ROBERTA = BERT | {"pad_token_id": 1}
SQUARE = BERT | {"embedding_size": 16}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 40,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "vocab_size": 40,
}
LED = {
    "attention_window": 4,
    "max_encoder_position_embeddings": 40,
    "max_decoder_position_embeddings": 40,
}
WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
PROPHETNET = {
    "hidden_size": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 40,
    "max_position_embeddings": 40,
    "ngram": 2,
    "num_buckets": 4,
    "relative_max_distance": 8,
}
DISTILBERT = {
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 24,
    "vocab_size": 40,
    "max_position_embeddings": 40,
}
MODERNBERT = {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "cls_token_id": 3,
    "sep_token_id": 4,
}
SWITCH = {"num_experts": 2, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0}
TIED = {"tie_word_embeddings": True}
GENERATION, MASKED = "ForConditionalGeneration", "ForMaskedLM"


class Family(NamedTuple):
    """A class of the library, its settings, and a layer that an adapter may have besides."""

    name: str
    settings: dict[str, Any]
    head: str
    layer: str


FAMILIES = {
    "t5": Family("T5", T5, GENERATION, "q"),
    "t5-1.1": Family("T5", T5 | {"tie_word_embeddings": False}, GENERATION, "q"),
    "t5-encoder": Family("T5", T5, "EncoderModel", "q"),
    "mt5": Family("MT5", T5, GENERATION, "q"),
    "umt5": Family("UMT5", T5, GENERATION, "q"),
    "switch": Family("SwitchTransformers", T5 | SWITCH, GENERATION, "q"),
    "bart": Family("Bart", BART, GENERATION, "q_proj"),
    "bart-model": Family("Bart", BART, "Model", "q_proj"),
    "mbart": Family("MBart", BART, GENERATION, "q_proj"),
    "pegasus": Family("Pegasus", BART, GENERATION, "q_proj"),
    "m2m-100": Family("M2M100", BART, GENERATION, "q_proj"),
    "led": Family("LED", BART | LED, GENERATION, "q_proj"),
    "marian": Family("Marian", BART | {"decoder_vocab_size": 40}, "MTModel", "q_proj"),
    "marian-apart": Family(
        "Marian",
        BART | {"decoder_vocab_size": 40, "share_encoder_decoder_embeddings": False},
        "MTModel",
        "q_proj",
    ),
    "whisper": Family("Whisper", BART | WHISPER, GENERATION, "q_proj"),
    "prophetnet": Family("ProphetNet", PROPHETNET, GENERATION, "query_proj"),
    "bert": Family("Bert", BERT, MASKED, "query"),
    "bert-causal": Family("Bert", BERT | {"is_decoder": True}, "LMHeadModel", "query"),
    "roberta": Family("Roberta", ROBERTA, MASKED, "query"),
    "xlm-roberta": Family("XLMRoberta", ROBERTA, MASKED, "query"),
    "camembert": Family("Camembert", ROBERTA, MASKED, "query"),
    "albert": Family("Albert", SQUARE, MASKED, "query"),
    "electra": Family("Electra", SQUARE, MASKED, "query"),
    "distilbert": Family("DistilBert", DISTILBERT, MASKED, "q_lin"),
    "deberta": Family("Deberta", BERT, MASKED, "in_proj"),
    "deberta-v2": Family("DebertaV2", BERT, MASKED, "query_proj"),
    "modernbert": Family("ModernBert", BERT | MODERNBERT, MASKED, "Wqkv"),
    "gpt-neox": Family("GPTNeoX", BERT | TIED, "ForCausalLM", "query_key_value"),
    "mpnet": Family("MPNet", BERT, MASKED, "q"),
}
CASES = ("each", "all", "save one", "tokens", "tokens of the head", "ensure")
STORED_OTHERWISE = ("t5", "bart", "roberta")


@pytest.fixture(autouse=True)
def _without_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT write no model cards: they take longer than all the rest of a save."""
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *_: None)


def build(family: Family, *, no_bias: bool = False) -> Any:
    """Return a small model with random weights; its head without a bias where that is wanted."""
    config = getattr(transformers, f"{family.name}Config")(**family.settings)
    model = getattr(transformers, f"{family.name}{family.head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        head = model.get_output_embeddings()
        if no_bias and getattr(head, "bias", None) is not None:
            head.bias.zero_()
    return model.eval()


def tied_modules(model: Any) -> list[str]:
    """Return the modules whose weights are one tensor, the head last."""
    by_weight: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            by_weight.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    (found,) = (names for names in by_weight.values() if len(names) > 1)
    head = model.get_output_embeddings()
    return sorted(found, key=lambda name: model.get_submodule(name) is head)


def outputs(model: Any) -> torch.Tensor:
    """Return everything that a model computes of fixed inputs, flat."""
    words = torch.tensor([[5, 6, 7, 8, 2, 9, 4, 3]])
    config = model.config
    if config.model_type == "whisper":
        sound = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
        inputs = {"input_features": sound, "decoder_input_ids": words}
    elif config.is_encoder_decoder and "Encoder" not in type(model).__name__:
        inputs = {"input_ids": words, "decoder_input_ids": words.flip(1)}
    else:
        inputs = {"input_ids": words}
    with torch.no_grad():
        found = model(**inputs).to_tuple()
    return torch.cat([each.flatten() for each in found if isinstance(each, torch.Tensor)])


def settings_of(case: str, modules: list[str], family: Family) -> Iterator[dict[str, Any]]:
    """Yield what PEFT is told, for each adapter of a case."""
    match case:
        case "each":
            yield from ({"target_modules": [module]} for module in modules)
        case "all":
            yield {"target_modules": modules}
        case "save one":
            for module in (modules[0], modules[-1]):
                yield {"target_modules": [family.layer], "modules_to_save": [module]}
        case "tokens":
            yield {"target_modules": [family.layer], "trainable_token_indices": [3, 7]}
        case "tokens of the head":
            rows = {modules[-1]: [3, 7]}
            yield {"target_modules": [family.layer], "trainable_token_indices": rows}
        case "ensure":
            yield {"target_modules": modules[:1], "ensure_weight_tying": True}


def check(base: Path, model: Any, told: dict[str, Any], folder: Path) -> None:
    """Train a little, merge, and compare what both compute."""
    settings = peft.LoraConfig(r=3, lora_alpha=6, **told)
    tuned = peft.get_peft_model(copy.deepcopy(model), settings).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "adapter")
    loratool.merge(base, [folder / "adapter"], folder / "out")
    if len(told["target_modules"]) > 1:
        assert not loratool.verify(folder / "out", base=base, adapters=[folder / "adapter"])
    wrong = loratool.validate(folder / "adapter", base=base)
    assert not [finding for finding in wrong if finding.severity == "error"]
    merged, info = type(model).from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    difference = (outputs(tuned.base_model.model) - outputs(merged.eval())).abs().max()
    assert difference < 1e-5, told


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_model_computes_what_the_adapter_does(
    name: str, case: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    # PEFT leaves the bias of a head out of its sum while trained tokens are not merged.
    model = build(family, no_bias="tokens" in case)
    model.save_pretrained(tmp_path / "base")
    for number, told in enumerate(settings_of(case, tied_modules(model), family)):
        (tmp_path / str(number)).mkdir()
        check(tmp_path / "base", model, told, tmp_path / str(number))


@pytest.mark.parametrize("way", ["one name", "every name", "aliases"])
@pytest.mark.parametrize("name", STORED_OTHERWISE)
def test_whichever_names_the_base_stores(name: str, way: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = build(family)
    base = tmp_path / "base"
    model.save_pretrained(base)
    path = base / "model.safetensors"
    if way == "one name":  # the first one by the alphabet
        save_model(model, str(path), metadata={"format": "pt"})
    elif way == "every name":
        copies = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(copies, path, metadata={"format": "pt"})
    else:
        path.unlink()
        torch.save(model.state_dict(), base / "pytorch_model.bin")
    for number, told in enumerate(settings_of("each", tied_modules(model), family)):
        (tmp_path / str(number)).mkdir()
        check(base, model, told, tmp_path / str(number))


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "whisper", "roberta", "modernbert"])
def test_a_vocabulary_that_grew_reaches_every_name(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = build(family)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(44)
    tuned = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=[family.layer])
    )
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    assert (outputs(tuned.base_model.model.eval()) - outputs(merged)).abs().max() < 1e-5


NOT_TABLES = re.compile(r"patch_embed|relative_bias|entity_|unembedding|codec|audio_tokens")
OTHER_KINDS = frozenset(
    ("blt", "csm", "ctrl", "diffusion_gemma", "flava", "granite_speech5_ctc", "luke", "neomme")
)
"""Families whose ties are of other weights, or whose table has a name of its own."""
OTHER_CLASSES = re.compile(
    r"ForQuestionAnswering|ToSpeech|M4T(v2)?Model|RegionToPhrase|Pix2StructText"
)
"""Classes that are left as they are: none generates text."""


def test_every_class_of_the_library_ties_what_is_found(tmp_path: Path) -> None:
    """What ``_tied_weights_keys`` say of each class is one tie of a model with these names."""
    missed = []
    count = 0
    for number, kind in enumerate(tied_classes()):
        if kind.config_class.model_type in OTHER_KINDS or OTHER_CLASSES.search(kind.__name__):
            continue
        pairs = {
            target: source.rstrip("$")
            for target, source in kind._tied_weights_keys.items()
            if target.endswith((".weight", ".bias")) and not NOT_TABLES.search(target + source)
        }
        if not pairs or any(re.search(r"[\\(\[*]", key) for key in (*pairs, *pairs.values())):
            continue
        base = tmp_path / str(number)
        write_headers(base, pairs, kind)
        ties = open_model(base).ties
        for target, source in pairs.items():
            wanted = {target.replace("lm_head", "embed_out"), target}
            is_found = any(source in t.names and wanted & set(t.names) for t in ties)
            missed += [(kind.__name__, target)] * (not is_found)
            count += 1
    assert not missed
    assert count > 400


def tied_classes() -> Iterator[Any]:
    """Yield every class of transformers that ties weights by name."""
    for family in pkgutil.iter_modules(transformers.models.__path__):
        folder = Path(transformers.models.__path__[0], family.name)
        for file in sorted(folder.glob("modeling_*.py")):
            name = f"transformers.models.{family.name}.{file.stem}"
            try:
                module = importlib.import_module(name)
            except ImportError:  # needs a library that is not here
                continue
            for kind in vars(module).values():
                is_model = isinstance(kind, type) and kind.__module__ == name
                ties = getattr(kind, "_tied_weights_keys", None)
                if is_model and isinstance(ties, dict) and kind.config_class is not None:
                    yield kind


def write_headers(base: Path, pairs: dict[str, str], kind: Any) -> None:
    """Write a model that stores the sources of ``pairs``, and a layer in each stack."""
    tensors = {
        source: torch.ones(4, 3) if source.endswith("weight") else torch.ones(4)
        for source in pairs.values()
    }
    if kind.base_model_prefix:
        tensors[f"{kind.base_model_prefix}.fc.weight"] = torch.ones(2, 2)
    for name in (*pairs, *pairs.values()):
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part in ("encoder", "decoder", "text_encoder", "text_decoder"):
                stack = ".".join(parts[: place + 1])
                tensors[f"{stack}.layers.0.fc.weight"] = torch.ones(2, 2)
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    config = {
        "model_type": kind.config_class.model_type,
        "architectures": [kind.__name__],
        "tie_word_embeddings": True,
    }
    (base / "config.json").write_text(json.dumps(config))
