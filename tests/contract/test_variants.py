"""What every variant promises: one delta, however it is written and wherever it is used."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from corpus import (
    EXACT,
    LYCORIS_DORAS,
    MERGEABLE,
    NEAREST,
    UNET_PATHS,
    VARIANTS,
    WHOLE,
    Draw,
    Sample,
    deltas_of,
    exact,
    sample,
)
from safetensors.torch import load_file, save_file
from samples import SCHEMES, place

import loratool
from loratool import variants
from loratool.errors import AdapterError, LoratoolError, UnsupportedError
from loratool.plan import kernels
from loratool.plan.gpu import read_tensor
from loratool.schemes import scheme_named
from loratool.schemes.opening import open_adapter
from loratool.values.arrays import decode

CLOSE: Final = 1e-12
"""All samples are float64: nothing but its rounding may differ."""
ALPHA: Final = 2.0**-24
"""An alpha tensor is float32."""
TO: Final = tuple(
    name
    for name in SCHEMES
    if name not in ("adapterhub", "cloneofsimo", "diffusers-legacy", "onetrainer", "xlabs")
    and scheme_named(name).follows is None
)
"""Not those that number modules, have those of some models, or know attention processors only."""
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
    "peft-ia3": EVERY,
}
"""What cannot be written, and is refused by name."""


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
        names |= {
            module: f"{UNET_PATHS[module][0]}.weight"
            for module in made.deltas
            if module in UNET_PATHS
        }
    else:
        names, base, draw = {}, {}, Draw("base", "F64")
        for module, delta in made.deltas.items():
            path, kernel = UNET_PATHS[module]
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
@pytest.mark.slow
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


@pytest.mark.xfail(
    strict=True, raises=AdapterError, reason="convert --base looks for modules, not raw parameters"
)
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


CHANGES: Final = (*NEAREST, "peft-ia3")
"""Variants that make something else of a weight."""


def as_merged(variant: str) -> tuple[Sample, dict[str, Any]]:
    """Return a sample with the tensors of its base, and what a merge makes of them."""
    made = sample(variant, "F64")
    if made.merged:
        changed = {name: change.value for name, change in made.merged.items()}
        return made, {name: exact(value) for name, value in made.base.items()} | changed
    return with_base(made)


@pytest.mark.parametrize("variant", CHANGES)
def test_at_full_rank_the_nearest_is_its_dense_form(variant: str, tmp_path: Path) -> None:
    made, wanted = as_merged(variant)
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    rank = max(min(value.shape) for value in wanted.values() if value.ndim > 1)
    loratool.convert(adapter, "peft", tmp_path / "plain", base=base, to_lora=True, rank=rank)
    assert distance(merged(base, tmp_path / "plain", tmp_path / "merged"), wanted) <= CLOSE


@pytest.mark.parametrize("variant", [*EXACT, *CHANGES, *WHOLE, *LYCORIS_DORAS])
@pytest.mark.parametrize("weight", [1.0, 0.25, -1.0])
@pytest.mark.parametrize("elements", [kernels.BLOCK_ELEMENTS, 100])
def test_it_merges_without_a_detour(
    variant: str, weight: float, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", elements)  # 100: several blocks of each
    made, whole = as_merged(variant)
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    wanted = {
        name: exact(made.base[name]) + weight * (value - exact(made.base[name]))
        for name, value in whole.items()
    }
    output = tmp_path / "out"
    loratool.merge(base, [adapter], output, weights=[weight])
    found = {key: exact(value) for key, value in load_file(output / "model.safetensors").items()}
    assert distance(found, wanted) <= CLOSE
    assert loratool.verify(output, base=base, adapters=[adapter], weights=[weight]) == ()


LINEAR: Final = (*EXACT, "ia3", "glora", "full", "norm", "modulation", "diff-b")
"""Variants whose delta a number multiplies, in some tensor of theirs."""


@pytest.mark.parametrize("scheme", ["", "module-path"])
@pytest.mark.parametrize("variant", LINEAR)
def test_a_new_strength_is_a_weight_of_the_merge(variant: str, scheme: str, tmp_path: Path) -> None:
    made, _ = as_merged(variant)
    if scheme and made.config is None:
        modules = {**{n: p for n, (p, _) in UNET_PATHS.items()}, "diffusion_model.blocks": "blocks"}
        tensors = {}
        for key, value in made.tensors.items():
            own = next(name for name in modules if key.startswith(name))
            tensors[modules[own] + key.removeprefix(own)] = value
        made = replace(made, tensors=tensors)
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    if scheme and variant == "ia3":
        pytest.skip("(IA)³ of LyCORIS has a place in kohya's files alone")
    stronger = tmp_path / ("stronger" if made.config else "stronger.safetensors")
    report = loratool.rescale(adapter, stronger, scale=-0.7)
    assert set(report.ratios.values()) == {-0.7}
    loratool.merge(base, [adapter], tmp_path / "weighed", weights=[-0.7])
    wanted = load_file(tmp_path / "weighed" / "model.safetensors")
    found = merged(base, stronger, tmp_path / "found")
    assert distance(found, {key: exact(value) for key, value in wanted.items()}) <= ALPHA


@pytest.mark.parametrize("variant", ["oft", "boft", "replacement", "dora-of-inputs"])
def test_what_no_number_multiplies_is_not_rescaled(variant: str, tmp_path: Path) -> None:
    adapter = sample(variant).write(tmp_path)
    with pytest.raises(UnsupportedError):
        loratool.rescale(adapter, tmp_path / "out.safetensors", scale=0.5)


@pytest.mark.parametrize("variant", CHANGES)
def test_several_change_a_weight_in_turn(variant: str, tmp_path: Path) -> None:
    made, _ = as_merged(variant)
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    loratool.merge(base, [adapter], tmp_path / "once")
    loratool.merge(tmp_path / "once", [adapter], tmp_path / "twice", weights=[0.5])
    found = tmp_path / "both"
    loratool.merge(base, [adapter, adapter], found, weights=[1.0, 0.5])
    one, other = (load_file(path / "model.safetensors") for path in (found, tmp_path / "twice"))
    assert distance(*({k: exact(v) for k, v in each.items()} for each in (one, other))) <= CLOSE


@pytest.mark.parametrize("variant", [*CHANGES, "loha", "loha-conv", "lokr", "lokr-full"])
def test_a_part_changes_as_the_whole_does(variant: str, tmp_path: Path) -> None:
    made, _ = as_merged(variant)
    for site in open_adapter(made.write(tmp_path)).sites:
        name = site.module.removeprefix("unet.")
        weight = exact(made.base[f"{name}.weight"])
        values = {slot: decode(stored) for slot, stored in site.slots.items()}
        change = site.variant.change(site, values, weight.shape, site.scaling.factor)
        whole = change.changed(weight, 0, 0)
        assert whole.shape == weight.shape
        assert np.allclose(whole - weight, change.difference(weight, 0, 0), atol=1e-14)
        steps = [grain or side for grain, side in zip(change.grain, weight.shape[:2], strict=True)]
        for row in range(0, weight.shape[0], steps[0]):
            for column in range(0, weight.shape[1], steps[1]):
                cut = slice(row, row + steps[0]), slice(column, column + steps[1])
                part = change.changed(weight[cut], row, column)
                assert np.allclose(part, whole[cut], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("variant", [*EXACT, *CHANGES])
def test_it_computes_with_tensors_as_with_arrays(variant: str, tmp_path: Path) -> None:
    made, wanted = as_merged(variant)
    for site in open_adapter(made.write(tmp_path)).sites:
        shape = wanted[f"{site.module.removeprefix('unet.')}.weight"].shape
        if site.variant.has_factors:
            width = site.variant.width(site, shape)
            arrays = site.variant.factors(site, decode, width)
            tensors = site.variant.factors(site, read_tensor, width)
            for one, two in zip(arrays, tensors, strict=True):
                assert np.allclose(one, two.numpy(), atol=1e-12)
        if site.variant.has_change:
            values = {slot: decode(stored) for slot, stored in site.slots.items()}
            weight = np.random.default_rng(1).standard_normal(shape)
            change = site.variant.change(site, values, shape, 1.5)
            turned = {slot: torch.from_numpy(value) for slot, value in values.items()}
            other = site.variant.change(site, turned, shape, 1.5)
            found = other.changed(torch.from_numpy(weight), 0, 0).numpy()
            assert np.allclose(change.changed(weight, 0, 0), found, atol=1e-12)


@pytest.mark.parametrize("variant", [*EXACT, *CHANGES])
def test_its_geometry_is_the_shape_of_its_delta(variant: str, tmp_path: Path) -> None:
    made, wanted = as_merged(variant)
    for site in open_adapter(made.write(tmp_path)).sites:
        name = site.module.removeprefix("unet.")
        shape = wanted[f"{name}.weight"].shape
        assert site.variant.places(site, shape)
        assert not site.variant.places(site, tuple(2 * size for size in shape))
        if site.variant.has_factors:
            width = site.variant.width(site, shape)
            down, up = site.variant.factors(site, decode, width)
            assert (up.shape[0], down.shape[1]) == (shape[0], np.prod(shape[1:]))
            assert up.shape[1] == down.shape[0] == site.variant.factor_rank(site)


@pytest.mark.parametrize("variant", ["loha", "lokr", "cp", "oft", "ia3", "glora"])
def test_a_bias_beside_is_added_as_it_is(variant: str, tmp_path: Path) -> None:
    made, wanted = with_base(sample(variant, "F64"))
    (module,) = made.deltas
    name = f"{UNET_PATHS[module][0]}.bias"
    count = len(made.deltas[module])
    added, bias = torch.randn(2, count, dtype=torch.float64)
    tensors = {**made.tensors, f"{module}.diff_b": added.clone()}
    made = replace(made, tensors=tensors, base={**made.base, name: bias.clone()})
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    wanted |= {name: exact(bias + added)}
    assert distance(merged(base, adapter, tmp_path / "out"), wanted) <= CLOSE


@pytest.mark.parametrize("of_inputs", [False, True])
@pytest.mark.parametrize("variant", ["loha", "loha-conv", "lokr", "cp"])
def test_magnitudes_beside_make_a_dora_of_it(variant: str, of_inputs: bool, tmp_path: Path) -> None:
    made, wanted = with_base(sample(variant, "F64"))
    ((module, _),) = made.deltas.items()
    ((name, changed),) = wanted.items()
    axis = 1 if of_inputs else 0
    axes = tuple(each for each in range(changed.ndim) if each != axis)
    norms = np.sqrt((changed**2).sum(axis=axes, keepdims=True))
    scale = torch.rand(norms.shape, dtype=torch.float64) + 1
    made = replace(made, tensors={**made.tensors, f"{module}.dora_scale": scale})
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    found = merged(base, adapter, tmp_path / "out")
    assert distance(found, {name: changed * exact(scale) / norms}) <= CLOSE


@pytest.mark.parametrize("variant", ["oft", "boft", "ia3", "glora"])
def test_magnitudes_that_mean_nothing_are_not_left_out(variant: str, tmp_path: Path) -> None:
    made, wanted = with_base(sample(variant, "F64"))
    (module,) = made.deltas
    made = replace(made, tensors={**made.tensors, f"{module}.dora_scale": torch.ones(32, 1)})
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    with pytest.raises(UnsupportedError, match="dora_scale") as failure:
        loratool.merge(base, [adapter], tmp_path / "out")
    skip = option(failure.value.hint, "--skip")
    loratool.merge(base, [adapter], tmp_path / "out", skip=[skip])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert distance({k: exact(v) for k, v in found.items()}, wanted) <= CLOSE


WAN_BASES: Final = {
    "native": ("blocks.0.self_attn.q.weight", "blocks.0.modulation", "head.modulation"),
    "single file": (
        "model.diffusion_model.blocks.0.self_attn.q.weight",
        "model.diffusion_model.blocks.0.modulation",
        "model.diffusion_model.head.modulation",
    ),
    "diffusers": (
        "blocks.0.attn1.to_q.weight",
        "blocks.0.scale_shift_table",
        "scale_shift_table",
    ),
}


@pytest.mark.parametrize("naming", WAN_BASES)
def test_modulation_has_a_name_in_every_naming(naming: str, tmp_path: Path) -> None:
    weight, block, head = WAN_BASES[naming]
    draw, of = Draw("wan", "F64"), "diffusion_model."
    base = {weight: draw(8, 8), block: draw(1, 6, 8), head: draw(1, 2, 8)}
    tensors = {
        f"{of}blocks.0.self_attn.q.lora_A.weight": draw(2, 8),
        f"{of}blocks.0.self_attn.q.lora_B.weight": draw(8, 2),
        f"{of}blocks.0.diff_m": draw(1, 6, 8),
        f"{of}head.diff_m": draw(1, 2, 8),
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tensors, tmp_path / "adapter.safetensors")
    output = tmp_path / "out.safetensors"
    loratool.merge(tmp_path / "base.safetensors", [tmp_path / "adapter.safetensors"], output)
    wanted = {
        weight: exact(
            base[weight]
            + tensors[f"{of}blocks.0.self_attn.q.lora_B.weight"]
            @ tensors[f"{of}blocks.0.self_attn.q.lora_A.weight"]
        ),
        block: exact(base[block] + tensors[f"{of}blocks.0.diff_m"]),
        head: exact(base[head] + tensors[f"{of}head.diff_m"]),
    }
    assert distance({k: exact(v) for k, v in load_file(output).items()}, wanted) <= CLOSE


def option(hint: str | None, name: str) -> str:
    """Return the value that a hint gives an option."""
    words = shlex.split(hint or "")
    return words[words.index(name) + 1]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_control_lora_of_flux_is_told_by_its_norms(prefix: str, tmp_path: Path) -> None:
    """Black Forest Labs' own files: no key says that ``img_in`` has more inputs."""
    draw, qkv = Draw("flux control", "F64"), "double_blocks.0.img_attn.qkv"
    norm = "double_blocks.0.img_attn.norm.key_norm.scale"
    base = {"img_in.weight": draw(6, 4), "img_in.bias": draw(6), norm: draw(2)}
    base |= {f"{qkv}.weight": draw(18, 6), f"{qkv}.bias": draw(18)}
    tensors, wanted = {norm: draw(2)}, {}
    for name, out, into in (("img_in", 6, 8), (qkv, 18, 6)):
        down, up, added = draw(3, into), draw(out, 3), draw(out)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors |= {f"{name}.lora_B.bias": added}
        weight = exact(base[f"{name}.weight"])
        weight = np.pad(weight, ((0, 0), (0, into - weight.shape[1])))
        wanted[f"{name}.weight"] = weight + exact(up) @ exact(down)
        wanted[f"{name}.bias"] = exact(base[f"{name}.bias"] + added)
    wanted[norm] = exact(tensors[norm])
    save_file({prefix + key: value for key, value in base.items()}, tmp_path / "base.safetensors")
    save_file(tensors, tmp_path / "adapter.safetensors")
    report = loratool.merge(
        tmp_path / "base.safetensors",
        [tmp_path / "adapter.safetensors"],
        tmp_path / "o.safetensors",
    )
    assert any("grew from [6, 4] to [6, 8]" in note for note in report.notes)
    found = {
        k.removeprefix(prefix): exact(v) for k, v in load_file(tmp_path / "o.safetensors").items()
    }
    assert distance(found, wanted) <= CLOSE


