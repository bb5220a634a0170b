"""Adapters of llama.cpp in every verb: names, order of rows, one alpha, what is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import tiny_gguf as tiny
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import AdapterError, LoratoolError, OutputError, UnsupportedError
from loratool.files.containers import open_weights
from loratool.schemes.opening import open_adapter

HEADS, KEYS, SIZE, HIDDEN, WIDE, TOKENS = 4, 2, 8, 24, 40, 48
RANK: Final = 4
CONFIG: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "vocab_size": TOKENS,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
L: Final = "model.layers.0."
LINEAR: Final = {
    f"{L}self_attn.q_proj": (HEADS * SIZE, HIDDEN),
    f"{L}self_attn.k_proj": (KEYS * SIZE, HIDDEN),
    f"{L}self_attn.v_proj": (KEYS * SIZE, HIDDEN),
    f"{L}self_attn.o_proj": (HIDDEN, HEADS * SIZE),
    f"{L}mlp.gate_proj": (WIDE, HIDDEN),
    f"{L}mlp.down_proj": (HIDDEN, WIDE),
    "lm_head": (TOKENS, HIDDEN),
}
TABLE: Final = "model.embed_tokens"
PREFIX: Final = "base_model.model."
NAMES: Final = {
    f"{L}self_attn.q_proj": "blk.0.attn_q",
    f"{L}self_attn.k_proj": "blk.0.attn_k",
    f"{L}self_attn.v_proj": "blk.0.attn_v",
    f"{L}self_attn.o_proj": "blk.0.attn_output",
    f"{L}mlp.gate_proj": "blk.0.ffn_gate",
    f"{L}mlp.down_proj": "blk.0.ffn_down",
    "lm_head": "output",
}


def write_base(folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    folder.mkdir()
    weights = {f"{module}.weight": torch.randn(*sides) for module, sides in LINEAR.items()}
    weights |= {f"{TABLE}.weight": torch.randn(TOKENS, HIDDEN)}
    weights |= {f"{L}input_layernorm.weight": torch.ones(HIDDEN)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_peft(
    folder: Path,
    ranks: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    more: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    folder.mkdir()
    tensors = dict(more or {})
    for module, (out, into) in LINEAR.items():
        rank = (ranks or {}).get(module, RANK)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, into).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, rank).to(dtype)
    tensors[f"{PREFIX}{TABLE}.lora_embedding_A"] = torch.randn(RANK, TOKENS).to(dtype)
    tensors[f"{PREFIX}{TABLE}.lora_embedding_B"] = torch.randn(HIDDEN, RANK).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    said["target_modules"] = [*LINEAR, TABLE]
    said["base_model_name_or_path"] = "someone/tiny-1B"
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "peft")


@pytest.fixture
def made(base: Path, adapter: Path, tmp_path: Path) -> Path:
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    return tmp_path / "made.gguf"


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a GGUF file in float64, as the gguf package reads them."""
    found = {}
    for one in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(one.data, one.tensor_type)
        found[one.name] = values.astype(np.float64).reshape(one.shape[::-1])
    return found


def values_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {n: f.contents() for n, f in fields.items() if not n.startswith("GGUF.")}


def delta(path: Path, module: str) -> np.ndarray[Any, Any]:
    """Return what llama.cpp adds to a weight, rows in the order of transformers."""
    tensors, alpha = tensors_of(path), values_of(path)["adapter.lora.alpha"]
    if module == TABLE:
        a, b = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
        return (alpha / b.shape[1] if alpha else 1) * a @ b.T
    name = f"{NAMES[module]}.weight"
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    change = (alpha / b.shape[1] if alpha else 1) * b @ a
    heads = {"q_proj": HEADS, "k_proj": KEYS}.get(module.rpartition(".")[2])
    if heads is None:
        return change
    return change.reshape(heads, SIZE // 2, 2, -1).swapaxes(1, 2).reshape(change.shape)


def wanted(adapter: Path, module: str, scale: float) -> np.ndarray[Any, Any]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    if module == TABLE:
        a = tensors[f"{PREFIX}{TABLE}.lora_embedding_A"].double().numpy()
        return scale * a.T @ tensors[f"{PREFIX}{TABLE}.lora_embedding_B"].double().numpy().T
    a = tensors[f"{PREFIX}{module}.lora_A.weight"].double().numpy()
    return scale * tensors[f"{PREFIX}{module}.lora_B.weight"].double().numpy() @ a


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[k].float(), second[k].float()) for k in first
    )


