"""Live layers: forward, gradients and state against PEFT, folds against merges, bad days."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deltas import dense_deltas
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracles import FIXTURES, Case, load_model, load_peft, manifest, outputs_of
from torch import nn
from torch.nn import functional

import loratool
from loratool.errors import AdapterError, LoratoolError, OptionError, UnsupportedError
from loratool.live import Live, attach
from loratool.live.layers import LiveLayer

pytestmark = pytest.mark.slow  # the layers of transformers, the outputs of PEFT

Make = Callable[..., Path]


class Toy(nn.Module):
    """One layer of every kind, one of them in two places."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(20, 12, padding_idx=0)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.qkv = nn.Linear(12, 36)
        self.shared = nn.Linear(36, 36)
        self.again = self.shared
        self.transposed = Conv1D(12, 36)
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).mT).mT
        x = self.again(torch.tanh(self.shared(self.qkv(x))))
        return self.lm_head(self.norm(self.transposed(x)))


ALL = ["embed", "conv", "qkv", "shared", "transposed"]


def toy() -> Toy:
    torch.manual_seed(1)
    return Toy().eval()


def single() -> Toy:
    """Return a toy whose layers are all in one place; PEFT adapts only one of several."""
    model = toy()
    model.again = nn.Identity()
    return model


def ids() -> torch.Tensor:
    return torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(2))


def randomise(live: Live, name: str, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


# ------------------------------------------------------------ against the real PEFT


def is_live(case: Case) -> bool:
    if case["expect"] != "merge" or len(case["adapters"]) > 1 or not case["peft_logits"]:
        return False
    adapter = loratool.open_adapter(FIXTURES / case["adapters"][0])
    return (
        not [e for e in adapter.extras if e.kind.value not in ("base copy", "state")]
        and not any(site.parameters or site.nesting for site in adapter.sites)
        and not any(
            word in case["case"]
            for word in ("pissa", "olora", "kasa", "qalora", "replication", "experts", "resized")
        )
    )


NO_FACTORS = ("ia3", "loha")
"""What has no A and B, and is no live layer before it is converted."""
LIVE_CASES = [c for c in manifest() if is_live(c) and c["case"] not in NO_FACTORS]


@pytest.mark.parametrize("name", NO_FACTORS)
def test_what_has_no_factors_is_refused_with_a_way(name: str) -> None:
    (case,) = [case for case in manifest() if case["case"] == name]
    model = load_model(case, FIXTURES / case["base"])
    with pytest.raises(UnsupportedError) as refused:
        attach(model, FIXTURES / "adapters" / name)
    assert "--to-lora" in str(refused.value.hint)


@pytest.mark.parametrize("case", LIVE_CASES, ids=lambda case: case["case"])
def test_files_compute_what_peft_computes(case: Case) -> None:
    model = load_model(case, FIXTURES / case["base"])
    before = outputs_of(case, model)
    live = attach(model, FIXTURES / case["adapters"][0])
    found = outputs_of(case, model)
    wanted = outputs_of(case, load_peft(case))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-6
    live.fold()
    folded = outputs_of(case, model)
    assert float((folded - wanted).abs().max() / wanted.abs().max()) < 5e-6
    live.detach()
    assert torch.equal(outputs_of(case, model), before)


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "bias"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d", "conv2d", "conv3d"])
def test_gradients_are_those_of_peft(kind: str, variant: str) -> None:
    if kind == "embedding" and variant == "bias":
        pytest.skip("an embedding has none")
    layers: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
        "linear": (lambda: nn.Linear(6, 8), torch.randn(4, 6)),
        "embedding": (lambda: nn.Embedding(9, 8), torch.randint(0, 9, (4, 3))),
        "conv1d": (lambda: nn.Conv1d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 9)),
        "conv2d": (lambda: nn.Conv2d(3, 8, (3, 2), stride=2), torch.randn(2, 3, 9, 8)),
        "conv3d": (lambda: nn.Conv3d(2, 8, 2), torch.randn(2, 2, 4, 4, 4)),
    }
    from peft import LoraConfig, get_peft_model

    make, x = layers[kind]
    base = nn.Sequential(make())
    mine, theirs = copy.deepcopy(base), copy.deepcopy(base)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["0"],
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        lora_bias=variant == "bias",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(theirs, config)
    live = attach(
        mine,
        targets=["0"],
        rank=3,
        alpha=5,
        rank_stabilised=variant == "rslora",
        dora=variant == "dora",
        bias=variant == "bias",
    )
    assert torch.equal(mine(x), base(x)) or variant == "dora"
    (_, layer), other = live.layers()[0], peft.base_model.model[0]
    factors = layer.factors("default")
    assert factors is not None
    names = (
        ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
    )
    pairs = []
    for own, name in zip((factors.down, factors.up), names, strict=True):
        value = getattr(other, name)["default"]
        value = value if isinstance(value, nn.Parameter) else value.weight
        pairs.append((own, value))
    if variant == "dora":
        pairs.append((factors.magnitude, other.lora_magnitude_vector["default"].weight))
    if variant == "bias":
        pairs.append((factors.bias, other.lora_B["default"].bias))
    with torch.no_grad():
        for own, value in pairs:
            value.copy_(torch.randn(value.shape) + (2 if value.dim() != own.dim() else 0))
            own.copy_(value.reshape(own.shape))
    target = torch.randn(mine(x).shape)
    losses = [functional.mse_loss(model(x), target) for model in (mine, peft)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for own, value in pairs:
        assert own.grad is not None
        scale = float(value.grad.abs().max())
        assert torch.allclose(own.grad, value.grad.reshape(own.shape), atol=1e-5 * scale)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolutions_keep_their_geometry(mode: str) -> None:
    base = nn.Conv2d(3, 8, (3, 2), dilation=2, padding=1, padding_mode=mode)
    model, x = nn.Sequential(copy.deepcopy(base)), torch.randn(2, 3, 9, 8)
    live = attach(model, targets=["0"], rank=2, alpha=3)
    randomise(live, "default")
    factors = live.layers()[0][1].factors("default")
    assert factors is not None
    delta = 1.5 * factors.up.flatten(1) @ factors.down.flatten(1)
    with torch.no_grad():
        base.weight += delta.reshape(base.weight.shape)
    assert torch.allclose(model(x), base(x), atol=1e-5)


# ----------------------------------------------------------------- new adapters


@pytest.mark.parametrize("initialisation", ["default", "gaussian", "pissa"])
def test_new_adapters_change_nothing_at_the_start(initialisation: str) -> None:
    model, x = toy(), ids()
    before = model(x)
    targets = ["qkv", "shared", "transposed"] if initialisation == "pissa" else ALL
    attach(model, targets=targets, rank=4, initialisation=initialisation)
    assert torch.equal(model(x), before)


def test_pissa_learns_the_leading_part_without_touching_the_base(tmp_path: Path) -> None:
    model, x = toy(), ids()
    weight = model.qkv.weight.clone()
    live = attach(model, targets=["qkv"], rank=2, alpha=4, initialisation="pissa")
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1.1)
    changed = model(x)
    live.fold()
    assert torch.allclose(model(x), changed, atol=1e-5)
    live.unfold()
    live.save(tmp_path / "out")
    live.detach()
    assert torch.equal(model.qkv.weight, weight)
    attach(model, tmp_path / "out")
    assert torch.allclose(model(x), changed, atol=1e-5)