def test_a_wider_adapter_of_another_model_does_not_let_it_grow(tmp_path: Path) -> None:
    base = {"img_in.weight": torch.ones(6, 4), "double_blocks.0.img_mlp.0.weight": torch.ones(6, 6)}
    save_file(base, tmp_path / "base.safetensors")
    pair = {"img_in.lora_A.weight": torch.ones(3, 8), "img_in.lora_B.weight": torch.ones(6, 3)}
    save_file(pair, tmp_path / "adapter.safetensors")
    with pytest.raises(LoratoolError, match="shape"):
        loratool.merge(
            tmp_path / "base.safetensors",
            [tmp_path / "adapter.safetensors"],
            tmp_path / "out.safetensors",
        )


@pytest.mark.parametrize("elements", [kernels.BLOCK_ELEMENTS, 30])
@pytest.mark.parametrize("kernel", [(), (2, 2)])
def test_a_control_lora_lets_the_weight_grow(
    kernel: tuple[int, ...], elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", elements)
    draw, name = Draw("control", "F64"), "diffusion_model.img_in"
    weight, down, up, bias = draw(6, 4, *kernel), draw(3, 8, *kernel), draw(6, 3), draw(6)
    tensors = {
        f"{name}.lora_A.weight": down,
        f"{name}.lora_B.weight": up if not kernel else up[:, :, None, None].clone(),
        f"{name}.diff_b": draw(6),
        f"{name}.reshape_weight": torch.tensor([6, 8, *kernel]),
    }
    made = replace(
        sample("lora"),
        tensors=tensors,
        base={"img_in.weight": weight, "img_in.bias": bias},
        config=None,
    )
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    report = loratool.merge(base, [adapter], tmp_path / "out", weights=[0.5])
    assert any("grew from [6, 4" in note for note in report.notes)
    wanted = np.zeros((6, 8, *kernel))
    wanted[:, :4] = exact(weight)
    wanted += 0.5 * (exact(up) @ exact(down.flatten(1))).reshape(wanted.shape)
    found = {k: exact(v) for k, v in load_file(tmp_path / "out" / "model.safetensors").items()}
    truth = {
        "img_in.weight": wanted,
        "img_in.bias": exact(bias) + 0.5 * exact(tensors[f"{name}.diff_b"]),
    }
    assert distance(found, truth) <= CLOSE
    assert not loratool.verify(tmp_path / "out", base=base, adapters=[adapter], weights=[0.5])


def test_every_file_claims_something() -> None:
    files = {path.stem for path in Path(variants.__file__).parent.glob("*.py")} - {"__init__"}
    claims = variants.claims()
    assert {claim.variant for claim in claims} == files
    assert [claim.variant for claim in claims if claim.is_default] == ["lora"]
    suffixes = [suffix for claim in claims for suffix in (*claim.suffixes, *claim.peft)]
    assert len(suffixes) == len(set(suffixes))
    for claim in claims:
        assert variants.variant_named(claim.variant).name


BROKEN: Final = {
    "loha": ("hada_w1_b", None, "lacks some"),
    "loha-conv": ("hada_t2", None, "two cores"),
    "lokr": ("lokr_w2_b", None, "lacks"),
    "oft": ("rescale", torch.ones(3, 1), "LT003"),
    "ia3": ("on_input", torch.tensor(True), "inputs of a weight that has 16"),
    "glora": ("a2.weight", torch.ones(4, 31), "another|shape"),
}
"""A tensor to leave out or to put in, and what is then said."""


@pytest.mark.parametrize("variant", BROKEN)
def test_a_broken_one_is_an_error_before_anything_is_written(variant: str, tmp_path: Path) -> None:
    name, value, words = BROKEN[variant]
    made, _ = with_base(sample(variant))
    (module,) = made.deltas
    tensors = {k: v for k, v in made.tensors.items() if k != f"{module}.{name}"}
    if value is not None:
        tensors[f"{module}.{name}"] = value
    if variant == "ia3":
        made = replace(made, base={k: v[:, :16].clone() for k, v in made.base.items()})
    made = replace(made, tensors=tensors)
    base, adapter = made.write_base(tmp_path), made.write(tmp_path)
    for call in (
        lambda: loratool.merge(base, [adapter], tmp_path / "out"),
        lambda: loratool.convert(
            adapter, "peft", tmp_path / "out", base=base, to_lora=True, rank=2
        ),
    ):
        with pytest.raises(LoratoolError, match=words):
            call()
        assert not (tmp_path / "out").exists()


def test_signs_of_two_variants_are_an_error(tmp_path: Path) -> None:
    both = {name: torch.ones(2, 2) for name in ("a.lokr_w1", "a.hada_w1_a")}
    save_file({f"lora_unet_{k}": v for k, v in both.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="loha and lokr at once"):
        open_adapter(tmp_path / "a.safetensors")


def test_only_the_variants_of_a_file_are_imported(tmp_path: Path) -> None:
    path = sample("lora").write(tmp_path)
    code = (
        "import sys, loratool; loratool.inspect(sys.argv[1]);"
        "print(*sorted(m for m in sys.modules if m.startswith('loratool.variants.')));"
        "print('numpy' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["loratool.variants.lora", "False False"], done.stderr


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