# --- what is written


def test_key_values_are_what_llama_cpp_asks_for(made: Path) -> None:
    values = values_of(made)
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 8.0
    assert values["general.name"] == "made"
    assert values["general.base_model.count"] == 1
    assert values["general.base_model.0.name"] == "tiny-1B"
    assert values["general.base_model.0.organization"] == "someone"
    assert values["general.base_model.0.repo_url"] == "https://huggingface.co/someone/tiny-1B"
    assert values["llama.attention.head_count"] == HEADS
    assert values["llama.attention.head_count_kv"] == KEYS
    reader = gguf.GGUFReader(made)
    assert reader.alignment == 32
    assert all(one.data_offset % 32 == 0 for one in reader.tensors)
    assert {one.tensor_type.name for one in reader.tensors} == {"F32"}


@pytest.mark.parametrize("module", [*LINEAR, TABLE])
def test_the_delta_is_that_of_the_input(made: Path, adapter: Path, module: str) -> None:
    assert np.array_equal(delta(made, module), wanted(adapter, module, 8 / RANK))


def test_no_base_is_an_error_whose_hint_works(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        loratool.convert(adapter, "gguf", tmp_path / "made.gguf")
    assert "--base" in str(caught.value.hint)
    (base / "model.safetensors").unlink()  # its config.json is enough
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    for module in LINEAR:
        assert np.array_equal(delta(tmp_path / "made.gguf", module), wanted(adapter, module, 2))


def test_a_base_without_heads_is_refused_where_they_decide(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(UnsupportedError, match="attention heads"):
        loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    other = write_base(tmp_path / "other", {"architectures": ["Qwen2ForCausalLM"]})
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=other)
    assert values_of(tmp_path / "made.gguf")["general.architecture"] == "qwen2"


def test_an_architecture_that_is_not_known_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UnsupportedError, match="none that is known"):
        loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(adapter: Path, base: Path, tmp_path: Path, dtype: str) -> None:
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base, dtype=dtype)
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    found = gguf.GGUFReader(tmp_path / "made.gguf").tensors
    assert {one.tensor_type.name for one in found} == {kind}
    for module in LINEAR:
        change = delta(tmp_path / "made.gguf", module)
        assert np.allclose(change, wanted(adapter, module, 2), atol=0.2)


def test_16_bits_become_32_and_nothing_is_lost(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "peft", dtype=torch.bfloat16)
    report = loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    assert report.is_exact
    for module in (*LINEAR, TABLE):
        assert np.array_equal(delta(tmp_path / "made.gguf", module), wanted(adapter, module, 2))


def test_a_tied_head_has_no_tensor(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {**CONFIG, "tie_word_embeddings": True})
    with pytest.raises(UnsupportedError, match="ties it"):
        loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base, drop=["lm_head"])
    assert "output.weight.lora_a" not in tensors_of(tmp_path / "made.gguf")


# --- one alpha


def test_powers_of_two_are_folded_exactly(base: Path, tmp_path: Path) -> None:
    ranks = {f"{L}self_attn.q_proj": 8, f"{L}mlp.gate_proj": 2}
    patterns = {"rank_pattern": dict(ranks.items())}
    adapter = write_peft(tmp_path / "peft", ranks, **patterns)
    report = loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    assert values_of(tmp_path / "made.gguf")["adapter.lora.alpha"] == 8.0
    assert report.is_exact
    for module in LINEAR:
        scale = 8 / ranks.get(module, RANK)
        assert np.array_equal(delta(tmp_path / "made.gguf", module), wanted(adapter, module, scale))