def test_merged_projections_adapt_some_of_their_parts(tmp_path: Path) -> None:
    model, x = toy(), torch.randn(5, 12)
    before = model.qkv(x)
    live = attach(model, targets=["qkv"], rank=3, alpha=6, enable=(True, False, True))
    randomise(live, "default")
    after = model.qkv(x)
    change = (after - before).split(12, dim=1)
    assert torch.equal(change[1], torch.zeros(5, 12))
    (_, layer), _ = live.layers()[0], None
    factors = layer.factors("default")
    assert factors is not None and factors.up.shape == (24, 3)
    for part, index in ((0, 0), (2, 1)):
        down = factors.down[3 * index : 3 * index + 3]
        up = factors.up[12 * index : 12 * index + 12]
        assert torch.allclose(change[part], 2 * (x @ down.T @ up.T), atol=1e-5)
    live.save(tmp_path / "out")
    live.detach()
    attach(model, tmp_path / "out")
    assert torch.allclose(model.qkv(x), after, atol=1e-5)


def test_counts_of_parameters() -> None:
    live = attach(nn.Sequential(nn.Linear(64, 10)), targets=["0"], rank=4)
    assert live.count() == (296, 946)


def test_targets(tmp_path: Path) -> None:
    model = toy()
    live = attach(model, targets="all-linear", train_norms=True, train_head=True)
    assert {path for path, _ in live.layers()} == {"qkv", "shared", "transposed"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias"} < trained
    assert "embed.weight" not in trained
    live.detach()
    assert all(p.requires_grad for p in model.parameters())
    live = attach(model, targets=r"(qkv|conv)", train_embeddings=True)
    assert {path for path, _ in live.layers()} == {"qkv", "conv"}
    assert model.embed.weight.requires_grad
    for targets in ((), ["nothing"], r"no.*thing"):
        with pytest.raises(OptionError):
            attach(toy(), targets=targets)
    with pytest.raises(OptionError, match="taken"):
        attach(model, targets=["qkv"])
    with pytest.raises(OptionError, match="brings its own"):
        attach(model, tmp_path, "more", rank=4)


def test_layers_that_are_not_called_or_cannot_be_are_refused() -> None:
    for model, target in (
        (nn.TransformerEncoderLayer(8, 2, 16), "linear1"),
        (nn.MultiheadAttention(8, 2), "out_proj"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), "0"),
    ):
        with pytest.raises(UnsupportedError):
            attach(model, targets=[target])


