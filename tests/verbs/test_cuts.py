"""An adapter fits whichever way the base is cut: every verb, through a fake layout alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.finding import find_fakes
from safetensors.torch import load_file, save_file
from samples import lora

import loratool
from loratool.errors import BaseModelError, UnsupportedError

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
ATTENTION = "model.layers.0.self_attn"
HIDDEN, Q, KV = 10, 12, 4
ROWS = {"q_proj": (0, Q), "k_proj": (Q, Q + KV), "v_proj": (Q + KV, Q + 2 * KV)}
CONFIG = {
    "model_type": "trifold",
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_size": HIDDEN,
}
SCALE = 2.0  # lora_alpha 8 / r 4


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


@pytest.fixture
def whole() -> torch.Tensor:
    return torch.randn(Q + 2 * KV, HIDDEN)


def cut(whole: torch.Tensor, *, fused: bool) -> Tensors:
    if fused:
        return {f"{ATTENTION}.wqkv.weight": whole}
    return {f"{ATTENTION}.{p}.weight": whole[a:b].clone() for p, (a, b) in ROWS.items()}


def factors(*, fused: bool, parts: tuple[str, ...] = tuple(ROWS)) -> tuple[Tensors, torch.Tensor]:
    """Return an adapter's factors, and its delta of the whole projection in float64."""
    names = {"wqkv": (0, Q + 2 * KV)} if fused else {part: ROWS[part] for part in parts}
    made: Tensors = {}
    delta = torch.zeros(Q + 2 * KV, HIDDEN, dtype=torch.float64)
    for part, (start, stop) in names.items():
        one = lora(f"{ATTENTION}.{part}", stop - start, HIDDEN)
        down, up = (t.double() for t in one.values())
        delta[start:stop] = SCALE * (up @ down)
        made |= one
    return made, delta


def joined(tensors: Tensors) -> torch.Tensor:
    names = ("wqkv",) if f"{ATTENTION}.wqkv.weight" in tensors else tuple(ROWS)
    return torch.cat([tensors[f"{ATTENTION}.{name}.weight"] for name in names]).double()


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("cut_of_base", [False, True])
@pytest.mark.parametrize("cut_of_adapter", [False, True])
def test_merge(
    cut_of_base: bool,
    cut_of_adapter: bool,
    whole: torch.Tensor,
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    base = make_base(cut(whole, fused=cut_of_base), CONFIG)
    made, delta = factors(fused=cut_of_adapter)
    adapter = make_adapter(made)
    assert not [f for f in loratool.validate(adapter, base=base) if f.code.startswith("LT02")]
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert list(merged) == sorted(cut(whole, fused=cut_of_base))
    assert_near(joined(merged), whole.double() + delta)
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter])


def test_a_part_alone_leaves_the_other_rows_as_they_are(
    whole: torch.Tensor, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    made, delta = factors(fused=False, parts=("k_proj",))
    base = make_base(cut(whole, fused=True), CONFIG)
    loratool.merge(base, [make_adapter(made)], tmp_path / "out")
    merged = joined(load_file(tmp_path / "out" / "model.safetensors"))
    assert_near(merged, whole.double() + delta)
    kept = [*range(Q), *range(Q + KV, Q + 2 * KV)]
    assert torch.equal(merged[kept], whole[kept].double())


def test_a_dora_of_the_whole_is_that_of_its_parts(
    whole: torch.Tensor, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    made, delta = factors(fused=True)
    magnitude = torch.rand(Q + 2 * KV) + 0.5
    made[f"{ATTENTION}.wqkv.lora_magnitude_vector"] = magnitude
    adapter = make_adapter(made, use_dora=True)
    loratool.merge(make_base(cut(whole, fused=False), CONFIG), [adapter], tmp_path / "out")
    changed = whole.double() + delta
    expected = magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    assert_near(joined(load_file(tmp_path / "out" / "model.safetensors")), expected)


@pytest.mark.parametrize(
    ("fused_base", "config", "words"),
    [
        (True, {"init_lora_weights": "pissa"}, "is initialised with pissa"),
        (False, {"init_lora_weights": "pissa"}, "is initialised with pissa"),
    ],
)
def test_what_needs_a_whole_weight_is_refused_where_there_is_none(
    fused_base: bool,
    config: dict[str, Any],
    words: str,
    whole: torch.Tensor,
    make_base: Make,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    made, _ = factors(fused=not fused_base, parts=("q_proj",))
    base = make_base(cut(whole, fused=fused_base), CONFIG)
    with pytest.raises(UnsupportedError, match=words):
        loratool.merge(base, [make_adapter(made, **config)], tmp_path / "out")


@pytest.mark.parametrize("fused", [False, True])
def test_shapes_that_do_not_fit_are_told(
    fused: bool, whole: torch.Tensor, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    made = lora(f"{ATTENTION}.{'wqkv' if not fused else 'k_proj'}", KV + 1, HIDDEN)
    base, adapter = make_base(cut(whole, fused=fused), CONFIG), make_adapter(made)
    with pytest.raises(BaseModelError, match="has shape"):
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "LT022" in [finding.code for finding in loratool.validate(adapter, base=base)]


@pytest.mark.parametrize("fused_tuned", [False, True])
def test_extract_from_a_fused_base(
    fused_tuned: bool, whole: torch.Tensor, make_base: Make, tmp_path: Path
) -> None:
    _, delta = factors(fused=True)
    base = make_base(cut(whole, fused=True), CONFIG)
    tuned = make_base(cut((whole + delta).float(), fused=fused_tuned), CONFIG, "tuned")
    loratool.extract(base, tuned, tmp_path / "out", rank=4)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    total = torch.zeros_like(delta)
    for part, (start, stop) in ({"wqkv": (0, len(whole))} if fused_tuned else ROWS).items():
        key = f"base_model.model.{ATTENTION}.{part}.lora_"
        total[start:stop] = found[f"{key}B.weight"].double() @ found[f"{key}A.weight"].double()
    assert (total - delta).norm() <= 1e-4 * delta.norm()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_convert_restores_names_and_reads_rows(
    variant: str, whole: torch.Tensor, make_base: Make, tmp_path: Path
) -> None:
    base = make_base(cut(whole, fused=True), CONFIG)
    flat = f"lora_{ATTENTION.replace('.', '_')}_k_proj"
    down, up = torch.randn(4, HIDDEN), torch.randn(KV, 4)
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    tensors |= {f"{flat}.alpha": torch.tensor(4.0)}
    magnitude = torch.rand(KV, 1) + 0.5
    options: dict[str, Any] = {}
    expected = up.double() @ down.double()
    if variant == "dora":
        tensors[f"{flat}.dora_scale"] = magnitude
        options = {"to_lora": True, "rank": KV}
        rows = whole[slice(*ROWS["k_proj"])].double()
        changed = rows + expected
        expected = magnitude.double() * changed / changed.norm(dim=1, keepdim=True) - rows
    save_file(tensors, tmp_path / "flat.safetensors")
    loratool.convert(tmp_path / "flat.safetensors", "peft", tmp_path / "out", base=base, **options)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = f"base_model.model.{ATTENTION}.k_proj.lora_"
    made = found[f"{key}B.weight"].double() @ found[f"{key}A.weight"].double()
    assert np.allclose(made.numpy(), expected.numpy(), rtol=0, atol=1e-4)
