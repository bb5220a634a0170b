"""Megatron's adapters: fused layers by groups, in the names of NeMo 1, NeMo 2 and Bridge."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Final

import pytest
import torch
import torch.distributed.checkpoint as dcp
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import LoratoolError

HEADS, GROUPS, SIZE, WIDTH, RANK = 6, 2, 4, 12, 3
ALPHA: Final = 6.0
OWN: Final = {
    "self_attention.linear_qkv": "self_attention.linear_qkv.adapter.{}",
    "self_attention.linear_proj": "self_attention.linear_proj.adapter.{}",
    "mlp.linear_fc1": "mlp.linear_fc1.adapter.{}",
    "mlp.linear_fc2": "mlp.linear_fc2.adapter.{}",
}
FIRST: Final = {
    "self_attention.linear_qkv": "self_attention.adapter_layer.lora_kqv_adapter.{}",
    "self_attention.linear_proj": "self_attention.adapter_layer.lora_dense_attention_adapter.{}",
    "mlp.linear_fc1": "mlp.adapter_layer.lora_hto4h_adapter.{}",
    "mlp.linear_fc2": "mlp.adapter_layer.lora_4htoh_adapter.{}",
}
NAMES: Final = {
    "Bridge": ("decoder.layers.0.", OWN),
    "wrapped": ("module.decoder.layers.0.", OWN),
    "NeMo 1": ("model.decoder.layers.0.", FIRST),
}
ROWS: Final = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "v": GROUPS * SIZE}


def by_groups(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return rows of q, k and v as Megatron fuses them: group by group."""
    size, each = SIZE, HEADS // GROUPS
    rows = []
    for group in range(GROUPS):
        rows.append(parts["q"][group * each * size : (group + 1) * each * size])
        rows += [parts[side][group * size : (group + 1) * size] for side in "kv"]
    return torch.cat(rows)


def write(path: Path, names: str) -> dict[str, torch.Tensor]:
    """Write an adapter; return the deltas."""
    prefix, table = NAMES[names]
    tensors, truth = {}, {}
    hub = "model.layers.0"

    def put(own: str, a: torch.Tensor, b: torch.Tensor) -> None:
        tensors[prefix + table[own].format("linear_in.weight")] = a
        tensors[prefix + table[own].format("linear_out.weight")] = b

    scale = ALPHA / RANK
    a, ups = torch.randn(RANK, WIDTH), {s: torch.randn(n, RANK) for s, n in ROWS.items()}
    put("self_attention.linear_qkv", a, by_groups(ups))
    for side, up in ups.items():
        truth[f"{hub}.self_attn.{side}_proj"] = scale * up.double() @ a.double()
    a, gate, up = torch.randn(RANK, WIDTH), torch.randn(20, RANK), torch.randn(20, RANK)
    put("mlp.linear_fc1", a, torch.cat([gate, up]))
    truth[f"{hub}.mlp.gate_proj"] = scale * gate.double() @ a.double()
    truth[f"{hub}.mlp.up_proj"] = scale * up.double() @ a.double()
    for own, leaf, into in (
        ("self_attention.linear_proj", "self_attn.o_proj", ROWS["q"]),
        ("mlp.linear_fc2", "mlp.down_proj", 20),
    ):
        a, b = torch.randn(RANK, into), torch.randn(WIDTH, RANK)
        put(own, a, b)
        truth[f"{hub}.{leaf}"] = scale * b.double() @ a.double()
    save_file(tensors, path)
    return truth


