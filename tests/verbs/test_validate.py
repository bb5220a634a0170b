"""validate: each code is found where it belongs, and nothing is found where nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import manifest
from safetensors.torch import save_file
from samples import FIXTURES, ROOT, lora

import loratool

Make = Callable[..., Path]
GOOD = {"target_modules": ["q"], "lora_alpha": 8}
DOCS = ROOT / "docs" / "findings.md"


def codes(path: Path, **options: Any) -> set[str]:
    return {finding.code for finding in loratool.validate(path, **options)}


CASES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "missing B": ({"a.q.lora_A.weight": torch.ones(4, 5)}, {}, "LT001"),
    "missing A": ({"a.q.lora_B.weight": torch.ones(5, 4)}, {}, "LT001"),
    "empty": (
        {"a.q.lora_A.weight": torch.ones(0), "a.q.lora_B.weight": torch.ones(5, 4)},
        {},
        "LT002",
    ),
    "ranks differ": (
        {"a.q.lora_A.weight": torch.ones(4, 5), "a.q.lora_B.weight": torch.ones(6, 3)},
        {},
        "LT003",
    ),
    "integers": (
        {"a.q.lora_A.weight": torch.ones(4, 5).int(), "a.q.lora_B.weight": torch.ones(6, 4)},
        {},
        "LT004",
    ),
    "rank": (lora("a.q", 6, 5), {"r": 8}, "LT005"),
    "dora without magnitude": (lora("a.q", 6, 5), {"use_dora": True}, "LT006"),
    "magnitude without dora": (
        lora("a.q", 6, 5) | {"a.q.lora_magnitude_vector": torch.ones(6)},
        {},
        "LT006",
    ),
    "bias": (lora("a.q", 6, 5) | {"a.q.lora_B.bias": torch.ones(6)}, {}, "LT007"),
    "idle pattern": (lora("a.q", 6, 5), {"alpha_pattern": {"zz": 3}}, "LT010"),
    "overlap": (lora("a.q", 6, 5), {"alpha_pattern": {"q": 3, ".*q": 5}}, "LT011"),
    "idle target": (lora("a.q", 6, 5), {"target_modules": ["q", "v"]}, "LT012"),
    "no target": (lora("a.q", 6, 5), {"target_modules": ["v"]}, "LT013"),
    "unknown field": (lora("a.q", 6, 5), {"frobnicate": True}, "LT014"),
    "unknown task": (lora("a.q", 6, 5), {"task_type": "SEQUENCE"}, "LT014"),
    "saved module": (lora("a.q", 6, 5), {"modules_to_save": ["head"]}, "LT016"),
    "unlisted head": (lora("a.q", 6, 5) | {"score.weight": torch.ones(2, 3)}, {}, "LT030"),
    "escape in a name": (lora("a\x1b[31m.q", 6, 5), {}, "LT019"),
    "path as a name": (lora("../../q", 6, 5), {}, "LT019"),
    "mixed dtypes": (
        {"a.q.lora_A.weight": torch.ones(4, 5).half(), "a.q.lora_B.weight": torch.ones(6, 4)},
        {},
        "LT020",
    ),
    "activated": (lora("a.q", 6, 5), {"alora_invocation_tokens": [1]}, "LT023"),
    "residual": (lora("a.q", 6, 5), {"init_lora_weights": "pissa_niter_4"}, "LT023"),
    "wrapped twice": (lora("base_model.model.a.q", 6, 5), {}, "LT026"),
    "tokens": (
        lora("a.q", 6, 5) | {"emb.token_adapter.trainable_tokens_delta": torch.ones(2, 3)},
        {"trainable_token_indices": [1, 2, 3]},
        "LT028",
    ),
    "no tokens": (lora("a.q", 6, 5), {"trainable_token_indices": [1]}, "LT028"),
    "no effect": (lora("a.q", 6, 5), {"lora_alpha": 0}, "LT029"),
    "defaults": (lora("a.q", 6, 5), {"r": None, "rank_pattern": {"q": 4}}, "LT031"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_fault_has_its_code(name: str, make_adapter: Make) -> None:
    tensors, config, code = CASES[name]
    assert code in codes(make_adapter(tensors, **(GOOD | config)))


def test_a_good_adapter_has_no_findings(make_adapter: Make, make_base: Make) -> None:
    adapter = make_adapter(lora("a.q", 6, 5), **GOOD)
    base = make_base({"a.q.weight": torch.ones(6, 5)})
    assert loratool.validate(adapter, base=base, deep=True) == ()


def test_alphas_and_magnitudes_may_be_wider_than_factors(
    make_adapter: Make, tmp_path: Path
) -> None:
    factors = lora("a.q", 6, 5, dtype=torch.float16)
    plain = make_adapter(factors, **GOOD)
    loratool.convert(plain, "kohya", tmp_path / "with-alphas.safetensors")
    assert codes(tmp_path / "with-alphas.safetensors") <= {"LT033"}
    wide = factors | {"a.q.lora_magnitude_vector": torch.ones(6)}
    assert codes(make_adapter(wide, "dora", **GOOD, use_dora=True)) == set()


@pytest.mark.parametrize(
    "case", [c for c in manifest() if c["expect"] == "merge"], ids=lambda c: c["case"]
)
def test_what_merges_has_no_errors(case: dict[str, Any]) -> None:
    for adapter in case["adapters"]:
        found = loratool.validate(FIXTURES / adapter, base=FIXTURES / case["base"], deep=True)
        assert [finding for finding in found if finding.is_error] == []


def test_values_are_only_read_when_asked(make_adapter: Make) -> None:
    factors = lora("a.q", 6, 5) | lora("b.q", 6, 5)
    factors["a.q.lora_A.weight"][0, 0] = float("nan")
    factors["b.q.lora_B.weight"].zero_()
    adapter = make_adapter(factors, **GOOD)
    assert codes(adapter) == set()
    assert codes(adapter, deep=True) == {"LT017", "LT018"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_float_is_searched_for_what_is_not_finite(
    dtype: torch.dtype, value: float, make_adapter: Make
) -> None:
    factors = {key: tensor.to(dtype) for key, tensor in lora("a.q", 6, 5).items()}
    assert codes(make_adapter(factors, name="good", **GOOD), deep=True) == set()
    factors["a.q.lora_B.weight"][2, 1] = value
    assert "LT017" in codes(make_adapter(factors, name="bad", **GOOD), deep=True)


def test_negative_zeros_are_zeros_too(make_adapter: Make) -> None:
    factors = lora("a.q", 6, 5)
    factors["a.q.lora_B.weight"] = -torch.zeros(6, 4)
    assert "LT018" in codes(make_adapter(factors, **GOOD), deep=True)


def test_a_base_that_does_not_fit(make_adapter: Make, make_base: Make) -> None:
    adapter = make_adapter(
        lora("a.q", 6, 5) | lora("a.qq", 6, 5) | {"a.odd.weight": torch.ones(2)},
        target_modules=["q", "qq"],
    )
    base = make_base({"a.q.weight": torch.ones(7, 5), "a.qx.weight": torch.ones(6, 5)})
    found = loratool.validate(adapter, base=base)
    by_code = {finding.code: finding for finding in found}
    assert by_code.keys() >= {"LT021", "LT022", "LT024"}
    assert "a.q" in str(by_code["LT021"].hint)
    assert "[7, 5]" in by_code["LT022"].message


def test_quantised_bases_and_unreadable_adapters(
    make_adapter: Make, make_base: Make, tmp_path: Path
) -> None:
    adapter = make_adapter(lora("a.q", 6, 5), **GOOD)
    base = make_base({"a.q.weight": torch.zeros(6, 5, dtype=torch.int8)})
    assert codes(adapter, base=base) == {"LT027"}
    broken = tmp_path / "adapter_model.safetensors"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (found,) = loratool.validate(broken)
    assert (found.code, found.severity) == ("LT000", "error")


def test_missing_configurations_and_second_files(make_adapter: Make) -> None:
    adapter = make_adapter(lora("a.q", 6, 5), **GOOD)
    torch.save({}, adapter / "adapter_model.bin")
    assert codes(adapter) == {"LT025"}
    (adapter / "adapter_model.bin").unlink()
    (adapter / "adapter_config.json").unlink()
    assert codes(adapter) == {"LT009", "LT015"}


def test_keys_without_the_prefix(tmp_path: Path) -> None:
    save_file(lora("a.q", 6, 5), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}'
    )
    assert codes(tmp_path) == {"LT026"}


@pytest.mark.parametrize("suffix", ["bin", "npz"])
def test_checksums_of_archives(suffix: str, tmp_path: Path) -> None:
    """One bit of a number, which torch reads as it is and NumPy does not."""
    import numpy as np

    values = {"a.lora_A.weight": np.ones((2, 4), "f4"), "a.lora_B.weight": np.ones((4, 2), "f4")}
    path = tmp_path / f"adapter.{suffix}"
    if suffix == "bin":
        torch.save({name: torch.from_numpy(value) for name, value in values.items()}, path)
    else:
        np.savez(path, **values)
    assert "LT036" not in codes(path, deep=True)
    data = bytearray(path.read_bytes())
    data[data.index(np.ones(8, "f4").tobytes())] ^= 1
    path.write_bytes(data)
    assert "LT036" not in codes(path)
    assert "LT036" in codes(path, deep=True)


def test_many_findings_of_one_code_are_folded_for_people(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    factors = {"down": torch.ones(1, 2), "up": torch.ones(2, 1), "alpha": torch.tensor(1.0)}
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    save_file(
        {f"lora_odd_{n}_x.{names[k]}": v.clone() for n in range(1200) for k, v in factors.items()},
        path,
    )
    found = loratool.validate(path)
    assert len(found.as_json()["findings"]) == 1200
    lines = str(found).splitlines()
    assert len(lines) == 12
    assert lines[-2].startswith("warning LT033  and 1,190 more")
    assert lines[-1] == "1,200 warnings: 1,200 of LT033"
    assert str(loratool.validate(path)).count("--json lists all") == 1
