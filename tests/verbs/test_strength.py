"""Weights by pattern in every verb that takes them, against the formula in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import dense_deltas, load_config, load_tensors, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from samples import FIXTURES, lora

import loratool
from loratool.errors import MergeError, OptionError

Make = Callable[..., Path]
MODULES = tuple(
    f"model.layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.q_proj", "mlp.up_proj")
)
WEIGHTS = [0.5, "layers.1-2=2", "mlp=0.25", "2:layers.0=-3", "2:layers.2=0"]
EXPECTED = (
    dict(zip(MODULES, (0.5, 0.125, 1.0, 0.125, 1.0, 0.125), strict=True)),
    dict(zip(MODULES, (-3.0, -3.0, 2.0, 0.25, 0.0, 0.0), strict=True)),
)
"""What each module of the first and of the second adapter is multiplied by, by these weights."""


def adapters(make: Make, **config: Any) -> list[Path]:
    one = {key: value for m in MODULES for key, value in lora(m, 6, 5).items()}
    other = {key: value for m in MODULES for key, value in lora(m, 6, 5, 2).items()}
    return [
        make(one, "one", target_modules=["q_proj", "up_proj"], **config),
        make(other, "other", r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], **config),
    ]


def truth(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Return ``Σ weight · scale · B @ A`` of every module, by ``EXPECTED``."""
    total: dict[str, torch.Tensor] = {}
    for path, weights in zip(paths, EXPECTED, strict=True):
        for name, delta in dense_deltas(path).items():
            total[name] = total.get(name, 0) + weights[name] * delta
    return total


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_merge_weighs_each_module_and_verify_agrees(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({f"{m}.weight": torch.randn(6, 5) for m in (*MODULES, "model.norm")})
    paths = adapters(make_adapter)
    report = loratool.merge(base, paths, tmp_path / "out", weights=WEIGHTS)
    old, new = load_tensors_of(base), load_tensors_of(tmp_path / "out")
    for name, delta in truth(paths).items():
        key = f"{name}.weight"
        assert torch.allclose(new[key].double(), old[key].double() + delta, atol=1e-6)
    assert sorted(report.unused) == sorted(
        f"base_model.model.model.layers.2.{name}.lora_{factor}.weight"
        for name in ("self_attn.q_proj", "mlp.up_proj")
        for factor in "AB"
    )
    assert any("2 modules were left out, for their weight is 0" in note for note in report.notes)
    args = {"base": base, "adapters": paths}
    assert loratool.verify(tmp_path / "out", **args, weights=WEIGHTS) == ()
    codes = {f.code for f in loratool.verify(tmp_path / "out", **args, weights=[0.5])}
    assert codes == {"LT105"}


def load_tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_has_no_weight_needs_no_place_in_the_base(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({f"{m}.weight": torch.randn(6, 5) for m in MODULES[:2]})
    one, _ = adapters(make_adapter)
    report = loratool.merge(base, [one], tmp_path / "out", weights=["layers.1-2=0"])
    assert report.merged == 2
    with pytest.raises(MergeError, match="every weight is 0"):
        loratool.merge(base, [one], tmp_path / "none", weights=["layers=0"])


def test_one_weight_for_a_module_and_a_saved_head(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({"a.q_proj.weight": torch.randn(6, 5), "score.weight": torch.randn(2, 6)})
    head = torch.randn(2, 6)
    adapter = make_adapter(
        lora("a.q_proj", 6, 5) | {"score.weight": head}, modules_to_save=["score"]
    )
    loratool.merge(base, [adapter], tmp_path / "half", weights=["score=0.5"])
    old, new = load_tensors_of(base), load_tensors_of(tmp_path / "half")
    assert torch.allclose(new["score.weight"], (old["score.weight"] + head) / 2, atol=1e-6)
    delta = dense_deltas(adapter)["a.q_proj"]
    assert torch.allclose(new["a.q_proj.weight"].double(), old["a.q_proj.weight"] + delta)
    report = loratool.merge(base, [adapter], tmp_path / "without", weights=["score=0"])
    assert torch.equal(load_tensors_of(tmp_path / "without")["score.weight"], old["score.weight"])
    assert report.unused == ("base_model.model.score.weight",)


def test_compose_weighs_each_module(make_adapter: Make, tmp_path: Path) -> None:
    paths = adapters(make_adapter)
    report = loratool.compose(paths, tmp_path / "out", weights=WEIGHTS)
    assert relative_error(dense_deltas(tmp_path / "out"), truth(paths)) < 1e-6
    ranks = {module.module: module.rank for module in report.modules}
    assert {ranks[m] for m in MODULES[:4]} == {5}
    assert {ranks[m] for m in MODULES[4:]} == {4}  # the second has no weight there
    assert any("2 modules were left out, for their weight is 0" in note for note in report.notes)


def test_compose_takes_halves_of_two_adapters(make_adapter: Make, tmp_path: Path) -> None:
    paths = adapters(make_adapter)
    loratool.compose(paths, tmp_path / "out", weights={"1:layers.1-2": 0, "other:layers.0": 0})
    first, second = map(dense_deltas, paths)
    found = dense_deltas(tmp_path / "out")
    for name in MODULES:
        source = first if ".0." in name else second
        assert torch.allclose(found[name], source[name], atol=1e-5)


def test_a_module_without_weight_anywhere_is_not_written(
    make_adapter: Make, tmp_path: Path
) -> None:
    paths = adapters(make_adapter)
    loratool.compose(paths, tmp_path / "out", weights=["mlp=0"])
    assert set(dense_deltas(tmp_path / "out")) == set(MODULES[::2])
    targets = load_config(tmp_path / "out")["target_modules"]
    assert not any("up_proj" in target for target in targets)
    with pytest.raises(OptionError, match="every weight is 0"):
        loratool.compose(paths, tmp_path / "none", weights=[0, 0])


@settings(deadline=None, max_examples=20)
@given(number=st.floats(-2, 2), factor=st.sampled_from([0.0, 0.5, -1.5, 3.0]))
def test_a_pattern_for_everything_is_a_number(
    number: float, factor: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("law")
    state = {key: value for m in MODULES for key, value in lora(m, 6, 5).items()}
    save_file(state, folder / "a.safetensors")
    for name, weights in (("one", [number, f"model={factor}"]), ("other", [number * factor])):
        out = folder / f"{name}.safetensors"
        if number * factor == 0:
            with pytest.raises(OptionError, match="every weight is 0"):
                loratool.compose([folder / "a.safetensors"], out, weights=weights)
        else:
            loratool.compose([folder / "a.safetensors"], out, weights=weights)
    if number * factor != 0:
        one, other = (load_file(folder / f"{name}.safetensors") for name in ("one", "other"))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("rslora", [False, True])
def test_rescale_writes_patterns_where_a_configuration_says_the_scale(
    make_adapter: Make, tmp_path: Path, rslora: bool
) -> None:
    one, _ = adapters(make_adapter, use_rslora=rslora)
    report = loratool.rescale(one, tmp_path / "out", weights=WEIGHTS[:3])
    found, old = dense_deltas(tmp_path / "out"), dense_deltas(one)
    for name, weight in EXPECTED[0].items():
        assert torch.allclose(found[name], weight * old[name], rtol=1e-6)
        assert report.ratios[name] == weight
    before, after = load_tensors(one), load_tensors(tmp_path / "out")
    assert all(torch.equal(before[key], after[key]) for key in before)  # only the numbers changed


def test_rescale_multiplies_scale_and_weights_and_leaves_out_zeros(
    make_adapter: Make, tmp_path: Path
) -> None:
    one, _ = adapters(make_adapter)
    report = loratool.rescale(
        one, tmp_path / "out", scale=3, weights=["mlp=0", "layers.0.self_attn=2"]
    )
    found, old = dense_deltas(tmp_path / "out"), dense_deltas(one)
    assert set(found) == set(MODULES[::2])
    for place, name in enumerate(MODULES[::2]):
        assert torch.allclose(found[name], (3 if place else 6) * old[name], rtol=1e-6)
    assert any("3 modules were left out" in note for note in report.notes)
    for other in ({"alpha": 4}, {"max_norm": 1.0}, {"to_rslora": True}):
        with pytest.raises(OptionError):
            loratool.rescale(one, tmp_path / "no", weights=["mlp=2"], **other)


@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "comfy", "module-path"])
def test_rescale_in_schemes_with_other_homes_for_the_scale(tmp_path: Path, scheme: str) -> None:
    names = (
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q",
        "lora_unet_output_blocks_0_0_in_layers_2",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1",
    )
    state = {}
    for name in names:
        state[f"{name}.lora_down.weight"] = torch.randn(2, 4)
        state[f"{name}.lora_up.weight"] = torch.randn(4, 2)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "kohya.safetensors")
    source = tmp_path / f"{scheme}.safetensors"
    if scheme != "kohya":
        loratool.convert(tmp_path / "kohya.safetensors", scheme, source)
    out = tmp_path / "out.safetensors"
    loratool.rescale(source, out, weights=["te2=0.5", "attn1=-2"])
    found = loratool.compare([source, out])
    ratios = sorted(round(m.norms[1] / m.norms[0] * (m.cosine or 0), 5) for m in found.modules)
    assert ratios == [-2.0, 0.5, 1.0]


def test_rescale_puts_into_factors_what_one_pattern_would_say_for_two(tmp_path: Path) -> None:
    """Both projections of an ``nn.MultiheadAttention`` go by one pattern of PEFT's."""
    adapter = FIXTURES / "adapters" / "mha"
    loratool.rescale(adapter, tmp_path / "out", weights=["out_proj=0.5"])
    found = loratool.compare([adapter, tmp_path / "out"])
    ratios = {m.module: round(m.norms[1] / m.norms[0], 6) for m in found.modules}
    assert any("out_proj" in name for name in ratios)
    assert all(ratio == (0.5 if "out_proj" in name else 1) for name, ratio in ratios.items())


def test_compare_sees_adapters_as_strong_as_they_are_used(make_adapter: Make) -> None:
    paths = adapters(make_adapter)
    found = loratool.compare(paths, weights=WEIGHTS)
    firsts, seconds = (
        {name: weights[name] * delta for name, delta in dense_deltas(path).items()}
        for path, weights in zip(paths, EXPECTED, strict=True)
    )
    one, other = (torch.stack([d[name] for name in MODULES]) for d in (firsts, seconds))
    cosine = float((one * other).sum() / one.norm() / other.norm())
    distance = float((one - other).norm() / one.norm())
    assert found.cosine == pytest.approx(cosine, rel=1e-6)
    assert found.relative_distance == pytest.approx(distance, rel=1e-6)
    assert len(found.modules) == 4
    assert found.only_in == (tuple(sorted(MODULES[4:])), ())


def test_one_of_two_tied_weights_alone_has_another_weight(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """The delta of both is one until they are weighed apart; then the merge writes two weights."""
    config = {"tie_word_embeddings": True, "model_type": "llama", "vocab_size": 7}
    base = make_base({"model.embed_tokens.weight": torch.randn(7, 5)}, config)
    low, high = torch.randn(4, 7), torch.randn(5, 4)
    adapter = make_adapter(
        {
            "model.embed_tokens.lora_embedding_A": low,
            "model.embed_tokens.lora_embedding_B": high,
            "lm_head.lora_A.weight": high.T.contiguous(),
            "lm_head.lora_B.weight": low.T.contiguous(),
        }
    )
    loratool.merge(base, [adapter], tmp_path / "tied")
    assert set(load_tensors_of(tmp_path / "tied")) == {"model.embed_tokens.weight"}
    loratool.merge(base, [adapter], tmp_path / "apart", weights=["lm_head=0.5"])
    new, old = load_tensors_of(tmp_path / "apart"), load_tensors_of(base)
    delta = 2 * (high @ low).T
    table = old["model.embed_tokens.weight"]
    assert torch.allclose(new["model.embed_tokens.weight"], table + delta, atol=1e-5)
    assert torch.allclose(new["lm_head.weight"], table + delta / 2, atol=1e-5)


def test_the_command_line_splits_at_the_last_equals_sign(
    make_adapter: Make, tmp_path: Path
) -> None:
    one, other = adapters(make_adapter)
    out = tmp_path / "out"
    weights = ("-w", "0.5", "-w", "re:^(?=model).*mlp=0.25")
    result = run("compose", one, other, *weights, "-w", "other:self_attn=-2", "-o", out)
    assert result.returncode == 0, result.stderr
    first, second = dense_deltas(one), dense_deltas(other)
    for name, delta in dense_deltas(out).items():
        mlp = "mlp" in name
        wanted = (0.125 if mlp else 0.5) * first[name] + (0.25 if mlp else -2) * second[name]
        assert torch.allclose(delta, wanted, atol=1e-5)
    history = json.loads(_metadata(out)["loratool"])["options"]["weights"]
    assert history == [0.5, 1.0, "re:^(?=model).*mlp=0.25", "other:self_attn=-2"]


def _metadata(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


@pytest.mark.parametrize("command", ["merge", "compose", "compare", "rescale"])
def test_a_pattern_that_means_nothing_is_one_line_and_nothing_is_written(
    make_base: Make, make_adapter: Make, tmp_path: Path, command: str
) -> None:
    one, other = adapters(make_adapter)
    base = make_base({f"{m}.weight": torch.randn(6, 5) for m in MODULES})
    inputs = {"merge": [base, one, other], "rescale": [one]}.get(command, [one, other])
    out = () if command == "compare" else ("-o", tmp_path / "out")
    result = run(command, *inputs, "-w", "te2=1", *out)
    assert result.returncode == 2
    assert result.stderr.splitlines()[1].startswith("hint: what would: layers.0-2, ")
    assert result.stderr.startswith("error: -w: 'te2' means no module of ")
    assert not (tmp_path / "out").exists()


STYLE = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": 8,
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": 8,
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": 6,
    "lora_te_text_model_encoder_layers_9_mlp_fc1": 6,
}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("lora_te", {2, 3}),  # a bare one is a regular expression, for keys of the file
        ("attn(1|2)", {0, 1}),
        ("glob:te1", {2, 3}),
        ("glob:unet", {0, 1}),
        ("glob:input_blocks", {0}),
        ("glob:layers.8-11", {3}),
        ("glob:lora_te_*", {2, 3}),
        ("re:^te1\\..*mlp", {3}),
        ("re:^lora_te_", {2, 3}),
    ],
)
def test_skip_takes_the_same_patterns(tmp_path: Path, skip: str, left: set[int]) -> None:
    state = {}
    for name, size in STYLE.items():
        state[f"{name}.lora_down.weight"] = torch.randn(2, size)
        state[f"{name}.lora_up.weight"] = torch.randn(size, 2)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "style.safetensors")
    loratool.compose([tmp_path / "style.safetensors"], tmp_path / "o.safetensors", skip=[skip])
    found = {key.partition(".")[0] for key in load_file(tmp_path / "o.safetensors")}
    assert found == {name for place, name in enumerate(STYLE) if place not in left}


