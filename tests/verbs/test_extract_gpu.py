"""``extract`` on a GPU, which here is a fake one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import load_tensors
from fake_gpu import fake_gpu
from oracles import read_all

import loratool
from loratool.errors import BaseModelError, OptionError
from loratool.verbs.extraction.gpu import MOST_WAITS

pytestmark = pytest.mark.slow
SHAPES = {"a.q_proj": (700, 900), "b.up_proj": (900, 640), "c.k_proj": (300, 400)}


@pytest.fixture
def pair(make_base: Any) -> tuple[Path, Path]:
    return make_pair(make_base, torch.bfloat16, torch.bfloat16)


def make_pair(make_base: Any, before: torch.dtype, after: torch.dtype) -> tuple[Path, Path]:
    base, tuned = {}, {}
    for name, (m, n) in SHAPES.items():
        weight = (torch.randn(m, n) * 0.02).to(before)
        change = torch.randn(m, 9) @ torch.randn(9, n) * 1e-3 + 1e-4 * torch.randn(m, n)
        base[f"{name}.weight"] = weight
        tuned[f"{name}.weight"] = (weight.float() + change).to(after)
    return make_base(base, name="base"), make_base(tuned, name="tuned")


def deltas(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_tensors(path)
    return {
        name: (tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double())
        for name in tensors
        if "lora_A" in name
    }


def agree(one: Path, other: Path, tolerance: float) -> None:
    first, second = deltas(one), deltas(other)
    assert first.keys() == second.keys()
    for name, delta in first.items():
        assert float((delta - second[name]).norm()) < tolerance * float(delta.norm())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_a_gpu_finds_what_the_processor_finds(
    make_base: Any, tmp_path: Path, monkeypatch: Any, before: torch.dtype, after: torch.dtype
) -> None:
    base, tuned = make_pair(make_base, before, after)
    options: dict[str, Any] = {"rank": 9, "method": "randomised", "dtype": "float32"}
    here = loratool.extract(base, tuned, tmp_path / "here", **options)
    with fake_gpu(monkeypatch) as gpu:
        there = loratool.extract(base, tuned, tmp_path / "there", device="cuda", **options)
    assert gpu.kernels and there.device == "cuda:0 (fake)" and here.device == "cpu"
    agree(tmp_path / "here", tmp_path / "there", 1e-5)
    for one, other in zip(here.modules, there.modules, strict=True):
        assert one.squared_norm == pytest.approx(other.squared_norm, rel=1e-5)
        assert one.squared_error == pytest.approx(other.squared_error, rel=1e-3)
        assert one.floor == pytest.approx(other.floor, rel=1e-5)


def test_a_module_waits_a_few_times_only(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    with fake_gpu(monkeypatch) as gpu:
        loratool.extract(*pair, tmp_path / "out", rank=9, method="randomised", device="cuda")
    assert 0 < gpu.waits <= MOST_WAITS * len(SHAPES)
    assert gpu.uploads and not gpu.bad_uploads
    assert gpu.flags == {False}


@pytest.mark.parametrize("largest", [4_000_000, 1_600_000, 100_000])
def test_less_memory_means_other_ways_and_the_same_factors(
    make_base: Any, tmp_path: Path, monkeypatch: Any, largest: int
) -> None:
    """All at once, then one at a time and by tiles of rows, at last by the processor."""
    monkeypatch.setattr("loratool.verbs.extraction.gpu.TILE_BYTES", 400_000)
    base, tuned = make_pair(make_base, torch.bfloat16, torch.bfloat16)
    options: dict[str, Any] = {"rank": 9, "method": "randomised", "dtype": "float32"}
    loratool.extract(base, tuned, tmp_path / "here", **options)
    with fake_gpu(monkeypatch, memory=largest):
        found = loratool.extract(base, tuned, tmp_path / "there", device="cuda", **options)
    told = " ".join(note for note in found.notes if "GPU" in note)
    assert ("one module at a time" in told) == (largest < 4_000_000)
    assert ("tiles of rows" in told) == (largest < 4_000_000)
    assert ("by the processor" in told) == (largest == 100_000)
    agree(tmp_path / "here", tmp_path / "there", 1e-5)


def test_transposed_weights_and_experts(make_base: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """GPT-2's Conv1D, an embedding, and experts in one tensor; whole and by tiles."""
    shapes = {
        "h.0.attn.c_attn.weight": (300, 900),
        "wte.weight": (900, 300),
        "model.layers.0.mlp.experts.down_proj": (2, 300, 400),
    }
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    tuned = {
        name: weight
        + torch.randn(*shapes[name][:-1], 5) @ torch.randn(*shapes[name][:-2], 5, shapes[name][-1])
        + 0.01 * torch.randn(shapes[name])
        for name, weight in base.items()
    }
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    pair = make_base(base, config, name="base"), make_base(tuned, config, name="tuned")
    options: dict[str, Any] = {"rank": 5, "method": "randomised", "embeddings": True}
    loratool.extract(*pair, tmp_path / "here", **options)
    loratool.merge(pair[0], [tmp_path / "here"], tmp_path / "merged")
    wanted = read_all(tmp_path / "merged")
    for memory in (1 << 40, 1_000_000):
        monkeypatch.setattr("loratool.verbs.extraction.gpu.TILE_BYTES", 200_000)
        out = tmp_path / f"{memory}"
        with fake_gpu(monkeypatch, memory=memory):
            loratool.extract(*pair, out, device="cuda", **options)
        loratool.merge(pair[0], [out], tmp_path / f"merged-{memory}")
        for name, tensor in read_all(tmp_path / f"merged-{memory}").items():
            change = float((wanted[name] - base[name]).norm())
            assert float((tensor - wanted[name]).norm()) < 1e-4 * change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(
    make_base: Any, tmp_path: Path, monkeypatch: Any, value: float
) -> None:
    weight = torch.randn(300, 400)
    tuned = weight + 0.1 * torch.randn(300, 400)
    tuned[3, 4] = value
    pair = (
        make_base({"a.q_proj.weight": weight}, name="base"),
        make_base({"a.q_proj.weight": tuned}, name="tuned"),
    )
    with fake_gpu(monkeypatch), pytest.raises(BaseModelError, match="difference is not finite"):
        loratool.extract(*pair, tmp_path / "out", rank=4, device="cuda")
    assert not (tmp_path / "out").exists()