# ------------------------------------------------------------- several adapters


def test_switching_weights_and_samples() -> None:
    model, x = toy(), ids()
    base = model(x)
    live = attach(model, targets=ALL, name="a", rank=3)
    attach(model, targets=["qkv"], name="b", rank=2, activate=False)
    for number, name in enumerate(("a", "b")):
        randomise(live, name, number)
    assert live.names == ("a", "b") and dict(live.active) == {"a": 1.0}
    first = model(x)
    with live.using("b"):
        second = model(x)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)
    live.deactivate()
    assert torch.equal(model(x), base)
    with live.per_sample(["a", None, "b"]):
        mixed = model(x)
    for row, expected in enumerate((first, base, second)):
        assert torch.allclose(mixed[row], expected[row], atol=1e-6)
    with pytest.raises(UnsupportedError, match="2 names for a batch of 3"), live.per_sample("ab"):
        model(x)
    live.activate({"a": 0.5, "b": -2.0})
    both = model.qkv(torch.ones(1, 12))
    live.activate("a")
    only_a = model.qkv(torch.ones(1, 12))
    live.activate("b")
    only_b = model.qkv(torch.ones(1, 12))
    live.deactivate()
    plain = model.qkv(torch.ones(1, 12))
    assert torch.allclose(both, plain + 0.5 * (only_a - plain) - 2 * (only_b - plain), atol=1e-5)
    with pytest.raises(OptionError, match="not attached"):
        live.activate("c")


def test_only_the_active_adapter_is_trained() -> None:
    model = toy()
    live = attach(model, targets=["qkv"], name="a")
    attach(model, targets=["qkv"], name="b")
    assert all(p.requires_grad for p in live.parameters("b"))
    assert not any(p.requires_grad for p in live.parameters("a"))
    model(ids()).sum().backward()
    assert model.lm_head.weight.grad is None


def test_several_doras_have_an_order_and_are_refused() -> None:
    model = toy()
    live = attach(model, targets=["qkv"], name="a", dora=True)
    attach(model, targets=["qkv"], name="b", activate=False)
    with pytest.raises(UnsupportedError, match="order"):
        live.activate(["a", "b"])


# -------------------------------------------------------------- folds and merges


@pytest.mark.parametrize(
    "name", ["lora-linear", "gpt2-conv1d", "conv", "dora-linear", "dora-conv1d"]
)
def test_a_fold_is_a_merge(name: str, tmp_path: Path) -> None:
    case = next(case for case in manifest() if case["case"] == name)
    base, adapter = FIXTURES / case["base"], FIXTURES / case["adapters"][0]
    model = load_model(case, base)
    live = attach(model, adapter)
    live.fold()
    loratool.merge(base, [adapter], tmp_path / "merged", dtype="float32")
    merged = load_model(case, tmp_path / "merged")
    expected = dict(merged.named_parameters())
    for path, layer in live.layers():
        weight = expected[f"{path}.weight"]
        assert torch.allclose(layer.base.weight, weight, atol=1e-7), path


def test_eval_may_fold_and_train_unfolds() -> None:
    model, x = toy(), ids()
    weight = model.qkv.weight.clone()
    live = attach(model, targets=ALL, fold_on_eval=True)
    randomise(live, "default")
    model.train()
    wanted = model(x)
    model.eval()
    assert live.is_folded and not torch.equal(model.qkv.weight, weight)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    model.train()
    assert not live.is_folded and torch.equal(model.qkv.weight, weight)