def test_other_scales_are_folded_into_the_few_and_told(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "peft", alpha_pattern={f"{L}mlp.gate_proj": 5})
    report = loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    notes = dict(report.plan.changes())
    (told,) = [note for note in notes if "multiplied into B" in note]
    assert "0.625" in told
    assert "exact" not in told
    assert notes[told] == 1
    for module in LINEAR:
        scale = (5 if module.endswith("gate_proj") else 8) / RANK
        change, expected = delta(tmp_path / "made.gguf", module), wanted(adapter, module, scale)
        assert np.allclose(change, expected, rtol=1e-6, atol=1e-6)
        assert module.endswith("gate_proj") or np.array_equal(change, expected)


def test_rslora_has_an_alpha_of_float32(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "peft", dict.fromkeys(LINEAR, 3), use_rslora=True, r=3)
    report = loratool.convert(adapter, "gguf", tmp_path / "m.gguf", base=base, drop=["embed"])
    assert any("rounded" in note for note in report.notes)
    for module in LINEAR:
        expected = wanted(adapter, module, 8 / 3**0.5)
        assert np.allclose(delta(tmp_path / "m.gguf", module), expected, rtol=1e-6)


def test_no_alpha_is_0(base: Path, tmp_path: Path) -> None:
    """Which would mean a scale of 1."""
    adapter = write_peft(tmp_path / "peft", alpha_pattern={"lm_head": 0})
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    assert not delta(tmp_path / "made.gguf", "lm_head").any()
    nothing = write_peft(tmp_path / "nothing", lora_alpha=0)
    loratool.convert(nothing, "gguf", tmp_path / "nothing.gguf", base=base)
    assert values_of(tmp_path / "nothing.gguf")["adapter.lora.alpha"] != 0
    assert not any(delta(tmp_path / "nothing.gguf", module).any() for module in (*LINEAR, TABLE))


# --- what is refused


@pytest.mark.parametrize(
    ("module", "rows"), [("mlp.gate_proj", WIDE), ("self_attn.k_proj", KEYS * SIZE)]
)
def test_magnitudes_are_refused(module: str, rows: int, base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "peft", use_dora=True, target_modules=[module])
    file = adapter / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if module in key}
    tensors[f"{PREFIX}{L}{module}.lora_magnitude_vector"] = torch.ones(rows)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnsupportedError, match="no place for") as caught:
        loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    assert "--to-lora" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        (f"{L}mlp.gate_proj.lora_B.bias", (WIDE,)),
        ("lm_head.modules_to_save.weight", (TOKENS, HIDDEN)),
        (f"{TABLE}.token_adapter.trainable_tokens_delta", (2, HIDDEN)),
        (f"{L}input_layernorm.weight", (HIDDEN,)),
    ],
)
def test_what_is_no_pair_is_refused_by_name(
    base: Path, tmp_path: Path, name: str, sides: tuple[int, ...]
) -> None:
    more = {PREFIX + name: torch.ones(sides)}
    said: dict[str, Any] = {"trainable_token_indices": {TABLE: [1, 2]}}
    said |= {"lora_bias": True} if name.endswith("bias") else {}
    adapter = write_peft(tmp_path / "peft", more=more, **said)
    with pytest.raises(UnsupportedError) as caught:
        loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    assert name.split(".lora_B")[0].split(".modules")[0].split(".token_adapter")[0] in str(
        caught.value
    )
    assert not (tmp_path / "made.gguf").exists()


def test_other_schemes_are_not_written_as_gguf(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"not written as \.gguf"):
        loratool.convert(adapter, "module-path", tmp_path / "made.gguf")


# --- what is read


