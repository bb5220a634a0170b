"""What tutorials and research code save: bare factors, with or without the model around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from deltas import dense_deltas, relative_error
from safetensors.torch import load_file, save_file
from samples import place

import loratool
from loratool.adapter.slots import Slot
from loratool.errors import LoratoolError
from loratool.schemes import builtin_schemes
from loratool.schemes.parts.tutorials import TEMPLATES
from loratool.verbs.inspect import AdapterInfo

RANK: Final = 4
ALPHA: Final = 6.0
SHAPES: Final = {"blocks.0.attn.q_proj": (16, 12), "blocks.1.mlp.up_proj": (20, 12)}
SCHEMES: Final = [
    scheme.name
    for scheme in builtin_schemes()
    if scheme.is_written
    and scheme.follows is None
    and not scheme.paths.is_whole
    and not scheme.paths.has_components
]
Tensors = dict[str, torch.Tensor]


@dataclass
class Layout:
    """A file, and what it means.

    Attributes:
        tensors: What is saved.
        truth: The deltas, in float64.
        options: What the file does not say.
        suffix: Of the file.
    """

    tensors: Tensors
    truth: Tensors
    options: dict[str, Any] = field(default_factory=lambda: {"alpha": ALPHA})
    suffix: str = ".safetensors"


def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {m: (torch.randn(RANK, i), torch.randn(o, RANK)) for m, (o, i) in SHAPES.items()}


def deltas(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    return {m: ALPHA / RANK * up.double() @ down.double() for m, (down, up) in pairs.items()}


def base_weights(weight: str = ".weight") -> Tensors:
    tensors = {module + weight: torch.randn(*shape) for module, shape in SHAPES.items()}
    others = {f"blocks.{n}.attn.k_proj.weight": torch.randn(16, 12) for n in range(8)}
    return tensors | others | {"norm.weight": torch.ones(12)}


def spelled(down: str, up: str, *, weight: str = "", is_turned: bool = False) -> Layout:
    """Return factors under such names, with the model around them if its weights have names."""
    pairs = factors()
    tensors = base_weights(weight) if weight else {}
    for module, (a, b) in pairs.items():
        tensors[module + down] = a.T.contiguous() if is_turned else a
        tensors[module + up] = b.T.contiguous() if is_turned else b
    return Layout(tensors, deltas(pairs))


def numbered(name: str, number: float, *, holder: str = "", weight: str = ".weight") -> Layout:
    """Return a whole model whose layers keep such a number beside their factors."""
    found = spelled(f"{holder}.lora_A", f"{holder}.lora_B", weight=weight)
    for module in found.truth:
        found.tensors[f"{module}{holder}.{name}"] = torch.tensor(number)
    return replace(found, options={})


def several() -> Layout:
    """Return two adapters in one dictionary, paths flattened."""
    pairs = {name: factors() for name in ("english", "french")}
    tensors = {}
    for name, found in pairs.items():
        for module, (a, b) in found.items():
            flat = f"{module.replace('.', '_')}.{name}"
            tensors |= {f"{flat}.lora_A": a, f"{flat}.lora_B": b}
    options = {"alpha": ALPHA, "adapter_name": "french"}
    return Layout(tensors, deltas(pairs["french"]), options, ".bin")


def merged_linear(*, is_grouped: bool) -> Layout:
    """Return loralib's ``MergedLinear``; B of a grouped convolution, as PEFT first had it."""
    tensors, truth = {}, {}
    for n in range(2):
        module = f"transformer.h.{n}.attn.c_attn"
        a, b = torch.randn(2 * RANK, 12), torch.randn(2 * 12, RANK)
        whole = torch.zeros(36, 12).double()
        whole[:12] = b[:12].double() @ a[:RANK].double()
        whole[24:] = b[12:].double() @ a[RANK:].double()
        tensors |= {f"{module}.lora_A": a, f"{module}.lora_B": b[..., None] if is_grouped else b}
        truth[module] = ALPHA / RANK * whole
    return Layout(tensors, truth, {"alpha": ALPHA, "enable_lora": [True, False, True]})


