"""Trained weights beside an adapter, used where they fit the base; heads that no file holds."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import dense_deltas
from safetensors.torch import load_file, save_file
from samples import lora

import loratool

Make = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"
PROJECTOR = "model.mm_projector.0.weight"
BIAS = "model.mm_projector.0.bias"
STATE = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_1.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_3.pth",
    "training_args.bin",
    "trainer_state.json",
    "random_states_0.pkl",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt",
)


@pytest.fixture
def base(make_base: Make) -> Path:
    tensors = {f"{Q}.weight": torch.randn(6, 5), PROJECTOR: torch.randn(6, 4), BIAS: torch.randn(6)}
    return make_base(tensors, {"model_type": "llama"})


@pytest.fixture
def adapter(make_adapter: Make) -> Path:
    return make_adapter(lora(Q, 6, 5))


def put(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    report = loratool.merge(base, [adapter], out, **options)
    return report, load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "mm_projector.bin", "x.safetensors"])
@pytest.mark.parametrize(
    "prefix", ["", "base_model.model.", "base_model.", "module.", "_orig_mod.base_model.model."]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_trained_weights_take_the_place_of_the_bases(
    base: Path, adapter: Path, tmp_path: Path, name: str, prefix: str, dtype: torch.dtype
) -> None:
    trained = {PROJECTOR: torch.randn(6, 4).to(dtype), BIAS: torch.randn(6).to(dtype)}
    put(adapter, name, {prefix + key: value for key, value in trained.items()})
    report, found = merged(base, adapter, tmp_path / "out")
    old = load_file(base / "model.safetensors")
    for key, value in trained.items():
        assert torch.equal(found[key], value.float())
    delta = dense_deltas(adapter)[Q]
    assert torch.allclose(found[f"{Q}.weight"].double(), old[f"{Q}.weight"] + delta, atol=1e-6)
    assert any(f"2 trained tensors of {name} were used" in note for note in report.notes)
    assert loratool.verify(tmp_path / "out", base=base, adapters=[adapter]) == ()
    (adapter / name).unlink()
    codes = {f.code for f in loratool.verify(tmp_path / "out", base=base, adapters=[adapter])}
    assert codes == {"LT104"}


def test_a_weight_moves_part_of_the_way_and_none_leaves_it(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    trained = torch.randn(6, 4)
    put(adapter, "mm_projector.bin", {PROJECTOR: trained})
    old = load_file(base / "model.safetensors")[PROJECTOR]
    for weights, share in (([0.5], 0.5), (["mm_projector=0.25"], 0.25), (["mm_projector=0"], 0)):
        _, found = merged(base, adapter, tmp_path / f"out-{share}", weights=weights)
        assert torch.allclose(found[PROJECTOR], old + share * (trained - old), atol=1e-6)
    report, found = merged(base, adapter, tmp_path / "skipped", skip=["mm_proj"])
    assert torch.equal(found[PROJECTOR], old)
    assert report.unused == (PROJECTOR,)


def test_what_has_no_place_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    put(adapter, "value_head.safetensors", {"v_head.summary.weight": torch.randn(1, 6)})
    put(adapter, "projector.pt", {PROJECTOR: torch.randn(7, 4), BIAS: torch.randn(6)})
    report, found = merged(base, adapter, tmp_path / "out")
    words = " ".join(report.notes)
    assert "1 tensors of value_head.safetensors were not used, for the base has no place" in words
    assert "'v_head.summary.weight'" in words
    assert "1 trained tensors of projector.pt were used" in words
    assert "1 tensors of projector.pt were not used, for the base has no place for them" in words
    assert repr(PROJECTOR) in words
    assert set(found) == set(load_file(base / "model.safetensors"))


def test_training_state_is_neither_opened_nor_named(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in STATE:
        (adapter / name).write_bytes(b"not to be read")
        (adapter / name).chmod(0)
    report, _ = merged(base, adapter, tmp_path / "out")
    assert not any(name in note for name in STATE for note in report.notes)
    truncated = loratool.truncate(adapter, tmp_path / "small", rank=2)
    reasons = dict(truncated.plan.left_behind)
    assert {reasons[name] for name in STATE} == {"training state"}


class _Call:
    """A pickle that calls something when it is loaded by Python."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_what_cannot_be_read_is_named_and_runs_nothing(
    base: Path, adapter: Path, tmp_path: Path, content: bytes | None
) -> None:
    trap = tmp_path / "trap"
    (adapter / "extra.bin").write_bytes(
        pickle.dumps({PROJECTOR: _Call(trap)}) if content is None else content
    )
    report, _ = merged(base, adapter, tmp_path / "out")
    assert any(
        "extra.bin lies beside it and was not used: cannot be read" in n for n in report.notes
    )
    assert not trap.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "merged.safetensors"])