def test_reading_back_gives_the_factors_and_the_configuration(
    made: Path, adapter: Path, tmp_path: Path
) -> None:
    loratool.convert(made, "peft", tmp_path / "back")  # the file itself tells the heads
    one, other = (folder / "adapter_model.safetensors" for folder in (adapter, tmp_path / "back"))
    assert same_tensors(one, other)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 8)
    assert config["base_model_name_or_path"] == "someone/tiny-1B"
    assert config["rank_pattern"] == {}


def foreign(made: Path, path: Path, **options: Any) -> Path:
    """Write the same adapter with the gguf package, as llama.cpp's converter would."""
    values = values_of(made)
    writer = gguf.GGUFWriter(path, options.pop("architecture", "llama"))
    writer.add_type(options.pop("kind", "adapter"))
    writer.add_string("adapter.type", options.pop("adapter_type", "lora"))
    alpha = options.pop("alpha", values["adapter.lora.alpha"])
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if tokens := options.pop("tokens", None):
        writer.add_key_value(
            "adapter.alora.invocation_tokens",
            tokens,
            gguf.GGUFValueType.ARRAY,
            gguf.GGUFValueType.UINT32,
        )
    quantised = options.pop("quantised", ())
    for name, data in tensors_of(made).items():
        data = data.astype(np.float32)
        if name in quantised:
            raw = gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    for name, data in options.pop("more", {}).items():
        writer.add_tensor(name, data)
    assert not options
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_that_does_not_tell_its_heads(
    made: Path, adapter: Path, base: Path, tmp_path: Path
) -> None:
    path = foreign(made, tmp_path / "foreign.gguf")
    opened = open_adapter(path)
    assert sorted(opened.unresolved) == ["blk.0.attn_k", "blk.0.attn_q"]
    assert loratool.inspect(path).as_json()["scheme"] == "gguf"
    with pytest.raises(AdapterError, match=r"attention heads .* --base"):
        loratool.convert(path, "peft", tmp_path / "back")
    loratool.convert(path, "peft", tmp_path / "back", base=base)
    one, other = (folder / "adapter_model.safetensors" for folder in (adapter, tmp_path / "back"))
    assert same_tensors(one, other)
    # What stays in the order of the file needs no heads.
    loratool.truncate(path, tmp_path / "smaller.gguf", rank=RANK)
    for module in LINEAR:
        change = delta(tmp_path / "smaller.gguf", module)
        assert np.allclose(change, delta(made, module), atol=1e-5)


def test_an_alpha_of_0_is_a_scale_of_1(made: Path, base: Path, tmp_path: Path) -> None:
    for alpha in (0.0, None):
        path = foreign(made, tmp_path / f"alpha-{alpha}.gguf", alpha=alpha)
        assert {site.scaling.factor for site in open_adapter(path).sites} == {1.0}


def test_factors_in_blocks(adapter: Path, base: Path, tmp_path: Path) -> None:
    wide = write_peft(tmp_path / "wide", dict.fromkeys(LINEAR, 32), r=32)
    loratool.convert(wide, "gguf", tmp_path / "wide.gguf", base=base, drop=["embed"])
    names = [
        name
        for name, data in tensors_of(tmp_path / "wide.gguf").items()
        if data.shape[-1] % 32 == 0
    ]
    assert "blk.0.attn_q.weight.lora_b" in names
    path = foreign(tmp_path / "wide.gguf", tmp_path / "q8.gguf", quantised=names)
    loratool.convert(path, "peft", tmp_path / "back", base=base)
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    found = tensors_of(path)
    q = found["blk.0.attn_q.weight.lora_b"]
    q = q.reshape(HEADS, SIZE // 2, 2, 32).swapaxes(1, 2).reshape(q.shape)
    assert np.array_equal(back[f"{PREFIX}{L}self_attn.q_proj.lora_B.weight"].numpy(), q)
    merged = loratool.merge(base, [path], tmp_path / "merged")
    assert merged is not None
    weight = load_file(tmp_path / "merged" / "model.safetensors")[f"{L}mlp.gate_proj.weight"]
    before = load_file(base / "model.safetensors")[f"{L}mlp.gate_proj.weight"].double().numpy()
    change = delta(path, f"{L}mlp.gate_proj")
    assert np.allclose(weight.double().numpy(), before + change, atol=1e-5)
    found_wrong = loratool.validate(path, deep=True, base=base)
    assert {each.code for each in found_wrong} == {"LT020"}  # mixed dtypes, which they are


def test_whole_norms_are_named(made: Path, tmp_path: Path) -> None:
    more = {"blk.0.attn_norm.weight": np.ones(HIDDEN, np.float32)}
    opened = open_adapter(foreign(made, tmp_path / "norms.gguf", more=more))
    assert [extra.name for extra in opened.extras] == [f"{L}input_layernorm.weight"]


def test_what_is_no_lora_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="type 'ia3'"):
        open_adapter(foreign(made, tmp_path / "other.gguf", adapter_type="ia3"))