LAYOUTS: Final[dict[str, Callable[[], Layout]]] = {
    "bare": lambda: spelled(".lora_A", ".lora_B"),
    "bare, in a whole model": lambda: spelled(".lora_A", ".lora_B", weight=".weight"),
    "w0": lambda: spelled(".lora_A.weight", ".lora_B.weight", weight=".w0.weight"),
    "transposed": lambda: spelled(".lora_A", ".lora_B", is_turned=True),
    "transposed, in a whole model": lambda: spelled(
        ".lora_A", ".lora_B", weight=".linear.weight", is_turned=True
    ),
    "a layer beside": lambda: spelled(".lora.A", ".lora.B", weight=".linear.weight"),
    "a transposed layer beside": lambda: spelled(
        ".lora.A", ".lora.B", weight=".linear.weight", is_turned=True
    ),
    "loralib's names in a layer beside": lambda: spelled(".lora.lora_A", ".lora.lora_B"),
    "a parametrisation": lambda: spelled(
        ".parametrizations.weight.0.lora_A",
        ".parametrizations.weight.0.lora_B",
        weight=".parametrizations.weight.original",
    ),
    "letters": lambda: spelled(".A", ".B"),
    "letters, in a whole model": lambda: spelled(".A", ".B", weight=".proj.weight"),
    "small letters": lambda: spelled(".lora_a", ".lora_b", weight=".weight"),
    "linear factors in a layer beside": lambda: spelled(".lora.A.weight", ".lora.B.weight"),
    "factors in a layer beside, as PEFT's": lambda: spelled(
        ".lora.lora_A.weight", ".lora.lora_B.weight", weight=".wrapped.weight"
    ),
    "a layer of layers": lambda: spelled(".lora.0.weight", ".lora.1.weight", weight=".base.weight"),
    "diffusers' words": lambda: spelled(
        ".lora.down.weight", ".lora.up.weight", weight=".fc.weight"
    ),
    "down and up": lambda: spelled(".lora_down", ".lora_up", weight=".weight"),
    "down and up, transposed": lambda: spelled(
        ".lora_down", ".lora_up", weight=".weight", is_turned=True
    ),
    "small letters of layers": lambda: spelled(
        ".lora_a.weight", ".lora_b.weight", weight=".linear.weight"
    ),
    "small letters of layers beside": lambda: spelled(
        ".lora.lora_a.weight", ".lora.lora_b.weight", weight=".linear.weight"
    ),
    "of the weight": lambda: spelled(".weight_lora_A", ".weight_lora_B", weight=".weight"),
    "matrices": lambda: spelled(".lora_matrix_A", ".lora_matrix_B", weight=".W0"),
    "transposed matrices": lambda: spelled(
        ".loraA", ".loraB", weight=".orig.weight", is_turned=True
    ),
    "a learned scale in the layer": lambda: numbered("lora_scale", ALPHA / RANK),
    "a scale in the layer": lambda: numbered("scaling", ALPHA / RANK),
    "a scale beside its factors": lambda: numbered("scaling", ALPHA / RANK, holder=".lora"),
    "an alpha in the layer": lambda: numbered("alpha", ALPHA, weight=".w0.weight"),
    "an alpha beside its factors": lambda: numbered("alpha", ALPHA, holder=".lora"),
    "lora_alpha in the layer": lambda: numbered("lora_alpha", ALPHA),
    "several adapters": several,
    "MergedLinear": lambda: merged_linear(is_grouped=False),
    "MergedLinear, a convolution": lambda: merged_linear(is_grouped=True),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[str(request.param)]()


def save(layout: Layout, folder: Path) -> Path:
    path = folder / f"source{layout.suffix}"
    if layout.suffix == ".bin":
        torch.save(layout.tensors, path)
    else:
        save_file({k: v.contiguous() for k, v in layout.tensors.items()}, path)
    return path


def base_of(layout: Layout, folder: Path) -> tuple[Path, Tensors]:
    weights = {f"{module}.weight": torch.randn(d.shape) for module, d in layout.truth.items()}
    save_file(weights, folder / "base.safetensors")
    return folder / "base.safetensors", weights


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_takes_the_factors_alone(layout: Layout, scheme: str, tmp_path: Path) -> None:
    source, out = save(layout, tmp_path), place(tmp_path, scheme, "out")
    base, _ = base_of(layout, tmp_path)
    report = loratool.convert(source, scheme, out, base=base, **layout.options)
    assert report.relative_error < 1e-6
    loratool.convert(out, "peft", tmp_path / "back", base=base)
    assert relative_error(dense_deltas(tmp_path / "back"), layout.truth) < 1e-6
    assert dense_deltas(tmp_path / "back").keys() == layout.truth.keys()


def test_a_merge_adds_the_deltas(layout: Layout, tmp_path: Path) -> None:
    base, weights = base_of(layout, tmp_path)
    options = dict(layout.options)
    source = save(layout, tmp_path)
    if "enable_lora" in options:  # which only a configuration tells a merge
        loratool.convert(source, "peft", tmp_path / "plain", **options)
        source, options = tmp_path / "plain", {}
    loratool.merge(base, [source], tmp_path / "out.safetensors", **options)
    merged = load_file(tmp_path / "out.safetensors")
    for module, delta in layout.truth.items():
        wanted = weights[f"{module}.weight"].double() + delta
        torch.testing.assert_close(
            merged[f"{module}.weight"].double(), wanted, rtol=1e-6, atol=1e-5
        )


@pytest.mark.parametrize(
    "name", ["bare, in a whole model", "w0", "a layer beside", "a parametrisation"]
)
def test_inspect_says_adapter_and_base(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]()
    info = loratool.inspect(save(layout, tmp_path))
    assert isinstance(info, AdapterInfo)
    document = info.as_json()
    assert document["kind"] == "adapter"
    assert [module["module"] for module in document["modules"]] == list(layout.truth)
    assert document["extras"] == []
    own = {key: value for key, value in layout.tensors.items() if ".lora" not in key}
    numbers = sum(value.numel() for value in own.values())
    assert document["base"] == {"tensors": 11, "parameters": numbers, "bytes": 4 * numbers}


@pytest.mark.parametrize("is_turned", [False, True])
def test_every_name_of_a_factor_is_read(is_turned: bool, tmp_path: Path) -> None:
    texts = {
        slot: [t.text.removeprefix("{module}") for t in TEMPLATES if t.slot is slot]
        for slot in (Slot.DOWN, Slot.UP)
    }
    assert len(texts[Slot.DOWN]) > 20
    for index, (down, up) in enumerate(zip(*texts.values(), strict=True)):
        if is_turned and down.endswith(("lora_a.weight", ".0.weight")):
            continue  # layers, which hold their weights in one way
        layout = spelled(down, up, is_turned=is_turned)
        source = tmp_path / f"{index}.safetensors"
        save_file(layout.tensors, source)
        loratool.convert(source, "peft", tmp_path / f"out{index}", alpha=ALPHA)
        found = dense_deltas(tmp_path / f"out{index}")
        assert relative_error(found, layout.truth) < 1e-6, down


UNTOLD = {
    "lora_scale": (16,),
    "scaling": (16, 1),
    "lora_magnitude": (12,),
    "gate": (),
    "rank": (),
    "m": (1, 12),
}


@pytest.mark.parametrize("name", UNTOLD)
@pytest.mark.parametrize("weight", ["", ".weight", ".linear.weight"])
def test_what_may_change_a_delta_is_refused_by_name(name: str, weight: str, tmp_path: Path) -> None:
    layout = spelled(".lora_A", ".lora_B", weight=weight)
    module = next(iter(SHAPES))
    layout.tensors[f"{module}.{name}"] = torch.rand(UNTOLD[name]) + RANK + 0.5
    source, out = save(layout, tmp_path), tmp_path / "out"
    base, _ = base_of(layout, tmp_path)
    findings = loratool.validate(source)
    assert [f.code for f in findings if f.is_error] == ["LT008"]
    verbs: list[Callable[[], Any]] = [
        lambda: loratool.convert(source, "peft", out, alpha=ALPHA),
        lambda: loratool.merge(base, [source], out, alpha=ALPHA),
        lambda: loratool.compose([source, source], out, alpha=ALPHA),
        lambda: loratool.truncate(source, out, rank=2, alpha=ALPHA),
        lambda: loratool.rescale(source, out, scale=2),
        lambda: loratool.compare([source, source]),
    ]
    for verb in verbs:
        with pytest.raises(LoratoolError, match=name) as failure:
            verb()
        assert not out.exists()
    assert rf"--skip '\.{name}$'" in str(failure.value)
    loratool.convert(source, "peft", out, alpha=ALPHA, skip=[rf"\.{name}$"])
    assert relative_error(dense_deltas(out), layout.truth) < 1e-6


def test_numbers_that_say_what_is_known_change_nothing(tmp_path: Path) -> None:
    layout = spelled(".lora_A", ".lora_B")
    for module in SHAPES:
        layout.tensors[f"{module}.rank"] = torch.tensor(RANK)
        layout.tensors[f"{module}.lora_dropout"] = torch.tensor(0.1)
        layout.tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
        layout.tensors[f"{module}.scaling"] = torch.tensor(ALPHA / RANK)
    loratool.convert(save(layout, tmp_path), "peft", tmp_path / "out")
    assert relative_error(dense_deltas(tmp_path / "out"), layout.truth) < 1e-6
    assert all("lora_" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))