def test_a_bias_that_nothing_can_take_leaves_all_unfolded() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    weight = model[0].weight.clone()
    live = attach(model, targets=["0", "1"], bias=True)
    randomise(live, "default")
    with pytest.raises(UnsupportedError, match="no bias"):
        live.fold()
    assert not live.is_folded and torch.equal(model[0].weight, weight)


# ------------------------------------------------------------------------ storing


@pytest.mark.parametrize("variant", ["plain", "dora", "bias"])
def test_saved_adapters_load_in_peft_and_back(variant: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, x = single(), ids()
    targets = ALL if variant != "bias" else ["conv", "qkv"]
    live = attach(
        model, targets=targets, rank=3, alpha=5, dora=variant == "dora", bias=variant == "bias"
    )
    randomise(live, "default")
    wanted = model(x)
    live.save(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One flag for linear and transposed layers cannot suit both; PEFT corrects it aloud.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        peft = PeftModel.from_pretrained(single(), str(tmp_path / "out")).eval()
    assert torch.allclose(peft(x), wanted, atol=1e-5)
    fresh = single()
    attach(fresh, tmp_path / "out")
    assert torch.allclose(fresh(x), wanted, atol=1e-6)
    if variant == "plain":
        deltas = dense_deltas(tmp_path / "out")
        assert set(deltas) == set(ALL)
        live.save(tmp_path / "path", to="module-path")
        attach(fresh, tmp_path / "path", "second")
        assert torch.allclose(fresh(x), wanted, atol=1e-6)


def test_state_dicts_are_strict() -> None:
    model = toy()
    live = attach(model, targets=["qkv"])
    state = {key: value + 1 for key, value in live.state_dict("default").items()}
    live.load_state_dict("default", state)
    assert torch.equal(live.state_dict("default")["qkv.down"], state["qkv.down"])
    broken = {"qkv.down": state["qkv.down"][:, :3], "qkv.other": state["qkv.up"]}
    with pytest.raises(AdapterError, match=r"missing: qkv.up; unexpected: qkv.other; other shapes"):
        live.load_state_dict("default", broken)


def test_files_for_other_models_are_refused_with_a_list(make_adapter: Make) -> None:
    from samples import lora

    wrong = make_adapter({**lora("qkv", 36, 12), **lora("gone", 4, 4)}, "wrong")
    with pytest.raises(AdapterError, match="1 of its modules are not in the model: gone"):
        attach(toy(), wrong)
    wide = make_adapter(lora("qkv", 36, 13), "wide")
    with pytest.raises(AdapterError, match=r"\[36, 13\]"):
        attach(toy(), wide)
    saved = make_adapter({**lora("qkv", 36, 12), "lm_head.weight": torch.ones(5, 12)}, "saved")
    model = toy()
    with pytest.raises(UnsupportedError, match="lm_head"):
        attach(model, saved)
    assert Live.of(model) is None


# --------------------------------------------------------- living with the rest


def test_copies_pickles_and_replicas_are_whole() -> None:
    model, x = toy(), ids()
    live = attach(model, targets=ALL)
    randomise(live, "default")
    wanted = model(x)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    live.deactivate()
    for other in (twin, again):
        assert torch.equal(other(x), wanted)
        handle = Live.of(other)
        assert handle is not None and handle.names == ("default",)
        assert other.shared is other.again
        handle.detach()
        assert torch.equal(other(x), model(x))
    state = twin.state_dict()
    twin.load_state_dict(state)
    fresh = toy()
    attach(fresh, targets=ALL)
    fresh.load_state_dict(copy.deepcopy(again).state_dict(), strict=False)
    wrapped = model.state_dict()
    target = toy()
    attach(target, targets=ALL)
    target.load_state_dict(wrapped)
    assert torch.equal(target(x), wanted)
    layer = next(m for m in target.modules() if isinstance(m, LiveLayer))
    replica = layer._replicate_for_data_parallel()
    assert replica.shared is layer.shared


def test_attributes_of_the_layer_are_still_there() -> None:
    model = toy()
    attach(model, targets=["qkv"])
    assert model.qkv.in_features == 12 and model.qkv.weight.shape == (36, 12)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.qkv.nonsense


def test_autocast_checkpointing_and_compile() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = toy(), ids()
    live = attach(model, targets=ALL)
    randomise(live, "default")
    wanted = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(x).float(), wanted, atol=0.15)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in live.parameters())
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(x), wanted, atol=1e-5)
    live.deactivate()
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_reads_from_several_threads_see_one_choice() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, x = toy(), ids()
    live = attach(model, targets=["qkv"], name="a")
    randomise(live, "a")
    with torch.no_grad():
        on = model(x)
        live.deactivate()
        off = model(x)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(model, x) for _ in range(40)]
            for number in range(40):
                live.activate("a" if number % 2 else ())
            for future in futures:
                with torch.no_grad():
                    result = future.result()
                assert any(torch.allclose(result, other, atol=1e-5) for other in (on, off))