def test_half_a_pair_is_found(made: Path, tmp_path: Path) -> None:
    more = {"blk.0.ffn_up.weight.lora_a": np.ones((RANK, HIDDEN), np.float32)}
    path = foreign(made, tmp_path / "half.gguf", more=more)
    assert "LT001" in [each.code for each in loratool.validate(path)]


def test_an_activated_adapter_keeps_its_tokens_and_is_not_merged(
    base: Path, tmp_path: Path
) -> None:
    adapter = write_peft(tmp_path / "peft", alora_invocation_tokens=[5, 7])
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    assert values_of(tmp_path / "made.gguf")["adapter.alora.invocation_tokens"] == [5, 7]
    for verb in (
        lambda out: loratool.merge(base, [tmp_path / "made.gguf"], out),
        lambda out: loratool.convert(tmp_path / "made.gguf", "peft", out),
        lambda out: loratool.convert(tmp_path / "made.gguf", "mlx", out),
    ):
        with pytest.raises(UnsupportedError, match="activated"):
            verb(tmp_path / "out")
    loratool.convert(tmp_path / "made.gguf", "gguf", tmp_path / "again.gguf")
    assert values_of(tmp_path / "again.gguf")["adapter.alora.invocation_tokens"] == [5, 7]


# --- the other verbs


def test_a_merge_is_that_of_the_peft_adapter(
    made: Path, adapter: Path, base: Path, tmp_path: Path
) -> None:
    for name, path in (
        ("one", made),
        ("two", adapter),
        ("three", foreign(made, tmp_path / "f.gguf")),
    ):
        loratool.merge(base, [path], tmp_path / name)
    one = tmp_path / "one" / "model.safetensors"
    assert same_tensors(one, tmp_path / "two" / "model.safetensors")
    assert same_tensors(one, tmp_path / "three" / "model.safetensors")
    merged, before = load_file(one), load_file(base / "model.safetensors")
    for module in (*LINEAR, TABLE):
        name = f"{module}.weight"
        expected = before[name].double().numpy() + wanted(adapter, module, 2)
        assert np.allclose(merged[name].double().numpy(), expected, rtol=1e-6, atol=1e-5)
    assert not loratool.validate(made, base=base, deep=True)


def test_sums_comparisons_and_strengths(
    made: Path, adapter: Path, base: Path, tmp_path: Path
) -> None:
    loratool.compose(
        [made, adapter], tmp_path / "sum.gguf", weights=[1, -0.5], base=base, to="gguf"
    )
    for module in (*LINEAR, TABLE):
        expected = 0.5 * wanted(adapter, module, 2)
        assert np.allclose(delta(tmp_path / "sum.gguf", module), expected, atol=1e-4)
    compared = loratool.compare([made, adapter]).as_json()
    assert json.dumps(compared).count("1.0") > 0
    loratool.rescale(made, tmp_path / "half.gguf", scale=0.5)
    assert np.array_equal(
        delta(tmp_path / "half.gguf", "lm_head"), 0.25 * delta(made, "lm_head")
    ) or np.array_equal(2 * delta(tmp_path / "half.gguf", "lm_head"), delta(made, "lm_head"))
    loratool.compose([made, made], tmp_path / "twice.gguf")
    assert np.allclose(
        delta(tmp_path / "twice.gguf", TABLE), 2 * delta(made, TABLE), rtol=1e-6, atol=1e-6
    )


