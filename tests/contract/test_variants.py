"""What every variant promises: one delta, however it is written and wherever it is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from corpus import (
    EXACT,
    MERGEABLE,
    NEAREST,
    VARIANTS,
    Draw,
    Sample,
    deltas_of,
    exact,
    sample,
)
from safetensors.torch import load_file
from samples import SCHEMES, place

import loratool
from loratool.errors import UnsupportedError

CLOSE: Final = 1e-12
"""All samples are float64: nothing but its rounding may differ."""
ALPHA: Final = 2.0**-24
"""An alpha tensor is float32."""
TO: Final = tuple(name for name in SCHEMES if name not in ("cloneofsimo", "diffusers-legacy"))
"""Not those that number modules, or know attention processors only."""
EVERY: Final = frozenset(TO)
BARE: Final = frozenset(("loralib", "mlx", "prefixed", "transposed"))
WITHOUT_PLACE: Final = {
    "dora": BARE - {"mlx"},
    "dora-conv": BARE,
    "dora-conv1d": BARE - {"mlx"} | {"diffusers"},
    "dora-embedding": BARE - {"mlx"} | {"kohya", "comfy"},
    "conv": BARE,
    "conv1d": {"diffusers"},
    "lora-bias": BARE,
    "experts": EVERY - {"peft"},
    "pissa": EVERY,
    "olora": EVERY,
    "kasa": EVERY,
}
"""What cannot be written, and is refused by name."""
UNET: Final = {
    "lora_unet_mid_block_attentions_0_proj_in": ("mid_block.attentions.0.proj_in", ()),
    "lora_unet_mid_block_resnets_0_conv1": ("mid_block.resnets.0.conv1", (3, 3)),
}


def merged(base: Path, adapter: Path, output: Path) -> dict[str, Any]:
    """Merge and return the tensors."""
    loratool.merge(base, [adapter], output)
    return {key: exact(value) for key, value in load_file(output / "model.safetensors").items()}


def distance(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Return the largest relative difference of a tensor."""
    assert found.keys() == wanted.keys()
    return max(
        float(np.linalg.norm(found[name] - value) / np.linalg.norm(value))
        for name, value in wanted.items()
    )


def with_base(made: Sample) -> tuple[Sample, dict[str, Any]]:
    """Give a variant the weights that it is for; return what they become too."""
    if made.base:
        names = {module: f"{module}.weight" for module in made.deltas}
        names |= {module: f"{UNET[module][0]}.weight" for module in made.deltas if module in UNET}
    else:
        names, base, draw = {}, {}, Draw("base", "F64")
        for module, delta in made.deltas.items():
            path, kernel = UNET[module]
            into = delta.shape[1] // (9 if kernel else 1)
            names[module] = f"{path}.weight"
            base[names[module]] = draw(len(delta), into, *kernel)
        made = replace(made, base=base)
    wanted = {}
    for module, delta in made.deltas.items():
        weight = exact(made.base[names[module]])
        wanted[names[module]] = weight + delta.reshape(weight.shape)
    return made, wanted


@pytest.mark.parametrize("scheme", TO)
@pytest.mark.parametrize("variant", MERGEABLE)
def test_it_merges_alike_in_every_scheme(variant: str, scheme: str, tmp_path: Path) -> None:
    made = sample(variant, "F64")
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    output = place(tmp_path, scheme, "converted")
    given = None if variant == "experts" else base  # see below
    if scheme in WITHOUT_PLACE.get(variant, ()):
        with pytest.raises(UnsupportedError):
            loratool.convert(adapter, scheme, output, base=given)
        assert not output.exists()
        return
    loratool.convert(adapter, scheme, output, base=given)
    if scheme in ("prefixed", "mlx") or variant == "lora-bias":  # merge wants what is PEFT's
        loratool.convert(output, "peft", tmp_path / "back", base=base)
        output = tmp_path / "back"
    wanted = merged(base, adapter, tmp_path / "wanted")
    found = merged(base, output, tmp_path / "found")
    assert distance(found, wanted) <= (ALPHA if scheme in ("kohya", "comfy") else CLOSE)


@pytest.mark.xfail(strict=False, reason="convert --base looks for modules, not raw parameters")
def test_experts_convert_beside_their_base(tmp_path: Path) -> None:
    made = sample("experts", "F64")
    loratool.convert(made.write(tmp_path), "peft", tmp_path / "out", base=made.write_base(tmp_path))


@pytest.mark.parametrize("variant", EXACT)
def test_its_factors_are_its_dense_form(variant: str, tmp_path: Path) -> None:
    made, _ = with_base(sample(variant, "F64"))
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    loratool.convert(adapter, "peft", tmp_path / "plain", base=base, to_lora=True)
    found = deltas_of(tmp_path / "plain")
    for (_, dense), (_, factors) in zip(
        sorted(made.deltas.items()), sorted(found.items()), strict=True
    ):
        assert np.linalg.norm(factors - dense) <= CLOSE * np.linalg.norm(dense)


@pytest.mark.parametrize("variant", EXACT)
def test_its_factors_merge_as_its_dense_form(variant: str, tmp_path: Path) -> None:
    made, wanted = with_base(sample(variant, "F64"))
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    loratool.convert(adapter, "peft", tmp_path / "plain", base=base, to_lora=True)
    assert distance(merged(base, tmp_path / "plain", tmp_path / "merged"), wanted) <= CLOSE


@pytest.mark.parametrize("variant", NEAREST)
def test_at_full_rank_the_nearest_is_its_dense_form(variant: str, tmp_path: Path) -> None:
    made, wanted = with_base(sample(variant, "F64"))
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    rank = min(next(iter(wanted.values())).shape)
    loratool.convert(adapter, "peft", tmp_path / "plain", base=base, to_lora=True, rank=rank)
    assert distance(merged(base, tmp_path / "plain", tmp_path / "merged"), wanted) <= CLOSE


@pytest.mark.parametrize("variant", [*EXACT, *NEAREST])
def test_what_merge_does_not_take_it_refuses_by_name(variant: str, tmp_path: Path) -> None:
    made, _ = with_base(sample(variant, "F64"))
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    with pytest.raises(UnsupportedError) as failure:
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "loratool convert" in (failure.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_seen_is_what_was_written(variant: str, tmp_path: Path) -> None:
    made = sample(variant, "F32")
    info = loratool.inspect(made.write(tmp_path)).as_json()
    assert info["bytes"] >= sum(
        value.numel() * value.element_size() for value in made.tensors.values()
    )
    assert info["parameters"] > 0
    names = [name for name in made.deltas or made.merged if not name.endswith(".bias")]
    assert len(info["modules"]) == max(1, len(names))