def test_the_rest_of_the_world_may_meddle_while_folded() -> None:
    model, x = toy(), ids()
    live = attach(model, targets=ALL)
    randomise(live, "default")
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = model(x)
    live.fold()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.items())
    assert live.is_folded
    twin = toy()
    attach(twin, targets=ALL)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), wanted)
    model.double()
    assert live.is_folded
    live.unfold()
    assert model.qkv.weight.dtype == torch.float64
    assert torch.allclose(model(x).float(), wanted, atol=1e-5)
    live.fold()
    model.load_state_dict({key: value * 0 for key, value in plain.items()})
    assert not live.is_folded and float(model.qkv.weight.abs().max()) == 0


def test_unbatched_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    live = attach(model, targets=["0"], rank=8, bias=True)
    randomise(live, "default")
    x = torch.randn(3, 8, 8)
    assert torch.allclose(model(x), model(x[None])[0], atol=1e-5)


def test_a_layer_cannot_wrap_itself_and_stays_as_it_was() -> None:
    layer = nn.Linear(64, 10)
    with pytest.raises(OptionError, match="Sequential"):
        attach(layer, targets="all-linear")
    assert layer.weight.requires_grad


def test_only_what_was_folded_is_folded_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    live = attach(model, targets=["0", "1"], name="a", fold_on_eval=True)
    attach(model, targets=["0", "1"], name="b", activate=False)
    model.train()
    model[0].eval()
    live.activate("b")
    assert [layer.folded is not None for _, layer in live.layers()] == [True, False]


def test_parts_and_wholes() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    attach(model[0], targets=["0"], name="x")
    live = attach(model, targets=["1.0"], name="y")
    assert not model[1][0].base.weight.requires_grad
    live.detach()
    assert all(p.requires_grad for p in model.parameters())
    attach(model[0], targets=["0"], name="x")
    attach(model[1], targets=["0"], name="x")
    with pytest.raises(OptionError, match="one by one"):
        Live.of(model)


def test_scaled_embeddings() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.Sequential(Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=3.0))
    live = attach(model, targets=["0"], rank=2)
    randomise(live, "default")
    x = torch.tensor([1, 4])
    wanted = model(x)
    live.fold()
    assert torch.allclose(model(x), wanted, atol=1e-5)

    class Odd(nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    with pytest.raises(UnsupportedError, match="more than look rows up"):
        attach(nn.Sequential(Odd(4, 4)), targets=["0"])


def test_factors_of_a_file_keep_their_precision(make_adapter: Make, make_base: Make) -> None:
    from oracles import read_all
    from samples import lora

    weight = torch.randn(24, 16).bfloat16()
    base = make_base({"0.weight": weight})
    adapter = make_adapter({k: v * 0.1 for k, v in lora("0", 24, 16).items()}, target_modules=["0"])
    model = nn.Sequential(nn.Linear(16, 24, bias=False)).bfloat16()
    model[0].weight.data.copy_(weight)
    attach(model, adapter).fold()
    loratool.merge(base, [adapter], base.parent / "merged")
    assert torch.equal(model[0].weight, read_all(base.parent / "merged")["0.weight"])


def test_no_target_is_passed_over_in_silence() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"1 layer\(s\) left out.*out_proj"):
        live = attach(model, targets="all-linear")
    assert [path for path, _ in live.layers()] == ["0", "2"]
    live.detach()
    with pytest.raises(OptionError, match=r"\['gone'\] means no layer"):
        attach(model, targets=["0", "gone"])
    with pytest.raises(UnsupportedError, match="out_proj"):
        attach(model, targets=["out_proj"])
    assert Live.of(model) is None