def test_two_scales_that_differ_are_refused(tmp_path: Path) -> None:
    layout = numbered("alpha", ALPHA)
    layout.tensors[f"{next(iter(SHAPES))}.scaling"] = torch.tensor(3.0)
    with pytest.raises(LoratoolError, match="scaling"):
        loratool.convert(save(layout, tmp_path), "peft", tmp_path / "out")


@pytest.mark.parametrize("name", ["W_a", "lora_right.weight", "delta_A", "linear_a_q.weight"])
def test_factors_of_unknown_names_are_told_what_to_be_called(name: str, tmp_path: Path) -> None:
    save_file(
        {f"layers.{n}.attn.{name}": torch.ones(4, 12) for n in range(3)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(LoratoolError, match=r"MODULE\.lora_A \(r, in\)"):
        loratool.inspect(tmp_path / "a.safetensors")


def test_states_of_a_sequence_model_are_no_factors(tmp_path: Path) -> None:
    tensors = base_weights()
    for n in range(4):
        tensors |= {f"blocks.{n}.ssm.{name}": torch.ones(16, 4) for name in "ABC"}
    save_file(tensors, tmp_path / "model.safetensors")
    assert loratool.inspect(tmp_path / "model.safetensors").as_json()["kind"] == "model"


def test_a_model_with_adapters_of_its_own_stays_a_model(tmp_path: Path) -> None:
    tensors = base_weights(".base_layer.weight")
    for module, (a, b) in factors().items():
        for name in ("speech", "vision"):
            tensors[f"{module}.lora_A.{name}.weight"] = a.clone()
            tensors[f"{module}.lora_B.{name}.weight"] = b.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert loratool.inspect(tmp_path / "model.safetensors").as_json()["kind"] == "model"


@pytest.mark.parametrize("name", [name for name in LAYOUTS if " in the layer" in name])
def test_what_is_folded_leaves_no_number_behind(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]()
    source, out = save(layout, tmp_path), tmp_path / "out.safetensors"
    loratool.merge(source, [source], out)
    merged = load_file(out)
    assert merged.keys() == base_weights(".weight").keys()
    for module, delta in layout.truth.items():
        name = ".w0.weight" if f"{module}.w0.weight" in layout.tensors else ".weight"
        wanted = layout.tensors[module + name].double() + delta
        torch.testing.assert_close(
            merged[f"{module}.weight"].double(), wanted, rtol=1e-6, atol=1e-5
        )


def test_an_alpha_beside_the_factors_dictionary_is_told(tmp_path: Path) -> None:
    torch.save({"lora": spelled(".lora_A", ".lora_B").tensors, "alpha": 6.0}, tmp_path / "a.pt")
    info = loratool.inspect(tmp_path / "a.pt")
    assert isinstance(info, AdapterInfo)
    assert "its alpha is 6.0: if that is the adapter's, --alpha 6.0 uses it" in info.adapter.notes


@pytest.mark.parametrize(("parts", "flags"), [(2, "1,0,1"), (3, "1,1,1")])
def test_stacked_factors_are_told_with_flags_of_their_count(
    parts: int, flags: str, tmp_path: Path
) -> None:
    module = "h.0.attn.c_attn"
    a, b = torch.randn(parts * RANK, 12), torch.randn(parts * 12, RANK)
    save_file({f"{module}.lora_A": a, f"{module}.lora_B": b}, tmp_path / "a.safetensors")
    with pytest.raises(LoratoolError, match=f"--enable-lora such as {flags}[)]"):
        loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "out")
    given = [flag == "1" for flag in flags.split(",")]
    loratool.convert(tmp_path / "a.safetensors", "peft", tmp_path / "out", enable_lora=given)


def test_a_compressed_archive_is_read_as_a_plain_one(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    a, b = np.random.default_rng(0).normal(size=(12, 4)), np.zeros((4, 12))
    b[1] = 2.0
    np.savez_compressed(tmp_path / "adapters.npz", **{f"{name}.lora_a": a, f"{name}.lora_b": b})
    loratool.convert(tmp_path / "adapters.npz", "peft", tmp_path / "peft", alpha=8.0)
    truth = {name: torch.from_numpy(2.0 * (a @ b).T)}
    assert relative_error(dense_deltas(tmp_path / "peft"), truth) < 1e-12


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, False)])
def test_stacked_factors_are_merged_by_the_parts_that_they_are_for(
    enabled: tuple[bool, ...], tmp_path: Path
) -> None:
    rank, out, into = 2, 6, 5
    name = "transformer.h.0.attn.c_attn"
    down, up = torch.randn(2 * rank, into), torch.randn(2 * out, rank)
    weight = torch.randn(3 * out, into)
    save_file({f"{name}.weight": weight}, tmp_path / "base.safetensors")
    factors = {f"{name}.lora_A": down, f"{name}.lora_B": up}
    save_file(factors, tmp_path / "adapter.safetensors")
    wanted = weight.clone()
    parts = [part for part, is_on in enumerate(enabled) if is_on]
    for number, part in enumerate(parts):
        mine = slice(number * out, (number + 1) * out)
        delta = up[mine] @ down[number * rank : (number + 1) * rank]
        wanted[part * out : (part + 1) * out] += 4 / rank * delta
    paths = (
        str(tmp_path / f) for f in ("base.safetensors", "adapter.safetensors", "o.safetensors")
    )
    base, adapter, merged = paths
    loratool.merge(base, [adapter], merged, alpha=4, enable_lora=enabled)
    found = load_file(merged)[f"{name}.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    given = {"base": base, "adapters": [adapter], "alpha": 4}
    assert not loratool.verify(merged, **given, enable_lora=enabled)
    assert loratool.verify(merged, **given, enable_lora=(False, True, True))


@pytest.mark.parametrize("scheme", ["peft", "kohya", "loralib", "mlx"])
@pytest.mark.parametrize("form", ["stacked", "grouped", "dense", "trained in one block"])
def test_a_merged_projection_is_apart_where_the_base_has_it_so(
    form: str, scheme: str, tmp_path: Path
) -> None:
    attention, side = "model.layers.0.self_attn", 12
    base = tmp_path / "base"
    base.mkdir()
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": side}
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    weights = {f"{attention}.{name}_proj.weight": torch.randn(side, side) for name in "qkv"}
    save_file(weights, base / "model.safetensors")
    is_stacked = form in ("stacked", "grouped")
    down = torch.randn(2 * RANK if is_stacked else RANK, side)
    up = torch.randn(2 * side if is_stacked else 3 * side, RANK)
    truth: Tensors = {}
    if is_stacked:
        for index, name in enumerate("qv"):
            rows, ranks = (slice(index * n, (index + 1) * n) for n in (side, RANK))
            truth[name] = up[rows].double() @ down[ranks].double()
    else:
        if form == "trained in one block":
            up[side : 2 * side] = 0
        for index, name in enumerate("qkv"):
            delta = up[index * side : (index + 1) * side].double() @ down.double()
            if delta.any():
                truth[name] = delta
    truth = {f"{attention}.{name}_proj": ALPHA / RANK * delta for name, delta in truth.items()}
    factors = {"lora_A": down, "lora_B": up[..., None] if form == "grouped" else up}
    source = tmp_path / "source.safetensors"
    save_file({f"{attention}.qkv_proj.{name}": value for name, value in factors.items()}, source)
    options: dict[str, Any] = {"enable_lora": [True, False, True]} if is_stacked else {}
    out = place(tmp_path, scheme, "out")
    loratool.convert(source, scheme, out, base=base, alpha=ALPHA, **options)
    modules = {module.module: module.rank for module in loratool.inspect(out).modules}
    if scheme != "kohya":
        assert modules == dict.fromkeys(truth, RANK)
    loratool.merge(base, [out], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in weights.items():
        delta = truth.get(name.removesuffix(".weight"), torch.zeros(()).double())
        torch.testing.assert_close(
            merged[name].double(), weight.double() + delta, rtol=0, atol=1e-5
        )
    loratool.merge(base, [source], tmp_path / "direct", alpha=ALPHA, **options)
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    for name in weights:
        torch.testing.assert_close(direct[name], merged[name], rtol=0, atol=1e-5)


def pairs(form: str, *, layers: int = 2) -> dict[str, torch.Tensor]:
    """Return factors of some modules, under names of a form."""
    found = {}
    for layer in range(layers):
        found[form.format(layer=layer, side="A")] = torch.randn(4, 8)
        found[form.format(layer=layer, side="B")] = torch.randn(6, 4)
    return found


PLAIN: Final = "model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
SEVERAL: Final = {
    "bare parameters by adapter": pairs("model.layers.{layer}.q_proj.lora_{side}.style")
    | pairs("model.layers.{layer}.q_proj.lora_{side}.other"),
    "a dictionary for each": {"style": pairs(PLAIN), "other": pairs(PLAIN)},
    "dictionaries in one": {"epoch": 3, "adapters": {"style": pairs(PLAIN), "other": pairs(PLAIN)}},
    "a dictionary in each layer": {
        **pairs("model.layers.{layer}.q_proj.adapters.style.lora_{side}"),
        **pairs("model.layers.{layer}.q_proj.adapters.other.lora_{side}"),
        **{f"model.layers.{n}.q_proj.base.weight": torch.randn(6, 8) for n in range(2)},
    },
    "flat names in dictionaries": {
        name: pairs("model_layers_{layer}_q_proj.lora_{side}") for name in ("style", "other")
    },
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_one_of_several_adapters_is_chosen(kind: str, tmp_path: Path) -> None:
    torch.save(SEVERAL[kind], tmp_path / "all.pt")
    with pytest.raises(LoratoolError, match="several adapters: style, other") as caught:
        loratool.open_adapter(tmp_path / "all.pt")
    assert "--adapter-name" in str(caught.value.hint)
    adapter = loratool.open_adapter(tmp_path / "all.pt", adapter_name="other")
    assert adapter.name == "other" and len(adapter.sites) == 2
    assert all("layers" in site.module and "other" not in site.module for site in adapter.sites)
    assert any("4 tensors of other adapters" in note for note in adapter.notes)


def test_a_model_whose_layers_hold_several_is_the_base_of_one(tmp_path: Path) -> None:
    tensors = SEVERAL["a dictionary in each layer"]
    save_file(tensors, tmp_path / "all.safetensors")
    source = tmp_path / "all.safetensors"
    loratool.merge(source, [source], tmp_path / "out.safetensors", adapter_name="style")
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == {f"model.layers.{n}.q_proj.weight" for n in range(2)}
    for n in range(2):
        held = f"model.layers.{n}.q_proj"
        factors = [tensors[f"{held}.adapters.style.lora_{side}"].double() for side in "BA"]
        wanted = tensors[f"{held}.base.weight"].double() + factors[0] @ factors[1]
        torch.testing.assert_close(merged[f"{held}.weight"].double(), wanted, rtol=1e-6, atol=1e-5)


def test_a_block_of_layers_is_no_dictionary_of_adapters(tmp_path: Path) -> None:
    form = "model.layers.{layer}.adapters."
    save_file(
        pairs(form + "q.lora_{side}") | pairs(form + "v.lora_{side}"), tmp_path / "a.safetensors"
    )
    modules = [module.module for module in loratool.inspect(tmp_path / "a.safetensors").modules]
    assert modules == [f"model.layers.{n}.adapters.{leaf}" for n in range(2) for leaf in "qv"]


def test_one_adapter_in_a_dictionary_of_its_name(tmp_path: Path) -> None:
    torch.save({"style": pairs(PLAIN)}, tmp_path / "a.pt")
    adapter = loratool.open_adapter(tmp_path / "a.pt")
    assert adapter.name == "style"
    assert adapter.sites[0].module == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("A", "B"), ("lora_down", "lora_up")])
def test_all_of_a_side_in_a_dictionary(names: tuple[str, str], tmp_path: Path) -> None:
    pairs = factors()
    sides = {name: {m: pair[n] for m, pair in pairs.items()} for n, name in enumerate(names)}
    torch.save(sides, tmp_path / "a.pt")
    loratool.convert(tmp_path / "a.pt", "peft", tmp_path / "out", alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "out"), deltas(pairs)) < 1e-6