def test_a_whole_model_beside_an_adapter_is_not_taken_for_trained_weights(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    put(adapter, name, {f"{Q}.weight": torch.randn(6, 5), PROJECTOR: torch.randn(6, 4)})
    report, found = merged(base, adapter, tmp_path / "out")
    assert any(f"{name} lies beside it and was not used" in note for note in report.notes)
    assert torch.equal(found[PROJECTOR], load_file(base / "model.safetensors")[PROJECTOR])


def test_a_base_that_lies_in_the_adapters_folder_is_no_companion(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    for path in base.iterdir():
        path.rename(adapter / path.name)
    report, _ = merged(adapter, adapter, tmp_path / "out")
    assert not any("beside" in note for note in report.notes)


def test_other_adapters_are_no_companions(base: Path, adapter: Path, tmp_path: Path) -> None:
    put(adapter, "checkpoint-10.safetensors", lora(Q, 6, 5))
    report, _ = merged(base, adapter, tmp_path / "out")
    assert not any("checkpoint-10" in note for note in report.notes)


def test_a_lone_file_among_others_has_no_companions(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file(lora(Q, 6, 5), folder / "style.safetensors")
    put(folder, "projector.safetensors", {PROJECTOR: torch.randn(6, 4)})
    report, found = merged(base, folder / "style.safetensors", tmp_path / "out")
    assert torch.equal(found[PROJECTOR], load_file(base / "model.safetensors")[PROJECTOR])
    assert not any("projector.safetensors" in note for note in report.notes)


def test_what_the_adapter_brings_itself_comes_first(
    base: Path, make_adapter: Make, tmp_path: Path
) -> None:
    own = torch.randn(6, 4)
    adapter = make_adapter(lora(Q, 6, 5) | {PROJECTOR: own}, modules_to_save=["mm_projector.0"])
    put(adapter, "mm_projector.bin", {PROJECTOR: torch.randn(6, 4)})
    report, found = merged(base, adapter, tmp_path / "out")
    assert torch.equal(found[PROJECTOR], own)
    assert any("were not used, for the adapter itself brings them" in n for n in report.notes)


HEADS = [
    # task, listed, held by the adapter, held beside it; what is missed: code, and modules
    ("SEQ_CLS", ["score"], None, None, "LT034", ["score"]),
    ("SEQ_CLS", ["classifier", "score"], None, None, "LT034", ["classifier", "score"]),
    ("SEQ_CLS", ["classifier", "score"], "score", None, None, []),
    ("SEQ_CLS", ["classifier", "score"], "qa_head", None, None, []),
    ("SEQ_CLS", ["classifier", "score"], None, "score", None, []),
    ("TOKEN_CLS", ["classifier", "score"], None, None, "LT034", ["classifier", "score"]),
    ("CAUSAL_LM", ["score"], None, None, "LT016", ["score"]),
    ("CAUSAL_LM", None, None, None, None, []),
    ("SEQ_CLS", None, None, None, None, []),
]


@pytest.mark.parametrize(("task", "listed", "held", "beside", "code", "missed"), HEADS)
def test_a_head_that_no_file_holds_is_a_finding_and_a_note(
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
    task: str,
    listed: list[str] | None,
    held: str | None,
    beside: str | None,
    code: str | None,
    missed: list[str],
) -> None:
    base = make_base(
        {f"{name}.weight": torch.randn(2, 6) for name in ("score", "qa_head")}
        | {f"{Q}.weight": torch.randn(6, 5)},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    )
    tensors = lora(Q, 6, 5) | ({f"{held}.weight": torch.randn(2, 6)} if held else {})
    adapter = make_adapter(tensors, task_type=task, modules_to_save=listed)
    if beside:
        put(adapter, "value_head.safetensors", {f"{beside}.weight": torch.randn(2, 6)})
    found = [f for f in loratool.validate(adapter) if f.code in ("LT016", "LT034")]
    assert [f.code for f in found] == [code] * len(missed)
    assert all(f.is_error for f in found)
    report = loratool.merge(base, [adapter], tmp_path / "out")
    notes = [note for note in report.notes if "no file holds it" in note]
    assert len(notes) == len(missed)
    assert all(repr(name) in note for name, note in zip(missed, notes, strict=True))
    if beside:
        trained = load_file(adapter / "value_head.safetensors")["score.weight"]
        assert torch.equal(load_file(tmp_path / "out/model.safetensors")["score.weight"], trained)


def test_a_head_that_is_left_out_as_asked_is_not_missed(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({f"{Q}.weight": torch.randn(6, 5), "score.weight": torch.randn(2, 6)})
    head = {"score.weight": torch.randn(2, 6)}
    adapter = make_adapter(lora(Q, 6, 5) | head, modules_to_save=["score"], task_type="SEQ_CLS")
    report = loratool.merge(base, [adapter], tmp_path / "out", skip=["score"])
    assert report.unused == ("base_model.model.score.weight",)
    assert not any("no file holds it" in note for note in report.notes)