@pytest.mark.parametrize(
    ("include", "exclude", "found"),
    [
        (["glob:layers.1-2"], [], MODULES[2:]),
        (["layers\\.[12]"], [], MODULES[2:]),
        ([], ["glob:self_attn", "glob:layers.0"], MODULES[3::2]),
        (["re:mlp"], ["layers.0"], MODULES[3::2]),
    ],
)
def test_include_and_exclude_take_the_same_patterns(
    make_base: Make, tmp_path: Path, include: list[str], exclude: list[str], found: tuple[str, ...]
) -> None:
    base, tuned = (
        make_base({f"{m}.weight": torch.randn(6, 5) for m in MODULES}, name=name)
        for name in ("base", "tuned")
    )
    report = loratool.extract(
        base, tuned, tmp_path / "out", rank=2, include=include, exclude=exclude
    )
    assert {module.module for module in report.modules} == set(found)


SINGLE = [
    case
    for case in json.loads((FIXTURES / "cases.json").read_text())
    if case["expect"] == "merge" and len(case["adapters"]) == 1
]


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case["case"])
def test_a_pattern_reaches_whatever_a_number_reaches(case: dict[str, Any], tmp_path: Path) -> None:
    """Deltas of every variant, saved heads, biases and rows: one weight for all, said twice."""
    base, adapter = FIXTURES / case["base"], FIXTURES / case["adapters"][0]
    outcomes = []
    for number, weights in enumerate(([0.5], ["re:.=0.5"], ["re:.=-1", 2, "glob:*=0.25"])):
        out = tmp_path / str(number)
        try:
            loratool.merge(base, [adapter], out, weights=weights)
            told = ("README.md", "loratool.json")  # in which words it was asked for
            files = [file for file in sorted(out.iterdir()) if file.name not in told]
            outcomes.append({file.name: file.read_bytes() for file in files})
        except loratool.errors.LoratoolError as error:
            outcomes.append({"refused": str(error).encode()})
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("pattern", ["gate_up_proj", "down_proj", "re:down_proj", "*.gate_up_proj"])
def test_one_parameter_of_experts_is_weighed_alone(
    pattern: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    experts, path = 2, "model.layers.0.mlp.experts"
    shapes = {"gate_up_proj": (10, 8), "down_proj": (8, 5)}
    weights = {f"{path}.{name}": torch.randn(experts, *shape) for name, shape in shapes.items()}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    factors: dict[str, torch.Tensor] = {}
    for module, (out, into) in zip((f"{path}.base_layer", path), shapes.values(), strict=True):
        factors[f"{module}.lora_A.weight"] = torch.randn(experts * 2, into)
        factors[f"{module}.lora_B.weight"] = torch.randn(out, experts * 2)
    adapter = make_adapter(
        factors,
        r=2,
        lora_alpha=2,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in shapes],
        peft_version="0.21.2",
    )
    base = make_base(weights, config)
    changes = []
    for number, options in enumerate(({}, {"weights": [f"{pattern}=0.5"]})):
        loratool.merge(base, [adapter], tmp_path / f"{number}", **options)
        merged = load_file(tmp_path / f"{number}" / "model.safetensors")
        changes.append({name: merged[name] - value for name, value in weights.items()})
    for name in weights:
        factor = 0.5 if name.endswith(pattern.removeprefix("re:").removeprefix("*.")) else 1.0
        assert torch.allclose(changes[1][name], factor * changes[0][name], atol=1e-5), name
