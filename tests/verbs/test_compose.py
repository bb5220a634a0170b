"""``compose``: cancelling pairs, dtypes, extras, schemes, methods, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import dense_deltas, load_config, load_tensors, relative_error, weighted_sum
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from samples import lora
from torch import nn

import loratool
from loratool.errors import AdapterError, LoratoolError, OptionError, OutputError, UnsupportedError

Make = Callable[..., Path]
Q, V = "layers.0.q_proj", "layers.0.v_proj"


def pair(make: Make, **config: Any) -> tuple[Path, Path]:
    one = make({**lora(Q, 12, 10), **lora(V, 6, 10)}, "one", target_modules=[Q, V], **config)
    other = make(lora(Q, 12, 10, 3), "other", r=3, lora_alpha=5, target_modules=[Q])
    return one, other


def test_modules_that_one_adapter_lacks_keep_what_the_other_brings(
    make_adapter: Make, tmp_path: Path
) -> None:
    one, other = pair(make_adapter)
    report = loratool.compose([one, other], tmp_path / "out", weights=[1.5])
    truth = weighted_sum([one, other], [1.5, 1.0])
    assert relative_error(dense_deltas(tmp_path / "out"), truth) < 1e-7
    assert {m.module: m.rank for m in report.modules} == {Q: 7, V: 4}
    config = load_config(tmp_path / "out")
    assert config["target_modules"] == [Q, V]
    assert config["rank_pattern"] == config["alpha_pattern"]  # alpha = rank everywhere


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_near_cancelling_pairs_keep_their_digits(
    make_adapter: Make, tmp_path: Path, size: float, scale: float
) -> None:
    factors = lora(Q, 80, 60)
    near = {key: value + size * torch.randn_like(value) for key, value in factors.items()}
    one = make_adapter(factors, "one", target_modules=[Q])
    other = make_adapter(near, "other", target_modules=[Q])
    truth = weighted_sum([one, other], [scale, -scale])
    report = loratool.compose([one, other], tmp_path / "out", weights=[scale, -scale])
    error = relative_error(dense_deltas(tmp_path / "out"), truth)
    assert error < 1e-6
    assert abs(error - report.relative_error) <= 1e-3 * error + 1e-9


def test_an_adapter_less_itself_is_zero_and_said_so(make_adapter: Make, tmp_path: Path) -> None:
    one, _ = pair(make_adapter)
    report = loratool.compose([one, one], tmp_path / "out", weights=[0.3, -0.3])
    assert all(float(d.norm()) < 1e-6 for d in dense_deltas(tmp_path / "out").values())
    assert report.relative_error == 0
    assert any("cancel" in note for note in report.notes)


def test_more_ranks_than_the_matrix_has_fall_back_to_its_smaller_side(
    make_adapter: Make, tmp_path: Path
) -> None:
    for shape in ((12, 5), (5, 12)):
        adapters = [
            make_adapter(lora(Q, *shape), f"{shape[0]}-{index}", target_modules=[Q])
            for index in range(3)
        ]
        out = tmp_path / f"out-{shape[0]}"
        report = loratool.compose(adapters, out, weights=[0.3, -0.9, 1.7])
        truth = weighted_sum(adapters, [0.3, -0.9, 1.7])
        assert report.modules[0].rank == 5
        assert relative_error(dense_deltas(out), truth) < 1e-7


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rslora=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_sum_is_linear(
    ranks: list[int],
    weights: list[float],
    shape: tuple[int, int],
    rslora: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    used = weights[: len(ranks)]
    assume(any(used))
    folder = tmp_path_factory.mktemp("law")
    adapters = []
    for index, rank in enumerate(ranks):
        place = folder / str(index)
        place.mkdir()
        save_file(
            {f"base_model.model.{key}": value for key, value in lora(Q, *shape, rank).items()},
            place / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "use_rslora": rslora}
        (place / "adapter_config.json").write_text(json.dumps(config))
        adapters.append(place)
    loratool.compose(adapters, folder / "out", weights=used)
    truth = weighted_sum(adapters, used)[Q]
    gross = sum(
        abs(w) * float(dense_deltas(a)[Q].norm()) for w, a in zip(used, adapters, strict=True)
    )
    lost = float((dense_deltas(folder / "out")[Q] - truth).norm())
    assert lost <= 2e-7 * float(truth.norm()) + 1e-12 * gross + 1e-30


# -------------------------------------------------------------------- dtypes


def test_dtypes(make_adapter: Make, tmp_path: Path) -> None:
    halves = [
        make_adapter(lora(Q, 9, 8, dtype=dtype), str(dtype)[6:], target_modules=[Q])
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    loratool.compose(halves[:1], tmp_path / "same", weights=[0.7])
    assert {t.dtype for t in load_tensors(tmp_path / "same").values()} == {torch.bfloat16}
    loratool.compose(halves[:2], tmp_path / "both", weights=[0.7, 0.7])
    assert {t.dtype for t in load_tensors(tmp_path / "both").values()} == {torch.float32}
    assert (
        relative_error(dense_deltas(tmp_path / "both"), weighted_sum(halves[:2], [0.7, 0.7])) < 1e-7
    )
    report = loratool.compose(halves[:1], tmp_path / "told", weights=[0.7])
    truth = weighted_sum(halves[:1], [0.7])
    error = relative_error(dense_deltas(tmp_path / "told"), truth)
    assert abs(report.relative_error - error) <= 1e-3 * error
    assert any("bfloat16" in n or "BF16" in n for n in report.notes)
    loratool.compose(halves, tmp_path / "wanted", dtype="float16")
    assert {t.dtype for t in load_tensors(tmp_path / "wanted").values()} == {torch.float16}


def test_a_dtype_that_overflows_is_an_error(make_adapter: Make, tmp_path: Path) -> None:
    one = make_adapter({k: v * 1e3 for k, v in lora(Q, 4, 4).items()}, target_modules=[Q])
    with pytest.raises(LoratoolError, match="overflows in F16"):
        loratool.compose([one], tmp_path / "out", weights=[1e4], dtype="float16")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------- extras


def heads(make: Make, *values: float) -> list[Path]:
    return [
        make(
            {**lora(Q, 12, 10), "score.weight": torch.full((2, 12), value)},
            f"head-{value}",
            target_modules=[Q],
            modules_to_save=["score"],
        )
        for value in values
    ]


def test_extras_that_agree_or_come_once_are_carried(make_adapter: Make, tmp_path: Path) -> None:
    one, same = heads(make_adapter, 1.0, 1.0000001)
    same_bytes = heads(make_adapter, 2.0)[0]
    bare = make_adapter(lora(Q, 12, 10), "bare", target_modules=[Q])
    report = loratool.compose([bare, one], tmp_path / "once")
    key = "base_model.model.score.weight"
    assert torch.equal(load_tensors(tmp_path / "once")[key], torch.full((2, 12), 1.0))
    assert load_config(tmp_path / "once")["modules_to_save"] == ["score"]
    assert any("1 of 2 adapters" in note for note in report.notes)
    loratool.compose([same_bytes, same_bytes], tmp_path / "agree")
    with pytest.raises(AdapterError, match="different values"):
        loratool.compose([one, same], tmp_path / "differ")


def test_a_weight_that_does_not_reach_a_saved_head_is_said(
    make_adapter: Make, tmp_path: Path
) -> None:
    tensors = {**lora(Q, 12, 10), "lm_head.weight": torch.ones(5, 10)}
    one = make_adapter(tensors, target_modules=[Q], modules_to_save=["lm_head"])
    report = loratool.compose([one], tmp_path / "half", weights=[0.5])
    assert torch.equal(
        load_tensors(tmp_path / "half")["base_model.model.lm_head.weight"], torch.ones(5, 10)
    )
    assert any("stays as it is, such as 'lm_head.weight'" in note for note in report.notes)
    report = loratool.compose([one], tmp_path / "whole")
    assert not any("stays as it is" in note for note in report.notes)


@pytest.mark.parametrize(("policy", "value"), [("first", 1.0), ("last", 4.0), ("average", 2.5)])
def test_policies(make_adapter: Make, tmp_path: Path, policy: str, value: float) -> None:
    adapters = heads(make_adapter, 1.0, 4.0)
    loratool.compose(adapters, tmp_path / "out", weights=[3.0, -1.0], extras=policy)
    found = load_tensors(tmp_path / "out")["base_model.model.score.weight"]
    assert torch.equal(found, torch.full((2, 12), value))


def test_trained_tokens_are_united_row_by_row(make_adapter: Make, tmp_path: Path) -> None:
    key = "embed.token_adapter.trainable_tokens_delta"

    def make(name: str, indices: list[int], values: list[float]) -> Path:
        rows = torch.tensor(values).unsqueeze(1).expand(-1, 6)
        return make_adapter(
            {**lora(Q, 12, 10), key: rows},
            name,
            target_modules=[Q],
            trainable_token_indices={"embed": indices},
        )

    one, other = make("one", [7, 2], [7.0, 2.0]), make("other", [5, 2], [5.0, 2.0])
    loratool.compose([one, other], tmp_path / "out")
    rows = load_tensors(tmp_path / "out")[f"base_model.model.{key}"]
    assert load_config(tmp_path / "out")["trainable_token_indices"] == {"embed": [2, 5, 7]}
    assert rows[:, 0].tolist() == [2.0, 5.0, 7.0]
    third = make("third", [2], [4.0])
    with pytest.raises(AdapterError, match="token 2"):
        loratool.compose([one, third], tmp_path / "differ")
    loratool.compose([one, third], tmp_path / "mean", extras="average")
    rows = load_tensors(tmp_path / "mean")[f"base_model.model.{key}"]
    assert rows[:, 0].tolist() == [3.0, 7.0]


def test_scaled_biases_are_added_up(make_adapter: Make, tmp_path: Path) -> None:
    biases = [torch.randn(12), torch.randn(12)]
    adapters = [
        make_adapter(
            {**lora(Q, 12, 10), f"{Q}.lora_B.bias": bias},
            f"bias-{index}",
            target_modules=[Q],
            lora_bias=True,
        )
        for index, bias in enumerate(biases)
    ]
    loratool.compose(adapters, tmp_path / "out", weights=[0.5, -1.0])
    found = load_tensors(tmp_path / "out")[f"base_model.model.{Q}.lora_B.bias"]
    assert torch.allclose(found, 2 * (0.5 * biases[0] - biases[1]))
    assert load_config(tmp_path / "out")["lora_bias"] is True


def test_replaced_biases_go_under_the_base_layer_of_what_is_adapted_now(
    make_adapter: Make, tmp_path: Path
) -> None:
    one = make_adapter(
        {
            **lora(Q, 12, 10),
            f"{Q}.base_layer.bias": torch.ones(12),
            f"{V}.bias": torch.ones(6),
        },
        "one",
        target_modules=[Q],
        bias="all",
    )
    other = make_adapter(lora(V, 6, 10), "other", target_modules=[V])
    loratool.compose([one, other], tmp_path / "out")
    keys = load_tensors(tmp_path / "out").keys()
    assert f"base_model.model.{V}.base_layer.bias" in keys
    assert f"base_model.model.{V}.bias" not in keys
    assert load_config(tmp_path / "out")["bias"] == "all"


# ------------------------------------------------------------- schemes, files


def test_schemes_meet_and_are_chosen(make_adapter: Make, tmp_path: Path) -> None:
    peft = make_adapter(lora(Q, 12, 10), "peft", target_modules=[Q])
    plain = make_adapter(lora(Q, 12, 10), "plain", prefix="", target_modules=[Q])
    bare = tmp_path / "bare.safetensors"
    save_file({f"{Q}.lora_A": torch.randn(2, 10), f"{Q}.lora_B": torch.randn(12, 2)}, bare)
    loratool.compose([peft, plain, bare], tmp_path / "out", alpha=4)
    assert loratool.inspect(tmp_path / "out").adapter.scheme == "peft"
    loratool.compose([bare, bare], tmp_path / "both.safetensors")
    found = load_tensors(tmp_path / "both.safetensors")
    assert set(found) == {f"{Q}.lora_A", f"{Q}.lora_B"}
    loratool.compose([peft], tmp_path / "path", to="module-path")
    assert set(load_tensors(tmp_path / "path")) == {f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"}
    with pytest.raises(UnsupportedError, match="is not written"):
        loratool.compose([peft], tmp_path / "no", to="nonsense")
    with pytest.raises(OutputError, match="single file"):
        loratool.compose([peft], tmp_path / "no.safetensors")
    embedding = make_adapter(
        {"e.lora_embedding_A": torch.randn(2, 9), "e.lora_embedding_B": torch.randn(6, 2)},
        "embedding",
        r=2,
        target_modules=["e"],
    )
    loratool.compose([embedding], tmp_path / "weight", to="loralib")
    found = load_tensors(tmp_path / "weight")
    truth = {key.rpartition(".")[2]: t for key, t in load_tensors(embedding).items()}
    scale = loratool.inspect(embedding).modules[0].scale
    dense = scale * truth["lora_embedding_B"] @ truth["lora_embedding_A"]
    assert torch.allclose(found["e.lora_B"] @ found["e.lora_A"], dense, atol=1e-5)


def test_other_spellings_of_the_same_modules_are_matched_and_said_so(
    make_adapter: Make, tmp_path: Path
) -> None:
    one = make_adapter(lora("model.layers.0.q_proj", 9, 8), "one")
    other = make_adapter(lora("layers.0.q_proj", 9, 8), "other")
    report = loratool.compose([one, other], tmp_path / "out")
    assert [m.module for m in report.modules] == ["model.layers.0.q_proj"]
    assert any("spelled otherwise" in note for note in report.notes)


def test_the_same_inputs_give_the_same_bytes(make_adapter: Make, tmp_path: Path) -> None:
    adapters = pair(make_adapter)
    for name, threads in (("a", 1), ("b", 4)):
        loratool.compose(adapters, tmp_path / name, rank=2, threads=threads)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_metadata_says_how_the_file_came_to_be(make_adapter: Make, tmp_path: Path) -> None:
    import hashlib

    adapters = pair(make_adapter)
    loratool.compose(adapters, tmp_path / "out", weights=[1, -1], rank=2)
    metadata = loratool.open_adapter(tmp_path / "out").metadata
    assert set(metadata) == {"format", "loratool"}
    history = json.loads(metadata["loratool"])
    assert history["command"] == "compose"
    assert history["version"] == loratool.__version__
    assert history["options"]["weights"] == [1, -1]
    digest = hashlib.sha256((adapters[0] / "adapter_model.safetensors").read_bytes())
    assert history["inputs"][0] == {"name": "one", "sha256": digest.hexdigest()}


def test_tokenizers_travel_along(make_adapter: Make, tmp_path: Path) -> None:
    one, other = pair(make_adapter)
    (one / "tokenizer.json").write_text("one")
    (other / "tokenizer.json").write_text("other")
    (one / "optimizer.pt").write_bytes(b"state")
    (one / "vocab.txt").symlink_to("/etc/hostname")
    report = loratool.compose([one, other], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "one"
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert any("differs from" in note for note in report.notes)
    names = [Path(name).name for name, _ in report.plan.left_behind]
    assert names == ["optimizer.pt", "vocab.txt"]


# ------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "della", "knots"])
def test_methods_write_what_they_compute(make_adapter: Make, tmp_path: Path, method: str) -> None:
    adapters = pair(make_adapter)
    first = loratool.compose(adapters, tmp_path / "a", method=method, seed=1)
    assert first.relative_error < 1e-6
    assert first.distance_from_sum is not None and first.distance_from_sum > 0.01
    loratool.compose(adapters, tmp_path / "b", method=method, seed=1)
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loratool.compose(adapters, tmp_path / "c", method=method, seed=2)
    same = relative_error(dense_deltas(tmp_path / "c"), dense_deltas(tmp_path / "a")) < 1e-9
    assert same == (method in ("ties", "knots"))
    low = loratool.compose(adapters, tmp_path / "low", method=method, rank=1, seed=1)
    truth = dense_deltas(tmp_path / "a")
    tails = sum(float(torch.linalg.svdvals(d)[1:].square().sum()) for d in truth.values())
    total = sum(float(d.square().sum()) for d in truth.values())
    assert low.relative_error == pytest.approx((tails / total) ** 0.5, rel=1e-4)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(10, 12)
        self.v = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.v(x)], dim=1)


@pytest.mark.slow
def test_peft_linear_is_what_peft_does(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Toy(), LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"]))
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=2, target_modules=["q", "v"]))
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "saved")
    model.add_weighted_adapter(["default", "other"], [0.6, -0.8], "sum", "linear")
    paths = [tmp_path / "saved", tmp_path / "saved" / "other"]
    report = loratool.compose(paths, tmp_path / "out", weights=[0.6, -0.8], method="peft-linear")
    for name, delta in dense_deltas(tmp_path / "out").items():
        layer = model.base_model.model.get_submodule(name)
        assert torch.allclose(layer.get_delta_weight("sum").double(), delta, atol=1e-6)
    assert {m.rank for m in report.modules} == {3}
    assert report.distance_from_sum > 0.1  # its cross terms


def test_peft_linear_needs_one_rank(make_adapter: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="needs one rank"):
        loratool.compose(pair(make_adapter), tmp_path / "out", method="peft-linear")


# ------------------------------------------------------------------ refusals


def test_what_cannot_be_added_up_is_refused(make_adapter: Make, tmp_path: Path) -> None:
    one, _ = pair(make_adapter)
    wide = make_adapter(lora(Q, 12, 11), "wide", target_modules=[Q])
    with pytest.raises(AdapterError, match="12 × 11"):
        loratool.compose([one, wide], tmp_path / "out")
    conv = make_adapter(
        {f"{Q}.lora_A.weight": torch.randn(4, 10, 1), f"{Q}.lora_B.weight": torch.randn(12, 4, 1)},
        "conv",
    )
    with pytest.raises(AdapterError, match="as conv"):
        loratool.compose([one, conv], tmp_path / "out")
    activated = make_adapter(lora(Q, 12, 10), "alora", alora_invocation_tokens=[1])
    with pytest.raises(UnsupportedError, match="aLoRA"):
        loratool.compose([one, activated], tmp_path / "out")
    loratool.compose([activated, activated], tmp_path / "out")
    assert load_config(tmp_path / "out")["alora_invocation_tokens"] == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1, 2, 3]}, "3 weights for 2 adapters"),
        ({"weights": [float("nan")]}, "no finite number"),
        ({"method": "average"}, "is none of linear"),
        ({"extras": "all"}, "is none of error"),
        ({"method": "ties", "density": 0}, "no share"),
        ({"density": 0.3}, "means nothing"),
        ({"method": "ties", "epsilon": 0.3}, "means nothing"),
        ({"method": "della", "density": 0.9, "epsilon": 0.5}, "leaves no drop"),
        ({"rank": 0}, "less than 1"),
        ({"rank": 2, "rank_multiple": 8}, "no multiple of 8"),
        ({"energy": 0.5, "max_error": 0.5}, "give one of"),
        ({"energy": 1.5}, "no share"),
        ({"max_error": 1.0}, "not in"),
        ({"max_size": "big"}, "is no size"),
        ({"max_size": 10}, "do not hold a single rank"),
        ({"sv_ratio": 0.5}, "less than 1"),
    ],
)
def test_options_that_make_no_sense(
    make_adapter: Make, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((OptionError, AdapterError), match=words):
        loratool.compose(pair(make_adapter), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