def test_infinities_that_are_in_both_are_no_difference(
    make_base: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    weight = torch.randn(300, 400)
    weight[3, 4], weight[5, 6] = float("inf"), float("nan")
    tuned = weight + torch.randn(300, 3) @ torch.randn(3, 400)
    pair = (
        make_base({"a.q_proj.weight": weight}, name="base"),
        make_base({"a.q_proj.weight": tuned}, name="tuned"),
    )
    here = loratool.extract(*pair, tmp_path / "here", rank=6)
    for memory in (1 << 40, 400_000):
        monkeypatch.setattr("loratool.verbs.extraction.gpu.TILE_BYTES", 100_000)
        with fake_gpu(monkeypatch, memory=memory):
            found = loratool.extract(*pair, tmp_path / f"{memory}", rank=6, device="cuda")
        assert found.relative_error == pytest.approx(here.relative_error, rel=1e-3, abs=1e-6)


def test_the_error_of_another_kind_is_no_lack_of_memory(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a device-side assert")

    monkeypatch.setattr("loratool.verbs.extraction.gpu._difference", broken)
    with fake_gpu(monkeypatch), pytest.raises(RuntimeError, match="device-side assert"):
        loratool.extract(*pair, tmp_path / "out", rank=4, device="cuda")


@pytest.mark.parametrize("rule", [{"rank": "auto"}, {"max_error": 0.2}, {"max_size": "60kB"}])
def test_ranks_that_depend_on_the_values(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, rule: dict[str, Any]
) -> None:
    here = loratool.extract(*pair, tmp_path / "here", method="randomised", **rule)
    with fake_gpu(monkeypatch):
        there = loratool.extract(
            *pair, tmp_path / "there", method="randomised", device="cuda", **rule
        )
    assert [m.rank for m in here.modules] == [m.rank for m in there.modules]
    agree(tmp_path / "here", tmp_path / "there", 1e-2)


@pytest.mark.parametrize("has_driver", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_auto_is_a_gpu_for_large_pairs_where_there_is_one(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, has_driver: bool, large: bool
) -> None:
    monkeypatch.setattr("loratool.plan.devices.has_gpu", lambda: has_driver)
    monkeypatch.setattr("loratool.plan.devices.WORTH_A_GPU", 1000 if large else 1 << 40)
    with fake_gpu(monkeypatch) as gpu:
        planned = loratool.extract(*pair, tmp_path / "out", rank=4, dry_run=True)
        found = loratool.extract(*pair, tmp_path / "out", rank=4)
    is_wanted = has_driver and large
    assert bool(gpu.kernels) == is_wanted
    assert found.device == ("cuda:0 (fake)" if is_wanted else "cpu")
    assert (planned.gpu_memory is not None) == is_wanted
    assert planned.as_json()["device"] == ("cuda:0" if is_wanted else "cpu")


def test_a_gpu_that_torch_cannot_use_is_a_note(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("loratool.plan.devices.has_gpu", lambda: True)
    monkeypatch.setattr("loratool.plan.devices.WORTH_A_GPU", 1000)
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = loratool.extract(*pair, tmp_path / "out", rank=4)
    assert found.device == "cpu"
    assert any("PyTorch cannot use it" in note for note in found.notes)


def test_a_run_is_not_taken_up_on_another_device(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    from loratool.verbs.extraction import pipeline

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "write_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loratool.extract(*pair, tmp_path / "out", rank=4, resume=True)
    with fake_gpu(monkeypatch), pytest.raises(OptionError, match="other inputs or options"):
        loratool.extract(*pair, tmp_path / "out", rank=4, resume=True, device="cuda")
    loratool.extract(*pair, tmp_path / "out", rank=4, resume=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e25])
def test_values_of_any_size(make_base: Any, tmp_path: Path, monkeypatch: Any, scale: float) -> None:
    weight = torch.randn(500, 400) * scale
    tuned = weight * (1 + 0.1 * torch.randn(500, 400))
    pair = (
        make_base({"a.q_proj.weight": weight}, name="base"),
        make_base({"a.q_proj.weight": tuned}, name="tuned"),
    )
    options: dict[str, Any] = {"rank": 4, "method": "randomised", "dtype": "float32"}
    (here,) = loratool.extract(*pair, tmp_path / "here", **options).modules
    with fake_gpu(monkeypatch):
        (there,) = loratool.extract(*pair, tmp_path / "there", device="cuda", **options).modules
    assert here.relative_error == pytest.approx(there.relative_error, rel=1e-4)
    assert here.squared_norm == pytest.approx(there.squared_norm, rel=1e-4)
    assert here.floor == pytest.approx(there.floor, rel=1e-4) and here.floor > 0


def test_several_gpus_share_the_modules(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    from loratool.verbs.extraction.gpu import _Lane

    used: set[str] = set()
    upload = _Lane.upload

    def noted(lane: _Lane, *given: Any) -> Any:
        used.add(str(lane.device))
        return upload(lane, *given)

    monkeypatch.setattr(_Lane, "upload", noted)
    with fake_gpu(monkeypatch):
        found = loratool.extract(*pair, tmp_path / "out", rank=4, device="cuda:0,cuda:0")
        assert found.device == "cuda:0 (fake)"
        more = loratool.extract(*pair, tmp_path / "more", rank=4, device="cuda:0,cuda:1")
    assert more.device == "cuda:0 (fake), cuda:1 (fake)"
    assert used == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize("verb", ["merge", "truncate", "compose"])
def test_other_verbs_write_the_same_on_a_gpu(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, verb: str
) -> None:
    adapter = tmp_path / "adapter"
    loratool.extract(*pair, adapter, rank=6, dtype="float32")
    calls: dict[str, Callable[[Path, str], Any]] = {
        "merge": lambda out, device: loratool.merge(pair[0], [adapter], out, device=device),
        "truncate": lambda out, device: loratool.truncate(adapter, out, rank=3, device=device),
        "compose": lambda out, device: loratool.compose(
            [adapter, adapter], out, weights=[0.7, 0.4], rank=4, device=device
        ),
    }
    calls[verb](tmp_path / "here", "cpu")
    with fake_gpu(monkeypatch) as gpu:
        calls[verb](tmp_path / "there", "cuda")
    assert gpu.kernels and gpu.flags <= {False}
    if verb == "merge":
        first, second = (read_all(tmp_path / side) for side in ("here", "there"))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    else:
        agree(tmp_path / "here", tmp_path / "there", 1e-6)


def test_comparing_on_a_gpu(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    loratool.extract(*pair, one, rank=6)
    loratool.extract(*pair, other, rank=3)
    here = loratool.compare([one, other])
    with fake_gpu(monkeypatch):
        there = loratool.compare([one, other], device="cuda")
    assert here.cosine == pytest.approx(there.cosine, rel=1e-9)


def test_products_are_exact_whatever_was_set_and_it_is_set_again() -> None:
    from loratool.plan.gpu import exact_products

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for setting in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = setting
            with exact_products():
                assert torch.backends.cuda.matmul.allow_tf32 is False
            assert torch.backends.cuda.matmul.allow_tf32 is setting
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_the_fake_gpu_refuses_what_a_real_one_refuses(monkeypatch: Any) -> None:
    """And counts what it is there to count; a test that cannot fail shows nothing."""
    with fake_gpu(monkeypatch, memory=1000) as gpu:
        there = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="together"):
            there + torch.ones(3)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.ones(1000, device="cuda")
        torch.ones(3).to("cuda")
        assert gpu.bad_uploads == 1
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert (gpu.uploads, gpu.bad_uploads) == (2, 1)
        before = gpu.waits
        assert float(there.sum()) == 3 and there.cpu().tolist() == [1, 1, 1]
        assert gpu.waits == before + 2
