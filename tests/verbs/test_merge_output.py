"""What a merge writes: names, order, bytes, sidecars, index, config; and what it refuses."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import read_all
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import FIXTURES, lora

import loratool
from loratool.errors import BaseModelError, LoratoolError, MergeError, OutputError
from loratool.files.container import read_bytes
from loratool.files.safetensors import read_header

Make = Callable[..., Path]
LLAMA = FIXTURES / "bases" / "llama-untied"
ADAPTER = FIXTURES / "adapters" / "lora-linear"


def test_untouched_bytes_names_and_order_stay(tmp_path: Path) -> None:
    loratool.merge(LLAMA, [ADAPTER], tmp_path / "out")
    changed = 0
    for shard in sorted(LLAMA.glob("*.safetensors")):
        before, after = read_header(shard), read_header(tmp_path / "out" / shard.name)
        assert before.header == after.header
        old, new = shard.read_bytes(), (tmp_path / "out" / shard.name).read_bytes()
        for name, stored in before.tensors.items():
            span = slice(stored.offset, stored.offset + stored.spec.nbytes)
            is_target = any(part in name for part in ("q_proj", "v_proj", "down_proj"))
            assert (old[span] != new[span]) == is_target, name
            changed += is_target
    assert changed == 6
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (LLAMA / name).read_bytes()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        loratool.merge(LLAMA, [ADAPTER], tmp_path / name, threads=1 if name == "one" else 4)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        loratool.merge(LLAMA, [ADAPTER], tmp_path / "out")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_converts_every_float(
    dtype: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base(
        {
            "a.q.weight": torch.randn(6, 5),
            "a.half": torch.randn(3).half(),
            "a.ids": torch.arange(4),
        },
        {"model_type": "x", "torch_dtype": "float32"},
    )
    loratool.merge(base, [make_adapter(lora("a.q", 6, 5))], tmp_path / "out", dtype=dtype)
    merged = read_all(tmp_path / "out")
    kind = getattr(torch, dtype)
    assert merged["a.q.weight"].dtype == merged["a.half"].dtype == kind
    assert merged["a.ids"].dtype == torch.int64
    assert torch.equal(merged["a.half"], load_file(base / "model.safetensors")["a.half"].to(kind))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "x", "torch_dtype": dtype}


def test_lone_files_in_and_out(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5)}) / "model.safetensors"
    adapter = make_adapter(lora("a.q", 6, 5))
    loratool.merge(base, [adapter], tmp_path / "out.safetensors")
    loratool.merge(base, [adapter], tmp_path / "folder")
    files = [tmp_path / "out.safetensors", tmp_path / "folder" / "model.safetensors"]
    one, two = map(read_header, files)
    assert {name: text for name, text in one.metadata.items() if name != "loratool"} == two.metadata
    for name, stored in one.tensors.items():
        assert read_bytes(stored) == read_bytes(two.tensors[name])
    assert (
        files[1].read_bytes()[: len(two.header or b"")]
        == base.read_bytes()[: len(two.header or b"")]
    )
    with pytest.raises(OutputError, match="safetensors"):
        loratool.merge(base, [adapter], tmp_path / "out.bin")
    with pytest.raises(OutputError, match="the output is one"):
        loratool.merge(base.parent, [adapter], tmp_path / "x.safetensors")


def test_pickled_bases_become_safetensors(tmp_path: Path) -> None:
    loratool.merge(FIXTURES / "bases" / "llama-bin", [ADAPTER], tmp_path / "out")
    loratool.merge(LLAMA, [ADAPTER], tmp_path / "expected")
    merged, expected = read_all(tmp_path / "out"), read_all(tmp_path / "expected")
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / "out" / file).tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_aliased_and_transposed_pickled_tensors(make_adapter: Make, tmp_path: Path) -> None:
    weight = torch.randn(5, 6)
    shared = torch.randn(3, 3)
    (tmp_path / "base").mkdir()
    torch.save(
        {"a.q.weight": weight.T, "a.k.weight": shared, "a.l.weight": shared},
        tmp_path / "base" / "pytorch_model.bin",
    )
    factors = lora("a.q", 6, 5)
    loratool.merge(tmp_path / "base", [make_adapter(factors)], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    expected = weight.T + 2 * factors["a.q.lora_B.weight"] @ factors["a.q.lora_A.weight"]
    torch.testing.assert_close(merged["a.q.weight"], expected)
    assert torch.equal(merged["a.k.weight"], shared)
    assert torch.equal(merged["a.l.weight"], shared)


def test_metadata_gets_the_format_that_loaders_ask_for(make_adapter: Make, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(
        {"a.q.weight": torch.randn(6, 5)}, tmp_path / "base" / "model.safetensors", {"by": "me"}
    )
    loratool.merge(tmp_path / "base", [make_adapter(lora("a.q", 6, 5))], tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"by": "me", "format": "pt"}


def test_sidecars_travel_and_unmerged_weights_do_not(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5)})
    (base / "tokenizer.json").write_text("{}")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("x")
    (base / "consolidated.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (base / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "secret").write_text("secret")
    (base / "link.txt").symlink_to(tmp_path / "secret")
    (base / ".hidden").write_text("x")
    plan = loratool.plan_merge(base, [make_adapter(lora("a.q", 6, 5))])
    assert dict(plan.left_behind).keys() == {"consolidated.safetensors", "model.gguf", "link.txt"}
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    told = {"README.md", "loratool.json"}
    assert found == {"model.safetensors", "tokenizer.json", "sub", "sub/notes.txt"} | told


def test_hub_cache_links_are_read_and_never_written_through(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    made = make_base({"a.q.weight": torch.randn(6, 5)}, {"model_type": "x"})
    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in list(made.iterdir()):
        file.rename(cache / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    before = {file: file.read_bytes() for file in (cache / "blobs").iterdir()}
    loratool.merge(snapshot, [make_adapter(lora("a.q", 6, 5))], tmp_path / "out")
    assert before == {file: file.read_bytes() for file in (cache / "blobs").iterdir()}
    assert (tmp_path / "out" / "config.json").read_text() == (snapshot / "config.json").read_text()
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_resized_vocabulary_reaches_config_and_tokenizer(tmp_path: Path) -> None:
    adapter = FIXTURES / "adapters" / "resized-vocab"
    loratool.merge(LLAMA, [adapter], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base = json.loads((LLAMA / "config.json").read_text())
    assert config["vocab_size"] == base["vocab_size"] + 4
    assert {k: v for k, v in config.items() if k != "vocab_size"} == {
        k: v for k, v in base.items() if k != "vocab_size"
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("tied-embed-only", False),
        ("tied-head-only", False),
        ("tied-modules-to-save-embed", False),
        ("tied-ensure-weight-tying", True),
        ("tied-modules-to-save-ensure-weight-tying", True),
        ("tied-trainable-tokens", True),
        ("tied-resized-vocab", True),
    ],
)
def test_ties_are_kept_or_undone(name: str, stays: bool, tmp_path: Path) -> None:
    base = FIXTURES / "bases" / "llama-tied"
    report = loratool.merge(base, [FIXTURES / "adapters" / name], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is stays
    assert ("lm_head.weight" in read_all(tmp_path / "out")) is not stays
    assert report.added == (0 if stays else 1)


def test_new_heads_are_added_and_the_labels_follow(tmp_path: Path) -> None:
    loratool.merge(
        FIXTURES / "bases" / "bert", [FIXTURES / "adapters" / "seq-cls"], tmp_path / "out"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
    assert read_all(tmp_path / "out")["classifier.weight"].shape[0] == 3


def test_nothing_to_change_is_an_error(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5)})
    factors = lora("a.q", 6, 5)
    untrained = make_adapter(factors | {"a.q.lora_B.weight": torch.zeros(6, 4)}, name="untrained")
    trained = make_adapter(factors)
    with pytest.raises(MergeError, match="zero"):
        loratool.merge(base, [untrained], tmp_path / "out")
    with pytest.raises(MergeError, match="change nothing"):
        loratool.merge(base, [trained], tmp_path / "out", weights=[0])
    with pytest.raises(AssertionError):
        assert (tmp_path / "out").exists()


def test_keys_without_a_place_are_an_error_unless_skipped(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5), "a.k.weight": torch.randn(6, 5)})
    factors = lora("a.q", 6, 5)
    cases = {
        "module": lora("a.typo", 6, 5),
        "tensor": {"a.unknown.weight": torch.ones(3)},
        "bias": {"a.q.bias": torch.ones(6)},
    }
    for name, extra in cases.items():
        adapter = make_adapter(factors | extra, name=name, bias="lora_only")
        with pytest.raises(BaseModelError):
            loratool.merge(base, [adapter], tmp_path / "out")
        key = next(iter(extra)).split(".lora_")[0]
        report = loratool.merge(base, [adapter], tmp_path / f"out-{name}", skip=[key])
        assert report.unused
    assert not (tmp_path / "out").exists()


def test_ambiguous_modules_list_the_candidates(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base(
        {
            "text.encoder.layers.0.q.weight": torch.randn(6, 5),
            "image.encoder.layers.0.q.weight": torch.randn(6, 5),
        }
    )
    adapter = make_adapter(lora("encoder.layers.0.q", 6, 5))
    with pytest.raises(BaseModelError, match=r"image\.encoder.*text\.encoder"):
        loratool.merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    ("adapter_module", "base_module"),
    [
        ("model.layers.0.q", "layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
        ("bert.encoder.layer.0.q", "encoder.layer.0.q"),
        ("model.vision_tower.encoder.layers.0.q", "vision_tower.vision_model.encoder.layers.0.q"),
        ("vit.layers.0.attention.q_proj", "vit.encoder.layer.0.attention.attention.query"),
        ("lm_head", "language_model.lm_head"),
    ],
)
def test_prefixes_that_versions_add_and_drop(
    adapter_module: str, base_module: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = torch.randn(6, 5)
    base = make_base(
        {f"{base_module}.weight": weight, "other.layers.1.q.weight": torch.randn(6, 5)},
        {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
        if base_module.startswith("vit.")
        else None,
    )
    factors = lora(adapter_module, 6, 5)
    loratool.merge(base, [make_adapter(factors)], tmp_path / "out")
    delta = (
        2 * factors[f"{adapter_module}.lora_B.weight"] @ factors[f"{adapter_module}.lora_A.weight"]
    )
    torch.testing.assert_close(read_all(tmp_path / "out")[f"{base_module}.weight"], weight + delta)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (
            {
                "a.q.weight": torch.zeros(6, 5, dtype=torch.uint8),
                "a.q.weight.absmax": torch.ones(3),
            },
            {},
        ),
        (
            {"a.q.qweight": torch.zeros(6, 5, dtype=torch.int32)},
            {"quantization_config": {"quant_method": "gptq"}},
        ),
        ({"a.q.weight": torch.zeros(6, 5), "a.q.weight_scale_inv": torch.ones(1)}, {}),
    ],
    ids=["bnb", "gptq", "block fp8"],
)
def test_bases_with_part_of_their_codes_are_refused(
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    base = make_base(tensors, config)
    with pytest.raises(LoratoolError, match=r"quantised|beside them"):
        loratool.merge(base, [make_adapter(lora("a.q", 6, 5))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_square_conv1d_is_decided_by_its_neighbours_not_by_the_flag(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    square = torch.randn(6, 6)
    factors = lora("h.0.attn.c_proj", 6, 6)
    delta = 2 * factors["h.0.attn.c_proj.lora_B.weight"] @ factors["h.0.attn.c_proj.lora_A.weight"]
    for name, shape, expected in (("gpt2", (6, 18), delta.T), ("nano", (18, 6), delta)):
        base = make_base(
            {"h.0.attn.c_proj.weight": square, "h.0.attn.c_attn.weight": torch.randn(shape)},
            name=name,
        )
        for flag in (True, False):
            adapter = make_adapter(factors, name=f"{name}-{flag}", fan_in_fan_out=flag)
            out = tmp_path / f"out-{name}-{flag}"
            loratool.merge(base, [adapter], out)
            merged = read_all(out)["h.0.attn.c_proj.weight"]
            torch.testing.assert_close(merged, square + expected)


def test_square_weights_that_nothing_settles_are_refused(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"block.conv1d.weight": torch.randn(6, 6)})
    flagged = make_adapter(lora("block.conv1d", 6, 6), name="flagged", fan_in_fan_out=True)
    with pytest.raises(BaseModelError, match="nothing tells"):
        loratool.merge(base, [flagged], tmp_path / "out")
    plain = make_adapter(lora("block.conv1d", 6, 6), name="plain", fan_in_fan_out=False)
    loratool.merge(base, [plain], tmp_path / "out")


def test_infinities_are_refused_unless_allowed(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.full((6, 5), 6e4)})
    adapter = make_adapter({k: 100 * v.abs() for k, v in lora("a.q", 6, 5).items()})
    with pytest.raises(MergeError, match="not finite"):
        loratool.merge(base, [adapter], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    loratool.merge(base, [adapter], tmp_path / "out", dtype="float16", allow_nonfinite=True)
    assert read_all(tmp_path / "out")["a.q.weight"].isinf().any()


def test_retention_measures_what_rounding_kept(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    weight = (0.02 * torch.randn(256, 256)).bfloat16()
    base = make_base({"a.q.weight": weight})
    for size in (1e-5, 1e-2):
        factors = {k: v * size**0.5 * 0.1 for k, v in lora("a.q", 256, 256).items()}
        adapter = make_adapter(factors, name=f"adapter-{size}")
        out = tmp_path / f"out-{size}"
        report = loratool.merge(base, [adapter], out)
        delta = 2 * factors["a.q.lora_B.weight"].double() @ factors["a.q.lora_A.weight"].double()
        change = read_all(out)["a.q.weight"].double() - weight.double()
        expected = float((change * delta).sum() / (delta * delta).sum())
        assert report.retention == pytest.approx(expected, abs=1e-4)
        assert any("survived" in note for note in report.notes) == (expected < 0.9)


def test_outputs_are_protected(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5)})
    adapter = make_adapter(lora("a.q", 6, 5))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "keep.txt").write_text("x")
    for output in (
        tmp_path / "there",
        base,
        base / "model.safetensors",
        base / "inside",
        adapter,
        tmp_path,
    ):
        with pytest.raises(OutputError):
            loratool.merge(base, [adapter], output)
    for output in (base, base / "inside", adapter, tmp_path):
        with pytest.raises(OutputError):
            loratool.merge(base, [adapter], output, force=True)
    with pytest.raises(OutputError, match="folder does not exist"):
        loratool.merge(base, [adapter], tmp_path / "missing" / "out")
    with pytest.raises(OutputError, match=r"holds keep\.txt"):
        loratool.merge(base, [adapter], tmp_path / "there", force=True)
    (tmp_path / "there" / "keep.txt").rename(tmp_path / "there" / "old.safetensors")
    loratool.merge(base, [adapter], tmp_path / "there", force=True)
    found = {path.name for path in (tmp_path / "there").iterdir()}
    assert found == {"model.safetensors", "README.md", "loratool.json"}


def test_two_adapters_that_replace_the_same_tensor_are_refused(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.randn(6, 5), "head.weight": torch.randn(3, 6)})
    adapters = [
        make_adapter(
            lora("a.q", 6, 5) | {"head.weight": torch.randn(3, 6)},
            name=name,
            modules_to_save=["head"],
        )
        for name in ("one", "two")
    ]
    with pytest.raises(MergeError, match="two adapters"):
        loratool.merge(base, adapters, tmp_path / "out")


def test_a_saved_weight_with_a_weight_is_interpolated(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    head, saved = torch.randn(3, 6), torch.randn(3, 6)
    base = make_base({"a.q.weight": torch.randn(6, 5), "head.weight": head})
    adapter = make_adapter(lora("a.q", 6, 5) | {"head.weight": saved}, modules_to_save=["head"])
    loratool.merge(base, [adapter], tmp_path / "out", weights=[0.5])
    torch.testing.assert_close(read_all(tmp_path / "out")["head.weight"], (head + saved) / 2)


def test_dry_runs_write_nothing(tmp_path: Path) -> None:
    plan = loratool.plan_merge(LLAMA, [ADAPTER], output=tmp_path / "out")
    assert (plan.merged, plan.copied, plan.added) == (6, 15, 0)
    assert plan.nbytes == sum(file.stat().st_size for file in LLAMA.glob("*.safetensors"))
    assert plan.peak_memory > 0
    assert list(tmp_path.iterdir()) == []


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="no such"):
        loratool.merge(tmp_path / "nothing", [ADAPTER], tmp_path / "out")
    with pytest.raises(LoratoolError, match="no such"):
        loratool.merge(LLAMA, [tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(LoratoolError, match="no adapter"):
        loratool.merge(LLAMA, [], tmp_path / "out")


@pytest.mark.slow
def test_many_shards_take_few_descriptors(make_adapter: Make, tmp_path: Path) -> None:
    count, base = 150, tmp_path / "base"
    base.mkdir()
    places, factors = {}, {}
    for number in range(1, count + 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        names = (f"layers.{number}.q.weight", f"layers.{number}.b")
        tensors = {names[0]: torch.randn(6, 5), names[1]: torch.randn(3)}
        save_file(tensors, base / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
        factors |= lora(f"layers.{number}.q", 6, 5)
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = make_adapter(factors)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)); "
        "from loratool.cli.main import main; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    for arguments in (
        ["merge", base, adapter, "-o", out, "--sync"],
        ["verify", out, "--base", base, "--adapter", adapter],
    ):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert len(list(out.glob("*.safetensors"))) == count


def test_whole_numbers_that_are_not_contiguous_keep_every_bit(
    make_adapter: Make, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    large = (torch.arange(12).reshape(3, 4) + 2**60).T
    nan = torch.full((4, 2), float("nan")).T
    tensors = {"a.q.weight": torch.randn(6, 5), "ids": large, "nan": nan}
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    loratool.merge(tmp_path / "base", [make_adapter(lora("a.q", 6, 5))], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    assert torch.equal(merged["ids"], large)
    assert merged["nan"].isnan().all() and merged["nan"].shape == (2, 4)


def test_a_pattern_that_leaves_nothing_out_is_told(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q.weight": torch.zeros(6, 5), "a.k.weight": torch.zeros(6, 5)})
    adapter = make_adapter(lora("a.q", 6, 5) | lora("a.k", 6, 5))
    skip = ["a.k", "attn_q"]
    report = loratool.merge(base, [adapter], tmp_path / "out", skip=skip)
    assert [note for note in report.notes if "matches nothing" in note] == [
        "--skip 'attn_q' matches nothing"
    ]