def base(folder: Path, truth: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": GROUPS, "head_dim": SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"{module}.weight": torch.zeros(d.shape) for module, d in truth.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("names", NAMES)
def test_to_peft_and_merged(names: str, tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", names)
    model = base(tmp_path / "base", truth)
    options = {"alpha": ALPHA}
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", base=model, **options)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6
    loratool.merge(model, [tmp_path / "a.safetensors"], tmp_path / "m", **options)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for module, delta in truth.items():
        found = merged[f"{module}.weight"].double()
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)


def test_nemo_1_says_the_heads_itself(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", "NeMo 1")
    said = f"num_attention_heads: {HEADS}\nnum_query_groups: {GROUPS}\nactivation: fast-swiglu\n"
    (tmp_path / "model_config.yaml").write_text(f"{said}peft:\n  peft_scheme: lora\n")
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6


def test_without_heads_only_what_is_not_fused_is_known(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "Bridge")
    adapter = loratool.open_adapter(tmp_path / "a.safetensors")
    assert len(adapter.unresolved) == 2
    with pytest.raises(LoratoolError, match="attention heads"):
        loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p")


@pytest.mark.parametrize("is_first", [True, False])
def test_canonical_adapters_are_the_projections_themselves(is_first: bool, tmp_path: Path) -> None:
    tensors, truth = {}, {}
    block = "decoder.layers.1"
    names = {
        "self_attn.q_proj": "self_attention.linear_qkv.adapter.adapter_q",
        "self_attn.v_proj": "self_attention.linear_qkv.adapter.adapter_v",
        "mlp.gate_proj": "mlp.linear_fc1.adapter.adapter_gate",
        "mlp.up_proj": "mlp.linear_fc1.adapter.adapter_up",
    }
    if is_first:
        names = {
            "self_attn.q_proj": "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter",
            "mlp.gate_proj": "mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter",
        }
    for leaf, own in names.items():
        a, b = torch.randn(RANK, WIDTH), torch.randn(8, RANK)
        tensors |= {f"{block}.{own}.linear_in.weight": a, f"{block}.{own}.linear_out.weight": b}
        truth[f"model.layers.1.{leaf}"] = ALPHA / RANK * b.double() @ a.double()
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6


def test_fused_adapters_are_written_fused_and_others_as_projections(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", "Bridge")
    model = base(tmp_path / "base", truth)
    options = {"base": model, "alpha": ALPHA}
    report = loratool.convert(tmp_path / "a.safetensors", "megatron", tmp_path / "again", **options)
    assert any("with LoRA, alpha = dim" in note for note in report.plan.notes)
    again = loratool.open_adapter(tmp_path / "again").tensors
    assert set(again) == set(load_file(tmp_path / "a.safetensors"))
    loratool.convert(tmp_path / "again", "peft", tmp_path / "p", base=model)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6
    # PEFT has an A of each: three that are equal are no longer one.
    report = loratool.convert(tmp_path / "p", "megatron", tmp_path / "apart", base=model)
    assert any("with CanonicalLoRA" in note for note in report.plan.notes)
    assert any(
        "adapter.adapter_q" in key for key in loratool.open_adapter(tmp_path / "apart").tensors
    )
    loratool.convert(tmp_path / "apart", "peft", tmp_path / "q")
    assert relative_error(dense_deltas(tmp_path / "q"), truth) < 1e-6


def test_what_has_no_name_is_refused(tmp_path: Path) -> None:
    name = "model.vision.blocks.0.fc"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 4),
        f"{name}.lora_B.weight": torch.randn(4, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoratoolError, match="no module of a model of Llama's kind") as caught:
        loratool.convert(tmp_path / "a.safetensors", "megatron", tmp_path / "m")
    assert "--drop" in str(caught.value.hint)


def shard(tensors: dict[str, torch.Tensor], rank: int, count: int) -> dict[str, torch.Tensor]:
    """Return what one tensor-parallel rank has of an adapter."""
    found = {}
    for name, value in tensors.items():
        is_row = "linear_proj" in name or "linear_fc2" in name or "dense" in name or "4htoh" in name
        axis = 1 if is_row and "linear_in" in name else 0
        is_gated = ("fc1" in name or "_hto4h" in name) and "linear_out" in name
        halves = value.chunk(2) if is_gated else [value]
        parts = [half.chunk(count, axis)[rank] for half in halves]
        found[name] = torch.cat(parts).contiguous()
    return found


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(
    "folder", ["mp_rank_{:02d}", "mp_rank_{:02d}_000", "tp_rank_{:02d}_pp_rank_000"]
)
def test_tensor_parallel_ranks_are_gathered(names: str, folder: str, tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", names)
    # A rank of 3 is not spread over two processes: one of 4 is, with a row of zeros.
    tensors = {}
    for name, value in load_file(tmp_path / "a.safetensors").items():
        axis = 0 if "linear_in" in name else 1
        more = list(value.shape)
        more[axis] = 1
        tensors[name] = torch.cat([value, torch.zeros(more)], axis)
    for rank in range(2):
        place = tmp_path / "run" / folder.format(rank)
        place.mkdir(parents=True)
        torch.save(shard(tensors, rank, 2), place / "model_weights.ckpt")
    model = base(tmp_path / "base", truth)
    alpha = ALPHA / RANK * 4
    for given in (tmp_path / "run", tmp_path / "run" / folder.format(1)):
        out = tmp_path / f"peft-{given.name}"
        loratool.convert(given, "peft", out, base=model, alpha=alpha)
        assert relative_error(dense_deltas(out), truth) < 1e-6
    loratool.merge(model, [tmp_path / "run"], tmp_path / "m", alpha=alpha)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for module, delta in truth.items():
        torch.testing.assert_close(merged[f"{module}.weight"].double(), delta, rtol=1e-5, atol=1e-5)
    assert "2 tensor-parallel ranks" in " ".join(loratool.open_adapter(tmp_path / "run").notes)


def test_factors_that_every_rank_has_are_one(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.safetensors", "Bridge")
    tensors = load_file(tmp_path / "a.safetensors")
    for rank in range(2):
        place = tmp_path / "run" / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        part = shard(tensors, rank, 2)
        for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            key = f"decoder.layers.0.{name}.adapter.linear_in.weight"
            part[key] = tensors[key]
        torch.save(part, place / "model_weights.ckpt")
    model = base(tmp_path / "base", truth)
    loratool.convert(tmp_path / "run", "peft", tmp_path / "p", base=model, alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6


def test_missing_ranks_and_stages_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "NeMo 1")
    tensors = load_file(tmp_path / "a.safetensors")
    for rank in (1, 3):
        place = tmp_path / "run" / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        torch.save(tensors, place / "model_weights.ckpt")
    with pytest.raises(LoratoolError, match="rank 3 of 4, and the parts of rank 0, 2 are missing"):
        loratool.open_adapter(tmp_path / "run" / "mp_rank_03")
    (tmp_path / "run" / "model_config.yaml").write_text("tensor_model_parallel_size: 8\n")
    with pytest.raises(LoratoolError, match="rank 1 of 8"):
        loratool.open_adapter(tmp_path / "run")
    for stage in (0, 1):
        place = tmp_path / "staged" / f"tp_rank_00_pp_rank_{stage:03d}"
        place.mkdir(parents=True)
        torch.save(tensors, place / "model_weights.ckpt")
    with pytest.raises(LoratoolError, match="2 pipeline stages"):
        loratool.open_adapter(tmp_path / "staged")


def test_other_schemes_in_folders_of_ranks_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        place = tmp_path / "run" / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        name = "model.layers.0.self_attn.q_proj"
        pair = {
            f"{name}.lora_A.weight": torch.ones(2, 4),
            f"{name}.lora_B.weight": torch.ones(4, 2),
        }
        torch.save(pair, place / "model.pt")
    with pytest.raises(LoratoolError, match="sharded over 2 tensor-parallel ranks") as caught:
        loratool.open_adapter(tmp_path / "run")
    assert "join it" in str(caught.value.hint)


SPELLED: Final = {
    "Qwen3MoeForCausalLM": ("mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
    "OlmoeForCausalLM": ("mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
    "MixtralForCausalLM": ("block_sparse_moe.experts.{}", "w1", "w3", "w2"),
}


@pytest.mark.parametrize("kind", SPELLED)
@pytest.mark.parametrize("form", ["one each", "one for all", "stacked"])
def test_experts(kind: str, form: str, tmp_path: Path) -> None:
    """Each layer of an expert has an adapter, all share one, or a grouped layer stacks them."""
    count, inner = 3, 5
    block = "decoder.layers.0.mlp.experts"
    place, gate, up, down = SPELLED[kind]
    tensors, truth, stacks = {}, {}, {}
    shared = [
        torch.randn(s) for s in ((RANK, WIDTH), (2 * inner, RANK), (RANK, inner), (WIDTH, RANK))
    ]
    for expert in range(count):
        own = [torch.randn(value.shape) for value in shared]
        a1, b1, a2, b2 = shared if form == "one for all" else own
        names = {"linear_fc1": (a1, b1), "linear_fc2": (a2, b2)}
        for leaf, pair in names.items():
            for side, value in zip(("linear_in", "linear_out"), pair, strict=True):
                middle = f"local_experts.{expert}.{leaf}" if form == "one each" else leaf
                stacks.setdefault(f"{block}.{middle}.adapter.{side}.weight", []).append(value)
        hub = f"model.layers.0.{place.format(expert)}"
        scale = ALPHA / RANK
        truth[f"{hub}.{gate}"] = scale * b1[:inner].double() @ a1.double()
        truth[f"{hub}.{up}"] = scale * b1[inner:].double() @ a1.double()
        truth[f"{hub}.{down}"] = scale * b2.double() @ a2.double()
    for key, values in stacks.items():
        tensors[key] = torch.stack(values) if form == "stacked" else values[0]
    save_file(tensors, tmp_path / "a.safetensors")
    model = tmp_path / "base"
    model.mkdir()
    config = {"architectures": [kind], "num_attention_heads": HEADS, "hidden_size": WIDTH}
    config |= {"num_local_experts" if kind.startswith("Mixtral") else "num_experts": count}
    (model / "config.json").write_text(json.dumps(config))
    save_file(
        {f"{m}.weight": torch.zeros(d.shape) for m, d in truth.items()}, model / "m.safetensors"
    )
    (model / "m.safetensors").rename(model / "model.safetensors")
    loratool.merge(model, [tmp_path / "a.safetensors"], tmp_path / "m", alpha=ALPHA)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for module, delta in truth.items():
        found = merged[f"{module}.weight"].double()
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoratoolError, match="--base"):
        loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", alpha=ALPHA)


def test_experts_on_several_ranks_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        folder = tmp_path / "x" / f"mp_rank_00_000_00{rank}"
        folder.mkdir(parents=True)
        key = "decoder.layers.0.mlp.experts.linear_fc2.adapter.linear_{}.weight"
        factors = {key.format("in"): torch.randn(2, 4), key.format("out"): torch.randn(6, 2)}
        save_file(factors, folder / "model.safetensors")
    with pytest.raises(LoratoolError, match="expert-parallel"):
        loratool.open_adapter(tmp_path / "x")


def test_a_distributed_checkpoint_of_megatron_stacks_layers(tmp_path: Path) -> None:
    """As ``torch_dist`` has layers that are alike: one tensor, a layer after the other."""
    truth: dict[str, torch.Tensor] = {}
    layers = []
    for number in range(2):
        deltas = write(tmp_path / f"{number}.safetensors", "Bridge")
        layers.append(load_file(tmp_path / f"{number}.safetensors"))
        truth |= {name.replace("layers.0", f"layers.{number}"): d for name, d in deltas.items()}
    state = {
        name.replace("layers.0.", "layers."): torch.stack([layer[name] for layer in layers])
        for name in layers[0]
    }
    folder = tmp_path / "iter_0000100"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    torch.save({"iteration": 100}, folder / "common.pt")
    said = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(said))
    model = base(tmp_path / "base", truth)
    loratool.convert(folder, "peft", tmp_path / "p", base=model, alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "p"), truth) < 1e-6
