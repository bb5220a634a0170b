"""Every kind of adapter, composed and truncated, against merges and the real PEFT.

Composing one adapter, or truncating it to a rank that it has not, must change nothing: the
merged model is the same, PEFT loads the result without a warning that the original did not
give, and the model's outputs are the same.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from deltas import dense_deltas, relative_error, weighted_sum
from oracles import FIXTURES, Case, load_model, load_peft, manifest, outputs_of, read_all

import loratool
from loratool.errors import OptionError, UnsupportedError

pytestmark = pytest.mark.slow

BASE_DEPENDENT = ("dora", "pissa", "olora", "kasa", "qalora")
SINGLE = [case for case in manifest() if case["expect"] == "merge" and len(case["adapters"]) == 1]
NO_FACTORS = ("ia3", "loha")
"""What has no A and B: these verbs ask for a conversion first."""
FACTORED = [case for case in SINGLE if case["case"] not in NO_FACTORS]
PLAIN = [case for case in FACTORED if not any(word in case["case"] for word in BASE_DEPENDENT)]
DEPENDENT = [case for case in FACTORED if case not in PLAIN]
VERBS = ("truncate", "compose", "padded")


def apply(verb: str, adapter: Path, output: Path) -> None:
    if verb == "truncate":
        loratool.truncate(adapter, output, rank=100)
    elif verb == "compose":
        loratool.compose([adapter], output)
    else:
        loratool.compose([adapter], output, rank_multiple=4)


def warnings_of(case: Case, adapter: Path) -> tuple[torch.nn.Module, list[str]]:
    from peft import PeftModel

    model = load_model(case, FIXTURES / case["base"])
    if "resize_to" in case:
        model.resize_token_embeddings(case["resize_to"], mean_resizing=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(model, str(adapter), **case.get("peft_kwargs", {}))
    return peft.eval(), [str(warning.message) for warning in seen]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case["case"])
def test_nothing_changes_for_a_merge_nor_for_peft(case: Case, verb: str, tmp_path: Path) -> None:
    base, adapter = FIXTURES / case["base"], FIXTURES / case["adapters"][0]
    apply(verb, adapter, tmp_path / "out")
    loratool.merge(base, [adapter], tmp_path / "expected")
    loratool.merge(base, [tmp_path / "out"], tmp_path / "merged")
    expected, found = read_all(tmp_path / "expected"), read_all(tmp_path / "merged")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        loose = 0.02 if value.dtype in (torch.bfloat16, torch.float16) else 1e-6
        exact = verb == "truncate" and case["case"] not in ("adalora", "bdlora")
        assert torch.allclose(
            found[name].double(), value.double(), rtol=0, atol=0 if exact else loose
        ), name
    if case["truth"] != "peft" and not case["peft_logits"]:
        return
    _, known = warnings_of(case, adapter)
    peft, seen = warnings_of(case, tmp_path / "out")
    assert len(seen) <= len(known), seen
    wanted = outputs_of(case, load_peft(case))
    error = (outputs_of(case, peft) - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 3e-6


@pytest.mark.parametrize("case", DEPENDENT, ids=lambda case: case["case"])
def test_deltas_that_depend_on_the_base_are_refused(case: Case, tmp_path: Path) -> None:
    adapter = FIXTURES / case["adapters"][0]
    with pytest.raises(UnsupportedError, match=r"base|DoRA"):
        loratool.truncate(adapter, tmp_path / "out", rank=1)
    with pytest.raises(UnsupportedError, match=r"base|DoRA"):
        loratool.compose([adapter], tmp_path / "out")
    if case["case"] != "qalora":  # its scale multiplies whatever A is
        with pytest.raises(UnsupportedError, match=r"base|dora"):
            loratool.rescale(adapter, tmp_path / "out", scale=0.5)
    assert not (tmp_path / "out").exists()


RESCALED = [c for c in PLAIN if c["truth"] == "peft" and c["peft_logits"]]


@pytest.mark.parametrize("case", RESCALED, ids=lambda case: case["case"])
def test_rescaling_changes_what_peft_computes_and_back(case: Case, tmp_path: Path) -> None:
    adapter = FIXTURES / case["adapters"][0]
    loratool.rescale(adapter, tmp_path / "half", scale=-0.5)
    loratool.rescale(tmp_path / "half", tmp_path / "back", scale=-2)
    if case["case"] != "adalora":
        loratool.rescale(tmp_path / "back", tmp_path / "folded", fold=True)
        loratool.rescale(tmp_path / "folded", tmp_path / "stabilised", to_rslora=True)
        loratool.rescale(tmp_path / "stabilised", tmp_path / "out", from_rslora=True)
    else:
        (tmp_path / "back").rename(tmp_path / "out")
    peft, _ = warnings_of(case, tmp_path / "out")
    wanted = outputs_of(case, load_peft(case))
    error = (outputs_of(case, peft) - wanted).abs().max() / wanted.abs().max()
    assert float(error) < (1e-2 if "half" in case["case"] else 3e-6)


UNLOADABLE = ("experts-per-expert", "llava-old-names")
"""Without some modules PEFT loads them no more: it wants all experts, or other names of targets."""
WEIGHED = [
    (case, factor)
    for case in RESCALED
    for factor in (0.5, -2.0, 0.0)
    if not case["case"].startswith("bias-")  # whose biases a merge weighs too, by the same names
    and (factor or case["case"] not in UNLOADABLE)
]


@pytest.mark.parametrize(
    ("case", "factor"), WEIGHED, ids=lambda x: x["case"] if isinstance(x, dict) else str(x)
)
def test_modules_that_are_weighed_apart_are_so_in_peft(
    case: Case, factor: float, tmp_path: Path
) -> None:
    """What rescale records, PEFT applies; and it is what merge makes of the same weights."""
    base, adapter = FIXTURES / case["base"], FIXTURES / case["adapters"][0]
    modules = sorted({module.module for module in loratool.inspect(adapter).modules})
    weights = [f"glob:{module}={factor}" for module in modules[1::2] or modules]
    if not factor and len(modules) == 1:
        with pytest.raises(OptionError, match="every weight is 0"):
            loratool.rescale(adapter, tmp_path / "out", weights=weights)
        return
    loratool.rescale(adapter, tmp_path / "out", weights=weights)
    loratool.merge(base, [adapter], tmp_path / "merged", weights=weights, dtype="float32")
    peft, _ = warnings_of(case, tmp_path / "out")
    wanted = outputs_of(case, load_model(case, tmp_path / "merged"))
    error = (outputs_of(case, peft) - wanted).abs().max() / wanted.abs().max()
    assert float(error) < (1e-2 if "half" in case["case"] else 3e-6)


@pytest.mark.parametrize("left_out", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("verb", ["rescale", "compose", "skip"])
def test_one_side_of_a_tie_alone_is_not_tied_again(
    left_out: str, verb: str, tmp_path: Path
) -> None:
    """PEFT would give its delta to the other side too, if the configuration still said so."""
    case = next(c for c in manifest() if c["case"] == "tied-ensure-weight-tying")
    base, adapter = FIXTURES / case["base"], FIXTURES / case["adapters"][0]
    weights = [f"{left_out}=0"]
    if verb == "rescale":
        loratool.rescale(adapter, tmp_path / "out", weights=weights)
    elif verb == "compose":
        loratool.compose([adapter], tmp_path / "out", weights=weights)
    else:
        loratool.rescale(adapter, tmp_path / "out", scale=1.0, skip=[left_out])
    loratool.merge(base, [adapter], tmp_path / "merged", weights=weights, dtype="float32")
    peft, _ = warnings_of(case, tmp_path / "out")
    wanted = outputs_of(case, load_model(case, tmp_path / "merged"))
    error = (outputs_of(case, peft) - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 3e-6


COMPOSED = [
    ("lora-linear", "rslora", "rank-alpha-patterns-rslora"),
    ("alpha-pattern-only", "rank-pattern-only"),
    ("overlapping-patterns", "layers-to-transform", "target-regex"),
    ("lora-negative-alpha", "lora-float-alpha"),
    ("lora-half-adapter", "lora-linear"),
    ("conv", "conv"),
    ("embedding-full-path", "lora-linear"),
]


@pytest.mark.parametrize("names", COMPOSED, ids="+".join)
def test_sums_are_exact(names: tuple[str, ...], tmp_path: Path) -> None:
    adapters = [FIXTURES / "adapters" / name for name in names]
    weights = [0.7, -1.3, 0.25][: len(names)]
    report = loratool.compose(adapters, tmp_path / "sum", weights=weights)
    truth = weighted_sum(adapters, weights)
    found = dense_deltas(tmp_path / "sum")
    assert found.keys() == truth.keys()
    assert relative_error(found, truth) < 1e-7
    assert report.relative_error < 1e-7
    for rank in (1, 2, 3):
        out = tmp_path / f"rank-{rank}"
        report = loratool.compose(adapters, out, weights=weights, rank=rank)
        best = {
            name: torch.linalg.svdvals(value)[rank:].square().sum() for name, value in truth.items()
        }
        total = sum(float(value.square().sum()) for value in truth.values())
        optimum = (sum(float(tail) for tail in best.values()) / total) ** 0.5
        error = relative_error(dense_deltas(out), truth)
        assert error <= 1.0001 * optimum + 1e-7
        assert abs(error - report.relative_error) <= 1e-3 * error + 1e-9


def test_all_kinds_of_experts_compose(tmp_path: Path) -> None:
    case = next(case for case in manifest() if case["case"] == "experts-mixtral")
    one = next(case for case in manifest() if case["case"] == "experts-mixtral-one")
    base = FIXTURES / case["base"]
    adapters = [FIXTURES / case["adapters"][0], FIXTURES / one["adapters"][0]]
    loratool.compose(adapters, tmp_path / "sum", weights=[0.5, -2.0])
    loratool.merge(base, adapters, tmp_path / "expected", weights=[0.5, -2.0], dtype="float32")
    loratool.merge(base, [tmp_path / "sum"], tmp_path / "merged", dtype="float32")
    expected, found = read_all(tmp_path / "expected"), read_all(tmp_path / "merged")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    peft, seen = warnings_of(case, tmp_path / "sum")
    _, known = warnings_of(case, adapters[0])
    assert len(seen) <= len(known), seen
    model = load_model(case, tmp_path / "merged")
    wanted = outputs_of(case, model)
    assert float((outputs_of(case, peft) - wanted).abs().max() / wanted.abs().max()) < 3e-6