def test_comparing_with_another_scheme_takes_the_base(
    made: Path, adapter: Path, base: Path, tmp_path: Path
) -> None:
    path = foreign(made, tmp_path / "foreign.gguf")
    with pytest.raises(AdapterError, match=r"--base"):
        loratool.compare([path, adapter])
    found = loratool.compare([path, adapter], base=base).as_json()
    assert found["cosine"] == pytest.approx(1)
    assert not any(found["only_in"])
    assert loratool.compare([path, made, path], base=base).as_json()


def test_a_live_model_tells_its_heads(made: Path, adapter: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})
    path = foreign(made, tmp_path / "foreign.gguf")
    ids = torch.tensor([[1, 5, 9]])
    outputs = []
    for one in (adapter, path):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).eval()
        loratool.live.attach(model, one)
        with torch.no_grad():
            outputs.append(model(ids).logits)
    assert torch.allclose(*outputs, atol=1e-5)


def test_an_extraction_is_written_as_gguf(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.merge(base, [adapter], tmp_path / "tuned")
    loratool.extract(base, tmp_path / "tuned", tmp_path / "out.gguf", rank=RANK, to="gguf")
    for module in LINEAR:
        change = delta(tmp_path / "out.gguf", module)
        assert np.allclose(change, wanted(adapter, module, 2), atol=1e-4)


def test_inspect_tells_what_it_is(made: Path) -> None:
    document = loratool.inspect(made).as_json()
    assert document["scheme"] == "gguf"
    assert document["metadata"]["general.architecture"] == "llama"


# --- experts and fused projections


def moe(tmp_path: Path, experts: int = 3) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    base, adapter = tmp_path / "moe", tmp_path / "moe-adapter"
    base.mkdir()
    adapter.mkdir()
    config = {**CONFIG, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    (base / "config.json").write_text(json.dumps({**config, "num_local_experts": experts}))
    weights, tensors = {}, {}
    for number in range(experts):
        for leaf, sides in {"w1": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE)}.items():
            module = f"{L}block_sparse_moe.experts.{number}.{leaf}"
            weights[f"{module}.weight"] = torch.randn(sides)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(RANK, sides[1])
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(sides[0], RANK)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    save_file(tensors, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["w1", "w2"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    return base, adapter, tensors


def test_experts_are_stacked_and_taken_apart(tmp_path: Path) -> None:
    base, adapter, tensors = moe(tmp_path)
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    found = tensors_of(tmp_path / "made.gguf")
    assert found["blk.0.ffn_gate_exps.weight.lora_a"].shape == (3, RANK, HIDDEN)
    assert found["blk.0.ffn_down_exps.weight.lora_b"].shape == (3, HIDDEN, RANK)
    loratool.convert(tmp_path / "made.gguf", "peft", tmp_path / "back")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    loratool.merge(base, [tmp_path / "made.gguf"], tmp_path / "one")
    loratool.merge(base, [adapter], tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert same_tensors(one, two)


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    base, adapter, _ = moe(tmp_path)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_gate_exps: .*expert 1"):
        loratool.convert(adapter, "gguf", tmp_path / "m.gguf", base=base, drop=[r"experts\.1\.w1$"])


def test_a_fused_projection_is_cut(tmp_path: Path) -> None:
    """InternLM 2: groups of queries, each with its keys and values."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = {**CONFIG, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    (base / "config.json").write_text(json.dumps(config))
    module, rows = f"{L}attention.wqkv", (HEADS + 2 * KEYS) * SIZE
    save_file({f"{module}.weight": torch.randn(rows, HIDDEN)}, base / "model.safetensors")
    a, b = torch.randn(RANK, HIDDEN), torch.randn(rows, RANK)
    pair = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file(pair, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["wqkv"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)
    found = tensors_of(tmp_path / "made.gguf")
    group = b.double().numpy().reshape(KEYS, HEADS // KEYS + 2, 2, SIZE // 2, RANK)
    for name, part in {"attn_q": slice(0, 2), "attn_k": slice(2, 3), "attn_v": slice(3, 4)}.items():
        cut = group[:, part]
        expected = (cut if name == "attn_v" else cut.swapaxes(2, 3)).reshape(-1, RANK)
        assert np.array_equal(found[f"blk.0.{name}.weight.lora_b"], expected)
        assert np.array_equal(found[f"blk.0.{name}.weight.lora_a"], a.double().numpy())
    with pytest.raises(AdapterError, match="parts of fused projections"):
        loratool.convert(tmp_path / "made.gguf", "peft", tmp_path / "back", base=base)
    loratool.convert(tmp_path / "made.gguf", "gguf", tmp_path / "again.gguf")
    again = open_weights(tmp_path / "again.gguf").tensors
    assert again.keys() == open_weights(tmp_path / "made.gguf").tensors.keys()


# --- damaged and hostile files


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_file_holds_it_is_read_or_refused(seed: int, base: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    architecture = str(
        random.choice(["llama", "bloom", "internlm2", "qwen3moe", "none", "gpt-oss"])
    )
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", architecture)
    writer.add_type("adapter")
    writer.add_float32("adapter.lora.alpha", float(random.choice([0, 16, -3, np.nan, np.inf])))
    for key in ("head_count", "head_count_kv"):
        value = int(random.choice([0, 1, 2, 4, 7, 2**32 - 1]))
        writer.add_uint32(f"{architecture}.attention.{key}", value)
    names = ["blk.0.attn_q", "blk.0.attn_k", "token_embd", "output", "blk.0.ffn_gate_exps"]
    names += ["blk.0.attn_qkv", "blk.1.foo", "blk.0.ffn_gate_exps.1", "blk.99999999999.attn_q"]
    for name in random.choice(names, 4, replace=False):
        for half in "ab":
            sides = random.choice([1, 2, 8, 16, 32], random.choice([1, 2, 2, 2, 3, 4]))
            values = np.ones(sides, np.float32)
            tensor = f"{name}.weight.lora_{half}"
            if sides[-1] == 32 and seed % 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "a.gguf"
    loratool.validate(path, deep=True)
    for verb in (
        lambda: loratool.inspect(path).as_json(),
        lambda: loratool.convert(path, "peft", tmp_path / "peft"),
        lambda: loratool.convert(path, "gguf", tmp_path / "again.gguf"),
        lambda: loratool.truncate(path, tmp_path / "less.gguf", rank=1),
        lambda: loratool.merge(base, [path], tmp_path / "merged"),
    ):
        with contextlib.suppress(LoratoolError):
            verb()


def test_a_table_in_blocks_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    wide = write_peft(tmp_path / "wide")
    tensors = load_file(wide / "adapter_model.safetensors")
    tensors[f"{PREFIX}{TABLE}.lora_embedding_A"] = torch.randn(32, TOKENS)
    tensors[f"{PREFIX}{TABLE}.lora_embedding_B"] = torch.randn(HIDDEN, 32)
    save_file(tensors, wide / "adapter_model.safetensors")
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {TABLE: 32}}))
    loratool.convert(wide, "gguf", tmp_path / "wide.gguf", base=base)
    names = ["token_embd.weight.lora_a"]
    path = foreign(tmp_path / "wide.gguf", tmp_path / "q8.gguf", quantised=names)
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight\.lora_a: .*blocks of Q8_0"):
        loratool.convert(path, "peft", tmp_path / "back", base=base)


@pytest.mark.parametrize("name", ["qwen2", "unheard-of"])
def test_an_adapter_of_another_architecture_is_refused(
    name: str, made: Path, base: Path, tmp_path: Path
) -> None:
    path = foreign(made, tmp_path / "other.gguf", architecture=name)
    folder = str(base)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    for tensor, data in load_file(base / "model.safetensors").items():
        stem, _, leaf = tensor.rpartition(".")
        writer.add_tensor(f"{NAMES.get(stem, stem)}.{leaf}", data.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterError, match=f"is '{name}' in the adapter and 'llama' in the base"):
        loratool.merge(tmp_path / "base.gguf", [path], tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    if name == "qwen2":  # rows in another order than those of this base
        with pytest.raises(AdapterError, match="'qwen2' in the adapter and 'llama' in the base"):
            loratool.convert(path, "peft", tmp_path / "back", base=folder)


@pytest.mark.parametrize(
    ("options", "alpha"), [({"alpha": 24.0}, 24.0), ({"scale": 2.0}, None), ({"scale": 0.3}, None)]
)
def test_another_strength_is_another_alpha(
    options: dict[str, float], alpha: float | None, made: Path, tmp_path: Path
) -> None:
    before = values_of(made)["adapter.lora.alpha"]
    loratool.rescale(made, tmp_path / "out.gguf", **options)
    found = values_of(tmp_path / "out.gguf")["adapter.lora.alpha"]
    assert found == np.float32(alpha or before * options["scale"])
    old, new = tensors_of(made), tensors_of(tmp_path / "out.gguf")
    assert all(np.array_equal(old[name], new[name]) for name in old)


def test_tables_of_positions_are_refused(tmp_path: Path) -> None:
    """llama.cpp would look for a linear layer of that shape, and never apply it."""
    tiny.write_base(tmp_path / "base", "gpt2")
    adapter = tiny.write_adapter(tmp_path / "adapter", "gpt2")
    file = adapter / "adapter_model.safetensors"
    more = {
        "base_model.model.transformer.wpe.lora_embedding_A": torch.ones(tiny.RANK, 16),
        "base_model.model.transformer.wpe.lora_embedding_B": torch.ones(32, tiny.RANK),
    }
    save_file(load_file(file) | more, file, {"format": "pt"})
    with pytest.raises(UnsupportedError, match="wpe: is a table of positions") as caught:
        loratool.convert(adapter, "gguf", tmp_path / "out.gguf", base=tmp_path / "base")
    assert "--drop" in str(caught.value.hint)
    loratool.convert(adapter, "gguf", tmp_path / "out.gguf", base=tmp_path / "base", drop=["wpe"])
    assert "position_embd.weight.lora_a" not in tensors_of(tmp_path / "out.gguf")


def test_heads_that_are_none_are_told(adapter: Path, base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    with pytest.raises(UnsupportedError, match=rf"\({HEADS} of queries and 3 of keys\)"):
        loratool.convert(adapter, "gguf", tmp_path / "made.gguf", base=base)


def test_a_layer_that_the_base_lacks_is_told(base: Path, tmp_path: Path) -> None:
    far = "model.layers.9.self_attn.q_proj"
    more = {
        f"{PREFIX}{far}.lora_A.weight": torch.randn(RANK, 16),
        f"{PREFIX}{far}.lora_B.weight": torch.randn(16, RANK),
    }
    adapter = write_peft(tmp_path / "far", more=more)
    report = loratool.convert(adapter, "gguf", tmp_path / "far.gguf", base=base, drop=["embed"])
    assert any(f"no {far!r} (of 1 such" in note for note in report.notes)


def test_a_base_that_is_damaged_is_no_fault_of_the_adapter(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    loratool.convert(adapter, "gguf", tmp_path / "a.gguf", base=base, drop=["embed"])
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(loratool.LoratoolError, match="damaged"):
        loratool.validate(tmp_path / "a.gguf", base=damaged)