def test_names_settings_and_targets_that_cannot_be() -> None:
    model = toy()
    for name in ("", "a.b", "keys", "train"):
        with pytest.raises(OptionError, match="name"):
            attach(model, targets=["qkv"], name=name)
    for options in ({"r": 4}, {"targets": "("}, {"bias": True, "dora": True}):
        with pytest.raises(OptionError):
            attach(model, **{"targets": ["qkv"], **options})
    with pytest.raises(OptionError, match="no bias"):
        attach(model, targets=["embed"], bias=True)
    assert Live.of(model) is None and all(p.requires_grad for p in model.parameters())
    live = attach(model, targets=["qkv"], name="a")
    with pytest.raises(OptionError, match="first adapter"):
        attach(model, targets=["qkv"], name="b", train_norms=True)
    for choice in ({"a": float("nan")}, ["a", "a"]):
        with pytest.raises(OptionError):
            live.activate(choice)


def test_what_is_used_may_be_removed_in_between() -> None:
    model = toy()
    live = attach(model, targets=["qkv"], name="a")
    attach(model, targets=["qkv"], name="b", activate=False)
    with live.using("b"):
        live.remove("a")
    assert live.names == ("b",) and live.active == ()

    def fail() -> None:
        with live.using("b"):
            live.detach()
            raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        fail()


def test_tied_embeddings_stay_trainable() -> None:
    model = toy()
    model.lm_head = nn.Linear(12, 20, bias=False)
    model.lm_head.weight = model.embed.weight
    attach(model, targets=["qkv"], train_embeddings=True)
    assert model.embed.weight.requires_grad


def test_targets_that_are_endings_of_others_are_expressions(tmp_path: Path) -> None:
    from deltas import load_config

    model = nn.ModuleDict({"q": nn.Linear(4, 4), "blk": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    attach(model, targets="q").save(tmp_path / "out")
    assert load_config(tmp_path / "out")["target_modules"] == "q"


class Machine(RuleBasedStateMachine):
    """Whatever is done, the model computes what its adapters say, and can be had back."""

    @initialize()
    def begin(self) -> None:
        self.model, self.x = toy(), ids()
        self.modules = dict(self.model.named_modules())
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.flags = [p.requires_grad for p in self.model.parameters()]
        self.base = self.model(self.x)
        self.count = 0

    @property
    def live(self) -> Live | None:
        return Live.of(self.model)

    @rule(
        layers=st.lists(st.sampled_from(ALL), min_size=1, unique=True),
        dora=st.booleans(),
        activate=st.booleans(),
    )
    def add(self, layers: list[str], dora: bool, activate: bool) -> None:
        self.count += 1
        name = f"n{self.count}"
        live = attach(self.model, targets=layers, name=name, dora=dora, rank=2, activate=activate)
        folded = live.is_folded
        live.unfold()
        randomise(live, name, self.count)
        if folded:
            live.fold()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        assert self.live is not None
        chosen = data.draw(st.dictionaries(st.sampled_from(self.live.names), st.floats(-2, 2)))
        before = self.live.active
        try:
            self.live.activate(chosen)
        except UnsupportedError:
            assert self.live.active == before

    @precondition(lambda self: self.live)
    @rule()
    def fold(self) -> None:
        assert self.live is not None
        before = self.model(self.x).detach()
        self.live.fold()
        after = self.model(self.x).detach()
        assert float((after - before).abs().max()) < 1e-3 * (1 + float(before.abs().max()))

    @precondition(lambda self: self.live)
    @rule()
    def unfold(self) -> None:
        assert self.live is not None
        self.live.unfold()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        assert self.live is not None
        self.live.remove(data.draw(st.sampled_from(self.live.names)))

    @invariant()
    def inactive_is_the_base(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.live is None or not self.live.active:
            assert torch.equal(self.model(self.x), self.base)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.live is not None:
            self.live.detach()
        now = dict(self.model.named_modules())
        assert now.keys() == self.modules.keys()
        assert all(now[path] is module for path, module in self.modules.items())
        state = self.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in self.state.items())
        assert [p.requires_grad for p in self.model.parameters()] == self.flags
        assert torch.equal(self.model(self.x), self.base)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=12, deadline=None)


def test_errors_are_the_packages_own() -> None:
    with pytest.raises(LoratoolError):
        attach(toy(), targets=["qkv"], rank=0)
    for options in ({"dropout": 1.0}, {"initialisation": "zeros"}, {"alpha": float("nan")}):
        with pytest.raises(OptionError):
            attach(toy(), targets=["qkv"], **options)  # type: ignore[arg-type]