@pytest.mark.parametrize("holder", ["model_state_dict", "model_state", "lora_weights"])
def test_a_training_checkpoint_holds_them(holder: str, tmp_path: Path) -> None:
    layout = spelled(".lora_A", ".lora_B", weight=".weight")
    state = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({holder: layout.tensors, "optimizer": state, "epoch": 3}, tmp_path / "a.pt")
    loratool.convert(tmp_path / "a.pt", "peft", tmp_path / "out", alpha=ALPHA)
    assert relative_error(dense_deltas(tmp_path / "out"), layout.truth) < 1e-6
    assert dense_deltas(tmp_path / "out").keys() == layout.truth.keys()


@pytest.mark.parametrize("group", ["encoder", "unet", "text_encoder", "layer_0"])
def test_dictionaries_of_a_models_parts_stay_parts(group: str, tmp_path: Path) -> None:
    other = {"encoder": "decoder", "layer_0": "layer_1"}.get(group, "vision_model")
    inner = pairs("block.{layer}.q.lora_{side}.weight")
    torch.save({group: inner, other: inner}, tmp_path / "a.pt")
    adapter = loratool.open_adapter(tmp_path / "a.pt")
    assert {site.module.partition(".")[0] for site in adapter.sites} == {group, other}


@pytest.mark.parametrize("name", ["0", "head"])
def test_an_adapter_called_like_a_layer_is_what_somebody_says(name: str, tmp_path: Path) -> None:
    torch.save(pairs(f"enc_layer_{{layer}}_q.{name}.lora_{{side}}"), tmp_path / "a.pt")
    assert loratool.open_adapter(tmp_path / "a.pt").sites[0].module == f"enc_layer_0_q.{name}"
    adapter = loratool.open_adapter(tmp_path / "a.pt", adapter_name=name)
    assert (adapter.scheme, adapter.name) == ("prefixed", name)
    assert [site.module for site in adapter.sites] == ["enc_layer_0_q", "enc_layer_1_q"]
