"""Every variant on a part of a fused weight, and on the whole of a split one, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from fakes.finding import find_fakes
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import BaseModelError, UnsupportedError
from loratool.plan import kernels

Array = np.ndarray
Tensors = dict[str, torch.Tensor]
Made = tuple[dict[str, Array], Array, Array]
"""An adapter's tensors, and what becomes of weight and bias."""

ATTENTION = "model.layers.0.self_attn"
HIDDEN, Q, KV = 12, 16, 8
ROWS = {"q_proj": (0, Q), "k_proj": (Q, Q + KV), "v_proj": (Q + KV, Q + 2 * KV)}
ALL = Q + 2 * KV
CONFIG = {
    "model_type": "trifold",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_size": HIDDEN,
}
CLOSE: Final = 1e-12
ALPHA, RANK = 3.0, 2


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


def draw(*shape: int, seed: list[int] = [0]) -> Array:  # noqa: B006 - one stream for all
    seed[0] += 1
    return np.random.RandomState(seed[0]).standard_normal(shape)


def lora(weight: Array, bias: Array) -> Made:
    down, up = draw(RANK, HIDDEN), draw(len(weight), RANK)
    parts = {"lora_A.weight": down, "lora_B.weight": up, "alpha": np.array(ALPHA)}
    return parts, weight + ALPHA / RANK * up @ down, bias


def lora_b_bias(weight: Array, bias: Array) -> Made:
    parts, changed, _ = lora(weight, bias)
    added = draw(len(weight))
    return parts | {"lora_B.bias": added}, changed, bias + ALPHA / RANK * added


def diff_b(weight: Array, bias: Array) -> Made:
    parts, changed, _ = lora(weight, bias)
    added = draw(len(weight))
    return parts | {"diff_b": added}, changed, bias + added


def dora(weight: Array, bias: Array) -> Made:
    parts, changed, _ = lora(weight, bias)
    scale = np.abs(draw(len(weight), 1)) + 1
    changed = changed * scale / np.linalg.norm(changed, axis=1, keepdims=True)
    return parts | {"dora_scale": scale}, changed, bias


def dora_with_bias(weight: Array, bias: Array) -> Made:
    parts, changed, _ = dora(weight, bias)
    added = draw(len(weight))
    return parts | {"diff_b": added}, changed, bias + added


def dora_of_inputs(weight: Array, bias: Array) -> Made:
    parts, changed, _ = lora(weight, bias)
    scale = np.abs(draw(1, HIDDEN)) + 1
    changed = changed * scale / np.linalg.norm(changed, axis=0, keepdims=True)
    return parts | {"dora_scale": scale}, changed, bias


def loha(weight: Array, bias: Array) -> Made:
    parts: dict[str, Array] = {"alpha": np.array(ALPHA)}
    delta: Any = ALPHA / RANK
    for index in (1, 2):
        a, b = draw(len(weight), RANK), draw(RANK, HIDDEN)
        parts |= {f"hada_w{index}_a": a, f"hada_w{index}_b": b}
        delta = delta * (a @ b)
    return parts, weight + delta, bias


def loha_dora(weight: Array, bias: Array) -> Made:
    parts, changed, _ = loha(weight, bias)
    scale = np.abs(draw(len(weight), 1)) + 1
    changed = changed * scale / np.linalg.norm(changed, axis=1, keepdims=True)
    return parts | {"dora_scale": scale}, changed, bias


def loha_dora_of_inputs(weight: Array, bias: Array) -> Made:
    parts, changed, _ = loha(weight, bias)
    scale = np.abs(draw(1, HIDDEN)) + 1
    changed = changed * scale / np.linalg.norm(changed, axis=0, keepdims=True)
    return parts | {"dora_scale": scale}, changed, bias


