"""Merging into GGUF files, what they say of themselves, and comparing two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool
from loratool.errors import LoratoolError
from loratool.files.containers import open_weights
from loratool.verbs.inspect import ModelInfo

gguf = pytest.importorskip("gguf")
from gguf_files import LLAMA, QWEN2, paired, read_gguf, write_gguf  # noqa: E402

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
HEAD = 16
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def weights(*, is_tied: bool = False, has_bias: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    found = {"model.embed_tokens.weight": some(40, 64), "model.norm.weight": 1 + some(64)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for module, shape in SHAPES.items():
            found[f"{prefix}{module}.weight"] = some(*shape)
            if has_bias and module.startswith("self_attn") and "o_proj" not in module:
                found[f"{prefix}{module}.bias"] = some(shape[0])
        found[f"{prefix}input_layernorm.weight"] = 1 + some(64)
        found[f"{prefix}post_attention_layernorm.weight"] = 1 + some(64)
    if not is_tied:
        found["lm_head.weight"] = some(40, 64)
    return found


def adapter(
    folder: Path, modules: tuple[str, ...] = tuple(SHAPES), rank: int = 3
) -> dict[str, np.ndarray]:
    """Write an adapter of PEFT; return its deltas in float64 by module."""
    random = np.random.default_rng(1)
    tensors, deltas = {}, {}
    shapes = {**SHAPES, "embed_tokens": (40, 64), "lm_head": (40, 64)}
    for module in modules:
        paths = [f"model.layers.{layer}.{module}" for layer in range(2)]
        if module == "embed_tokens":
            paths = ["model.embed_tokens"]
        if module == "lm_head":
            paths = ["lm_head"]
        out, into = shapes[module]
        for path in paths:
            down = random.standard_normal((rank, into)).astype(np.float32)
            up = (random.standard_normal((out, rank)) * 0.05).astype(np.float32)
            key = f"base_model.model.{path}"
            if module == "embed_tokens":
                tensors[f"{key}.lora_embedding_A"] = np.ascontiguousarray(up.T)
                tensors[f"{key}.lora_embedding_B"] = np.ascontiguousarray(down.T)
            else:
                tensors[f"{key}.lora_A.weight"] = down
                tensors[f"{key}.lora_B.weight"] = up
            deltas[path] = 2.0 * up.astype("f8") @ down.astype("f8")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def stored_delta(path: str, delta: np.ndarray, change: Any = LLAMA[1]) -> np.ndarray:
    return change(f"{path}.weight", delta, CONFIG)


def stored_name(path: str) -> str:
    from gguf_files import names

    return f"{names(2)[path]}.weight"


@pytest.mark.parametrize("architecture", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_a_merge_changes_what_the_adapter_does_and_nothing_else(
    dtype: str, architecture: Any, tmp_path: Path
) -> None:
    types = {"embed_tokens": "Q8_0", "lm_head": "F16", "": dtype}
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, architecture, types)
    deltas = adapter(tmp_path / "adapter")
    report = loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf")
    assert report.merged == 14
    before, after = read_gguf(base), read_gguf(tmp_path / "out.gguf")
    assert list(before) == list(after)
    touched = {stored_name(path): (path, delta) for path, delta in deltas.items()}
    for name, (kind, values, raw) in before.items():
        if name not in touched:
            assert after[name][0] == kind and after[name][2] == raw
            continue
        path, delta = touched[name]
        wanted = values.astype("f8") + stored_delta(path, delta, architecture[1])
        kept = dtype if dtype in ("F32", "F16") else "F16"
        assert after[name][0] == kept
        np.testing.assert_allclose(
            after[name][1], wanted, rtol=2.0**-11 if kept == "F16" else 2.0**-20, atol=1e-7
        )
    one, two = open_weights(base), open_weights(tmp_path / "out.gguf")
    assert one.raw_values == two.raw_values and one.alignment == two.alignment  # type: ignore[attr-defined]
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"]) == ()


def merged(tmp_path: Path, base: Path, modules: tuple[str, ...], **options: Any) -> dict[str, Any]:
    adapter(tmp_path / "adapter", modules)
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf", **options)
    verified = loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"])
    assert verified == ()
    return read_gguf(tmp_path / "out.gguf")


def test_a_dtype_is_that_of_what_was_coded(tmp_path: Path) -> None:
    types = {"q_proj": "F32", "o_proj": "F16", "": "Q8_0"}
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, types)
    found = merged(tmp_path, base, tuple(SHAPES), dtype="bfloat16")
    kinds = {name.partition(".")[2]: found[name][0] for name in found if name.startswith("blk.0")}
    kinds |= {name: found[name][0] for name in found if not name.startswith("blk.")}
    assert kinds == {
        "0.attn_q.weight": "F32",
        "0.attn_k.weight": "BF16",
        "0.attn_v.weight": "BF16",
        "0.attn_output.weight": "F16",
        "0.ffn_gate.weight": "BF16",
        "0.ffn_up.weight": "BF16",
        "0.ffn_down.weight": "BF16",
        "0.attn_norm.weight": "F32",
        "0.ffn_norm.weight": "F32",
        "token_embd.weight": "Q8_0",
        "output.weight": "Q8_0",
        "output_norm.weight": "F32",
    }


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_codes_are_written_again_as_llama_cpp_does(dtype: str, tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, dtype)
    deltas = adapter(tmp_path / "adapter", ("self_attn.q_proj", "mlp.down_proj"))
    report = loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf", quantized="keep")
    assert report.retention is not None and report.retention > 0.8
    before, after = read_gguf(base), read_gguf(tmp_path / "out.gguf")
    touched = {stored_name(path): stored_delta(path, delta) for path, delta in deltas.items()}
    for name, (kind, values, raw) in before.items():
        assert after[name][0] == kind
        if name not in touched:
            assert after[name][2] == raw
            continue
        wanted = (values.astype("f4") + touched[name]).astype("f4")
        again = gguf.quantize(wanted, gguf.GGMLQuantizationType[kind])
        # A sum that is rounded otherwise in float32 may be the next code.
        different = np.frombuffer(after[name][2], np.uint8) != again.reshape(-1)
        assert different.mean() < 0.01
    assert (tmp_path / "out.gguf").stat().st_size == base.stat().st_size
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"]) == ()


def test_codes_that_take_a_search_are_refused_by_name(tmp_path: Path) -> None:
    base = k_quants(tmp_path / "base.gguf", "Q4_K")
    small_adapter(tmp_path / "adapter")
    with pytest.raises(LoratoolError, match=r"blk\.0\.attn_q\.weight: is Q4_K") as caught:
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf", quantized="keep")
    assert "llama-quantize" in str(caught.value.hint)
    assert not (tmp_path / "out.gguf").exists()


def small_adapter(folder: Path) -> np.ndarray:
    """Write an adapter of one module; return its delta."""
    random = np.random.default_rng(0)
    down = random.standard_normal((2, 256)).astype("f4")
    up = random.standard_normal((64, 2)).astype("f4")
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    save_file(
        {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    return 2 * up.astype("f8") @ down


def k_quants(path: Path, dtype: str) -> Path:
    """Write a model of one layer with random blocks in it."""
    from coded.gguf import blocks

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_block_count(1)
    kind = gguf.GGMLQuantizationType[dtype]
    for name, rows in (("token_embd", 40), ("blk.0.attn_q", 64), ("blk.0.ffn_up", 48)):
        writer.add_tensor(f"{name}.weight", blocks(dtype, rows, 256 // 256), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "dtype", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "TQ2_0"]
)
def test_k_quants_become_plain_numbers(dtype: str, tmp_path: Path) -> None:
    base = k_quants(tmp_path / "base.gguf", dtype)
    delta = small_adapter(tmp_path / "adapter")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf")
    before, after = read_gguf(base), read_gguf(tmp_path / "out.gguf")
    for name in ("token_embd.weight", "blk.0.ffn_up.weight"):
        assert after[name][0] == dtype and after[name][2] == before[name][2]
    wanted = before["blk.0.attn_q.weight"][1].astype("f8") + paired(delta, 4)
    assert after["blk.0.attn_q.weight"][0] == "F16"
    np.testing.assert_allclose(after["blk.0.attn_q.weight"][1], wanted, rtol=2.0**-11, atol=1e-7)
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"]) == ()


def test_what_float16_does_not_hold_is_an_error(tmp_path: Path) -> None:
    values = weights()
    values["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    base = write_gguf(tmp_path / "base.gguf", values, CONFIG, LLAMA, "Q8_0")
    with pytest.raises(LoratoolError, match=r"blk\.0\.ffn_up\.weight: .*overflow of float16"):
        merged(tmp_path, base, ("mlp.up_proj",))
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf", dtype="bfloat16")


@pytest.mark.parametrize("is_tied", [False, True])
def test_tables_and_heads(is_tied: bool, tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(is_tied=is_tied), CONFIG, LLAMA, "Q8_0")
    deltas = adapter(tmp_path / "adapter", ("embed_tokens", "lm_head", "mlp.up_proj"))
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf")
    before, after = read_gguf(base), read_gguf(tmp_path / "out.gguf")
    assert list(after) == [*before, *(["output.weight"] if is_tied else [])]
    table = before["token_embd.weight"][1].astype("f8")
    head = table if is_tied else before["output.weight"][1].astype("f8")
    for name, wanted in (
        ("token_embd.weight", table + deltas["model.embed_tokens"]),
        ("output.weight", head + deltas["lm_head"]),
    ):
        assert after[name][0] == "F16"
        np.testing.assert_allclose(after[name][1], wanted, rtol=2.0**-11, atol=1e-7)
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"]) == ()


def test_a_tied_table_alone_changes_the_head_no_more(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(is_tied=True), CONFIG, LLAMA, "Q8_0")
    found = merged(tmp_path, base, ("embed_tokens",))
    before = read_gguf(base)["token_embd.weight"]
    assert found["token_embd.weight"][0] == "F16"
    np.testing.assert_allclose(found["output.weight"][1], before[1], rtol=2.0**-11, atol=1e-7)


def test_files_in_parts_stay_in_parts(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, "Q8_0")
    names = split(whole, tmp_path / "parts", 3)
    adapter(tmp_path / "adapter", ("self_attn.k_proj", "mlp.down_proj"))
    loratool.merge(whole, [tmp_path / "adapter"], tmp_path / "out.gguf")
    for base in (tmp_path / "parts", names[1]):
        out = tmp_path / f"out-{base.stem}"
        loratool.merge(base, [tmp_path / "adapter"], out)
        found = {file.name for file in out.iterdir()} - {"README.md", "loratool.json"}
        assert sorted(found) == [name.name for name in names]
        wanted = read_gguf(tmp_path / "out.gguf")
        found = {}
        for name in names:
            part = read_gguf(out / name.name)
            assert list(part) == list(read_gguf(name))
            one, two = open_weights(name), open_weights(out / name.name)
            assert one.metadata == two.metadata
            found |= part
        assert {n: (kind, raw) for n, (kind, _, raw) in found.items()} == {
            n: (kind, raw) for n, (kind, _, raw) in wanted.items()
        }
        assert loratool.verify(out, base=base, adapters=[tmp_path / "adapter"]) == ()
    with pytest.raises(LoratoolError, match="in 3 files, so the output is a folder"):
        loratool.merge(names[0], [tmp_path / "adapter"], tmp_path / "one.gguf")
    names[1].rename(tmp_path / "renamed.gguf")
    with pytest.raises(LoratoolError, match=r"part 1 \(from 0\) of 3, and is read as part 0 of 1"):
        loratool.inspect(tmp_path / "renamed.gguf")


def split(whole: Path, folder: Path, count: int) -> list[Path]:
    """Write a model in parts, the first of which has key values and no tensors."""
    folder.mkdir()
    tensors = list(gguf.GGUFReader(whole).tensors)
    found = []
    for number in range(count):
        path = folder / f"x-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if not number:
            writer.add_head_count(4)
            writer.add_head_count_kv(2)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for one in tensors[number - 1 :: count - 1] if number else ():
            writer.add_tensor(one.name, one.data, raw_dtype=one.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append(path)
    return found


@pytest.mark.parametrize(("name", "is_paired"), [("llama", True), ("minicpm", False)])
def test_biases_lie_as_their_weights_do_or_as_llama_cpp_leaves_them(
    name: str, is_paired: bool, tmp_path: Path
) -> None:
    architecture = (name, *LLAMA[1:])
    base = write_gguf(tmp_path / "base.gguf", weights(has_bias=True), CONFIG, architecture, "Q8_0")
    random = np.random.default_rng(0)
    tensors, deltas = {}, {}
    for module, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
        key = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{key}.lora_A.weight"] = random.standard_normal((2, 64)).astype("f4")
        tensors[f"{key}.lora_B.weight"] = np.zeros((rows, 2), "f4")
        bias = random.standard_normal(rows).astype("f4")
        tensors[f"{key}.base_layer.bias"] = bias
        deltas[module] = bias
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] += 0.01
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "lora_only",
        "target_modules": list(deltas),
    }
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf")
    after = read_gguf(tmp_path / "out.gguf")
    for module, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 0)):
        is_moved = bool(heads) and is_paired
        wanted = paired(deltas[module], heads) if is_moved else deltas[module]
        assert np.array_equal(after[f"blk.0.attn_{module[0]}.bias"][1], wanted)


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_two_files_are_compared_and_extracted(dtype: str, tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, dtype)
    deltas = adapter(tmp_path / "adapter")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "tuned.gguf")
    loratool.extract(base, tmp_path / "tuned.gguf", tmp_path / "made", rank=3)
    found = loratool.inspect(tmp_path / "made")
    assert {one.module for one in found.modules} == set(deltas)
    report = loratool.compare([tmp_path / "made", tmp_path / "adapter"])
    assert report.relative_distance < (1e-4 if dtype == "F32" else 1e-3)


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    types = {"embed_tokens": "Q8_0", "": "Q4_0"}
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, types, tokens=100)
    info = loratool.inspect(base)
    assert isinstance(info, ModelInfo)
    found = info.as_json()
    assert found["quantization"] == {"method": "gguf", "format": "Q4_0", "modules": 16}
    assert found["parameters"] == sum(values.size for values in weights().values())
    assert found["dtypes"] == {"Q4_0": 15, "F32": 5, "Q8_0": 1}
    assert (found["model_type"], found["layout"]) == ("llama", "gguf")
    assert found["metadata"]["llama.attention.head_count"] == "4"
    assert "tokenizer.ggml.tokens" not in found["metadata"]


def test_an_adapter_is_checked_against_a_file(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(is_tied=True), CONFIG, LLAMA, "Q4_0")
    adapter(tmp_path / "adapter")
    (found,) = loratool.validate(tmp_path / "adapter", base=base)
    assert found.severity == "info" and "Q4_0" in found.message
    adapter(tmp_path / "head", ("lm_head", "mlp.up_proj"))
    found = [f for f in loratool.validate(tmp_path / "head", base=base) if f.severity != "info"]
    assert found == []
    other = write_gguf(
        tmp_path / "wide.gguf",
        {name: np.ones((24, 64), "f4") for name in ("model.layers.0.mlp.up_proj.weight",)},
        CONFIG,
        LLAMA,
    )
    codes = [f.code for f in loratool.validate(tmp_path / "head", base=other)]
    assert "LT021" in codes and "LT022" in codes


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, "F16")
    adapter(tmp_path / "adapter")
    with pytest.raises(LoratoolError, match=r"end the name in \.gguf"):
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.safetensors")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    found = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert found == ["README.md", "base.gguf", "loratool.json"]


@pytest.mark.parametrize("dtype", ["Q8_0", "F16"])
def test_diffusion_models_have_their_own_names_and_shapes(dtype: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    base = tmp_path / "wan.gguf"
    writer = gguf.GGUFWriter(base, "wan")
    kind = gguf.GGMLQuantizationType[dtype]
    shapes = {
        "patch_embedding.weight": (64, 4, 1, 2, 2),
        "text_embedding.0.weight": (64, 64),
        "time_projection.1.weight": (64, 64),
        "head.head.weight": (64, 64),
        **{
            f"blocks.0.{module}.weight": (64, 64)
            for module in (
                *(f"self_attn.{leaf}" for leaf in "qkvo"),
                *(f"cross_attn.{leaf}" for leaf in "qkvo"),
                *("ffn.0", "ffn.2"),
            )
        },
    }
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype("f4")
        if len(shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
            values = values.reshape(32, 32)
        writer.add_tensor(
            name,
            values.astype("f2") if dtype == "F16" else gguf.quantize(values, kind),
            raw_dtype=kind,
        )
    writer.add_tensor("blocks.0.modulation", np.zeros((1, 6, 64), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = loratool.inspect(base)
    assert isinstance(info, ModelInfo) and info.model.family == "wan"
    assert info.model_type == "wan"
    tensors, deltas = {}, {}
    for module, into in (("blocks.0.self_attn.q", 64), ("patch_embedding", 16)):
        down = random.standard_normal((2, into)).astype("f4")
        up = random.standard_normal((64, 2)).astype("f4")
        deltas[f"{module}.weight"] = up.astype("f8") @ down
        kernel = shapes[f"{module}.weight"][1:]
        tensors[f"diffusion_model.{module}.lora_down.weight"] = down.reshape(2, *kernel)
        tensors[f"diffusion_model.{module}.lora_up.weight"] = up.reshape(
            64, 2, *[1] * (len(kernel) - 1)
        )
    save_file(tensors, tmp_path / "adapter.safetensors")
    for options in ({}, {"quantized": "keep"}):
        out = tmp_path / f"out-{len(options)}.gguf"
        loratool.merge(base, [tmp_path / "adapter.safetensors"], out, **options)
        before, after = read_gguf(base), read_gguf(out)
        for name, (old, values, raw) in before.items():
            if name not in deltas:
                assert after[name][0] == old and after[name][2] == raw
                continue
            wanted = values.astype("f8") + deltas[name].reshape(values.shape)
            assert after[name][0] == (dtype if options else "F16")
            limit = 0.05 if options and dtype == "Q8_0" else 0.01
            np.testing.assert_allclose(after[name][1], wanted, atol=limit)
        verified = loratool.verify(out, base=base, adapters=[tmp_path / "adapter.safetensors"])
        assert verified == ()


def test_adapters_of_llama_cpp_are_merged_as_those_of_peft(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, "Q8_0")
    adapter(tmp_path / "adapter")
    loratool.convert(tmp_path / "adapter", to="gguf", output=tmp_path / "adapter.gguf", base=base)
    for number, path in enumerate((tmp_path / "adapter", tmp_path / "adapter.gguf")):
        loratool.merge(base, [path], tmp_path / f"{number}.gguf")
    one, other = (read_gguf(tmp_path / f"{number}.gguf") for number in (0, 1))
    assert one.keys() == other.keys()
    for name, (kind, values, _) in one.items():
        assert other[name][0] == kind
        np.testing.assert_allclose(other[name][1], values, rtol=2.0**-10, atol=1e-7)


def test_magnitudes_lie_as_rows_do(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, "F32")
    deltas = adapter(tmp_path / "adapter", ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    random = np.random.default_rng(0)
    tensors = load_file(path)
    magnitudes = {}
    for module, delta in deltas.items():
        magnitudes[module] = 1 + random.random(len(delta)).astype("f4")
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitudes[module]
    save_file(tensors, path)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf")
    after = read_gguf(tmp_path / "out.gguf")
    for module, delta in deltas.items():
        values = weights()[f"{module}.weight"].astype("f8") + delta
        values *= (magnitudes[module] / np.linalg.norm(values, axis=1))[:, None]
        np.testing.assert_allclose(
            after[stored_name(module)][1], stored_delta(module, values), rtol=1e-5, atol=1e-6
        )
    verified = loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"])
    assert verified == ()


def test_stacks_of_experts_are_no_modules_of_an_extraction(tmp_path: Path) -> None:
    for number in (0, 1):
        random = np.random.default_rng(0)
        writer = gguf.GGUFWriter(tmp_path / f"{number}.gguf", "qwen3moe")
        writer.add_head_count(4)
        change = number * random.standard_normal((64, 1)) @ random.standard_normal((1, 64))
        stack = random.standard_normal((2, 32, 64)).astype("f4") + number
        matrix = (random.standard_normal((64, 64)) + change).astype("f4")
        writer.add_tensor("blk.0.ffn_up_exps.weight", stack)
        writer.add_tensor("blk.0.attn_output.weight", matrix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    report = loratool.extract(tmp_path / "0.gguf", tmp_path / "1.gguf", tmp_path / "made", rank=1)
    (left,) = report.leftovers
    assert left.name == "blk.0.ffn_up_exps.weight" and "stack of experts" in left.why
    made = loratool.inspect(tmp_path / "made")
    assert [one.module for one in made.modules] == ["model.layers.0.self_attn.o_proj"]


def fused_names(path: Path, fused: dict[str, tuple[str, ...]], *, is_split: bool) -> None:
    """Rewrite an adapter's projections: several in one with one A, or one as several."""
    tensors = load_file(path)
    for layer in range(2):
        for whole, parts in fused.items():
            parent = f"base_model.model.model.layers.{layer}."
            ups = [tensors.pop(f"{parent}{part}.lora_B.weight") for part in parts]
            downs = [tensors.pop(f"{parent}{part}.lora_A.weight") for part in parts]
            if is_split:
                for part, up in zip(parts, ups, strict=True):
                    tensors[f"{parent}{part}.lora_A.weight"] = downs[0]
                    tensors[f"{parent}{part}.lora_B.weight"] = up
            else:
                tensors[f"{parent}{whole}.lora_A.weight"] = downs[0]
                tensors[f"{parent}{whole}.lora_B.weight"] = np.concatenate(ups)
    save_file(tensors, path)


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def test_projections_in_one_and_apart(tmp_path: Path) -> None:
    """A model with projections in one takes an adapter with them apart, and the reverse."""
    found = []
    for number, is_split in enumerate((True, False)):
        folder = tmp_path / f"adapter-{number}"
        adapter(folder)
        fused_names(folder / "adapter_model.safetensors", FUSED, is_split=is_split)
        found.append(folder)
    apart = write_gguf(tmp_path / "apart.gguf", weights(), CONFIG, LLAMA, "F32")
    joined = tmp_path / "joined.gguf"
    writer = gguf.GGUFWriter(joined, "phi3")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_embedding_length(64)
    values = weights()
    for layer in range(2):
        for name, parts in zip(("attn_qkv", "ffn_up"), FUSED.values(), strict=True):
            rows = [values[f"model.layers.{layer}.{part}.weight"] for part in parts]
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.concatenate(rows))
        for name, part in (("attn_output", "self_attn.o_proj"), ("ffn_down", "mlp.down_proj")):
            writer.add_tensor(
                f"blk.{layer}.{name}.weight", values[f"model.layers.{layer}.{part}.weight"]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for base in (apart, joined):
        made = []
        for number, folder in enumerate(found):
            out = tmp_path / f"{base.stem}-{number}.gguf"
            loratool.merge(base, [folder], out)
            made.append(read_gguf(out))
        for name, (_, one, _) in made[0].items():
            np.testing.assert_allclose(one, made[1][name][1], atol=1e-6)
    after = read_gguf(tmp_path / "joined-0.gguf")["blk.0.attn_qkv.weight"][1]
    tensors = load_file(found[1] / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.qkv_proj"
    delta = 2 * tensors[f"{key}.lora_B.weight"].astype("f8") @ tensors[f"{key}.lora_A.weight"]
    before = read_gguf(joined)["blk.0.attn_qkv.weight"][1]
    np.testing.assert_allclose(after, before + delta, atol=1e-5)


def test_verifying_tells_what_was_changed_afterwards(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", weights(), CONFIG, LLAMA, "Q8_0", tokens=100)
    adapter(tmp_path / "adapter", ("mlp.up_proj",))
    out = tmp_path / "out.gguf"
    loratool.merge(base, [tmp_path / "adapter"], out)
    whole = out.read_bytes()
    places = {name: stored.offset for name, stored in open_weights(out).tensors.items()}

    def codes(place: int) -> set[str]:
        out.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        return {f.code for f in loratool.verify(out, base=base, adapters=[tmp_path / "adapter"])}

    assert codes(places["blk.0.ffn_up.weight"] + 1) & {"LT104", "LT105"}
    assert codes(places["blk.0.ffn_down.weight"] + 5)
    assert "LT110" in codes(whole.index(b"t77"))
    assert "LT110" in codes(whole.index(b"llama"))
    assert "LT110" in codes(whole.index(b"llama.rope.freq_base") + 20 + 4)


def test_outer_scales_go_with_the_codes(tmp_path: Path) -> None:
    from coded.gguf import blocks

    base = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(base, "qwen2")
    writer.add_head_count(4)
    codes = {}
    for name, scale in (("attn_q", 0.5), ("ffn_up", 0.25)):
        codes[name] = blocks("NVFP4", 64, 4)
        kind = gguf.GGMLQuantizationType.NVFP4
        writer.add_tensor(f"blk.0.{name}.weight", codes[name], raw_dtype=kind)
        writer.add_tensor(f"blk.0.{name}.scale", np.array([scale], "f4"))
        writer.add_tensor(f"blk.0.{name}.input_scale", np.array([3.0], "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    delta = small_adapter(tmp_path / "adapter")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out.gguf")
    after = read_gguf(tmp_path / "out.gguf")
    others = [f"blk.0.ffn_up.{leaf}" for leaf in ("weight", "scale", "input_scale")]
    assert list(after) == ["blk.0.attn_q.weight", *others]
    values = gguf.dequantize(codes["attn_q"], gguf.GGMLQuantizationType.NVFP4)
    kind, found, _ = after["blk.0.attn_q.weight"]
    assert kind == "F16"
    np.testing.assert_allclose(found, 0.5 * values.astype("f8") + delta, rtol=2.0**-11, atol=1e-6)
    assert loratool.verify(tmp_path / "out.gguf", base=base, adapters=[tmp_path / "adapter"]) == ()