def lokr(weight: Array, bias: Array) -> Made:
    w1, a, b = draw(4, 3), draw(len(weight) // 4, RANK), draw(RANK, HIDDEN // 3)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": np.array(ALPHA)}
    return parts, weight + ALPHA / RANK * np.kron(w1, a @ b), bias


def lokr_whole(weight: Array, bias: Array) -> Made:
    w1, w2 = draw(2, 3), draw(len(weight) // 2, HIDDEN // 3)
    parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": np.array(1e4), "diff_b": draw(len(weight))}
    return parts, weight + np.kron(w1, w2), bias + parts["diff_b"]


def glora(weight: Array, bias: Array) -> Made:
    a1, a2, b1, b2 = draw(HIDDEN, RANK), draw(RANK, HIDDEN), draw(len(weight), RANK), None
    b2 = draw(RANK, HIDDEN)
    parts = {
        f"{k}.weight": v for k, v in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    }
    delta = ALPHA / RANK * (weight @ a1 @ a2 + b1 @ b2)
    return parts | {"alpha": np.array(ALPHA)}, weight + delta, bias


def glora_old(weight: Array, bias: Array) -> Made:
    a1, a2, b1, b2 = draw(3, HIDDEN), draw(HIDDEN, 3), draw(3, HIDDEN), draw(len(weight), 3)
    parts = {
        f"{k}.weight": v for k, v in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    }
    delta = ALPHA / 3 * (weight @ a2 @ a1 + b2 @ b1)
    return parts | {"alpha": np.array(ALPHA)}, weight + delta, bias


def oft(weight: Array, bias: Array) -> Made:
    blocks = 0.1 * draw(len(weight) // 4, 4, 4)
    turned = []
    for block, rows in zip(blocks, weight.reshape(-1, 4, HIDDEN), strict=True):
        skew = block - block.T
        turned.append(((np.eye(4) + skew) @ np.linalg.inv(np.eye(4) - skew)).T @ rows)
    return {"oft_blocks": blocks}, np.concatenate(turned), bias


def ia3(weight: Array, bias: Array) -> Made:
    scale = draw(len(weight), 1)
    return {"ia3": scale}, weight * (1 + scale), bias


def full(weight: Array, bias: Array) -> Made:
    parts = {"diff": draw(*weight.shape), "diff_b": draw(len(weight))}
    return parts, weight + parts["diff"], bias + parts["diff_b"]


def bias_alone(weight: Array, bias: Array) -> Made:
    added = draw(len(weight))
    return {"diff_b": added}, weight, bias + added


BY_ROWS: Final = {
    made.__name__: made
    for made in (
        lora,
        lora_b_bias,
        diff_b,
        dora,
        dora_with_bias,
        loha,
        loha_dora,
        lokr,
        lokr_whole,
        glora,
        glora_old,
        oft,
        full,
        bias_alone,
    )
}
"""What a part of the outputs can have of."""
OF_THE_WHOLE: Final = {made.__name__: made for made in (dora_of_inputs, loha_dora_of_inputs)}
"""What looks at all outputs of a module."""


class Case:
    """A base that is cut in one way, an adapter that is cut in the other, and the truth."""

    def __init__(self, folder: Path, make: Callable[[Array, Array], Made], *, fused: bool) -> None:
        self.folder = folder
        weight, bias = draw(ALL, HIDDEN), draw(ALL)
        base, adapter = {}, {}
        for name, rows in (("wqkv", (0, ALL)),) if fused else ROWS.items():
            base[f"{ATTENTION}.{name}.weight"] = weight[slice(*rows)]
            base[f"{ATTENTION}.{name}.bias"] = bias[slice(*rows)]
        self.before = weight.copy(), bias.copy()
        self.weight, self.bias = weight.copy(), bias.copy()
        for name, rows in ROWS.items() if fused else (("wqkv", (0, ALL)),):
            if fused and name == "v_proj":
                continue  # whose rows stay
            cut = slice(*rows)
            tensors, self.weight[cut], self.bias[cut] = make(weight[cut], bias[cut])
            adapter |= {f"{ATTENTION}.{name}.{key}": value for key, value in tensors.items()}
        self.base, self.adapter = folder / "base", folder / "adapter.safetensors"
        self.base.mkdir()
        down, up = draw(RANK, 5), draw(5, RANK)  # of a layer that is alike in all of them
        other = {"model.layers.0.o.lora_A.weight": down, "model.layers.0.o.lora_B.weight": up}
        adapter |= other
        base["model.layers.0.o.weight"] = draw(5, 5)
        write(base, self.base / "model.safetensors")
        (self.base / "config.json").write_text(str(CONFIG).replace("'", '"'))
        write(adapter, self.adapter)

    def found(self, output: Path) -> tuple[Array, Array]:
        tensors = load_file(output / "model.safetensors")
        names = ("wqkv",) if f"{ATTENTION}.wqkv.weight" in tensors else tuple(ROWS)
        return tuple(
            np.concatenate([tensors[f"{ATTENTION}.{name}.{leaf}"].numpy() for name in names])
            for leaf in ("weight", "bias")
        )


def write(tensors: dict[str, Array], path: Path) -> None:
    save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, path)


@pytest.mark.parametrize("elements", [kernels.BLOCK_ELEMENTS, 40])
@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", BY_ROWS)
def test_a_part_of_a_weight_and_parts_of_a_delta(
    variant: str,
    fused: bool,
    weight: float,
    elements: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", elements)  # 40: three rows a block
    case = Case(tmp_path, BY_ROWS[variant], fused=fused)
    output = tmp_path / "out"
    loratool.merge(case.base, [case.adapter], output, weights=[weight])
    truth = zip(case.before, (case.weight, case.bias), case.found(output), strict=True)
    for before, after, found in truth:
        wanted = before + weight * (after - before)
        assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()
    assert not loratool.verify(output, base=case.base, adapters=[case.adapter], weights=[weight])
    assert not [f for f in loratool.validate(case.adapter, base=case.base) if f.code > "LT020"]


@pytest.mark.parametrize("variant", OF_THE_WHOLE)
def test_magnitudes_of_inputs_are_of_the_module_s_rows(variant: str, tmp_path: Path) -> None:
    case = Case(tmp_path, OF_THE_WHOLE[variant], fused=True)
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    found, _ = case.found(tmp_path / "out")
    assert np.abs(found - case.weight).max() <= CLOSE * np.abs(case.weight).max()


@pytest.mark.parametrize("variant", OF_THE_WHOLE)
def test_magnitudes_of_inputs_are_not_cut(variant: str, tmp_path: Path) -> None:
    case = Case(tmp_path, OF_THE_WHOLE[variant], fused=False)
    with pytest.raises(UnsupportedError, match="norms run over all outputs"):
        loratool.merge(case.base, [case.adapter], tmp_path / "out")


def boft(weight: Array, bias: Array) -> Made:
    return {"oft_blocks": 0.1 * draw(2, len(weight) // 4, 4, 4)}, weight, bias


def oft_across(weight: Array, bias: Array) -> Made:
    return {"oft_blocks": 0.1 * draw(1, len(weight), len(weight))}, weight, bias


@pytest.mark.parametrize("make", [boft, oft_across])
def test_what_mixes_rows_is_not_cut_between_them(
    make: Callable[[Array, Array], Made], tmp_path: Path
) -> None:
    case = Case(tmp_path, make, fused=False)
    with pytest.raises(UnsupportedError, match="changes their rows together"):
        loratool.merge(case.base, [case.adapter], tmp_path / "out")


def test_a_part_whose_base_has_no_bias_is_named_by_its_key(tmp_path: Path) -> None:
    case = Case(tmp_path, diff_b, fused=True)
    tensors = load_file(case.base / "model.safetensors")
    del tensors[f"{ATTENTION}.wqkv.bias"]
    save_file(tensors, case.base / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"no .*bias") as failure:
        loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert "--skip" in (failure.value.hint or "")
