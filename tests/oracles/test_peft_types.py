"""PEFT's other types against the real PEFT: merges of tiny seeded models, in every option."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loratool
from loratool.base.model import open_model
from loratool.base.placing import with_places
from loratool.errors import AdapterError, LoratoolError, UnsupportedError
from loratool.files.spec import StoredTensor
from loratool.math import exact_variants
from loratool.schemes.opening import open_adapter
from loratool.values.arrays import decode

pytestmark = pytest.mark.slow

EXACT, NEAR, NEVER = "exact", "near", "never"


class Toy(nn.Module):
    """Layers of every kind, tall, wide and square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 24)
        self.codes = nn.Embedding(24, 12)
        self.tall = nn.Linear(24, 36)
        self.wide = nn.Linear(48, 24, bias=False)
        self.square = nn.Linear(24, 24)
        self.conv = nn.Conv2d(4, 12, 3)
        self.sequence = nn.Conv1d(8, 12, 3)
        self.point = nn.Conv1d(8, 12, 1)
        self.norm = nn.LayerNorm(24)


def gpt2() -> nn.Module:
    """Conv1D layers, stored ``(in, out)``; ``attn.c_proj`` is square."""
    import transformers

    model: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=24, n_layer=1, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2
        )
    )
    return model


LINEAR = ("tall", "wide", "square")
CONV1D = ("c_attn", "attn.c_proj", "c_fc")


@dataclass(frozen=True)
class Case:
    """A type of adapter with some options.

    Attributes:
        config: The class of its configuration.
        options: What it is made with.
        targets: The layers that it is on.
        build: Makes the model.
        lora: Whether a plain LoRA equals it, comes near it, or there is none.
        weighs: Whether a share of it means something.
        variants: What loratool calls it.
        exact: The largest error in float64, of the largest number of a weight.
    """

    config: str
    options: Mapping[str, Any]
    targets: tuple[str, ...] = LINEAR
    build: Callable[[], nn.Module] = Toy
    lora: str = EXACT
    weighs: bool = True
    several: bool = True
    variants: str = ""
    exact: float = 1e-13
    size: float = 0.3
    changes: bool = True


CASES: dict[str, Case] = {}


def case(name: str, config: str, options: Mapping[str, Any], **more: Any) -> None:
    CASES[name] = Case(config, options, **more)


for at, more in (("", {}), ("-conv1d", {"targets": CONV1D, "build": gpt2})):
    case(f"vera{at}", "VeraConfig", {"r": 4}, variants="vera", **more)
    seeded = {"r": 4, "projection_prng_key": 3, "save_projection": False}
    case(f"vera-seed{at}", "VeraConfig", seeded, variants="vera", **more)
    case(f"pvera{at}", "PveraConfig", {"r": 4}, variants="pvera", **more)
    case(f"pvera-seed{at}", "PveraConfig", seeded, variants="pvera", **more)
    case(f"fourierft{at}", "FourierFTConfig", {"n_frequency": 9}, exact=1e-6, **more)
    case(f"randlora{at}", "RandLoraConfig", {"r": 4, "randlora_alpha": 6}, **more)
    for sparse in ({}, {"sparse": True}, {"very_sparse": True}):
        name = "randlora-seed" + "".join(f"-{key}" for key in sparse)
        drawn = {"r": 5, "projection_prng_key": 7, "save_projection": False, **sparse}
        case(f"{name}{at}", "RandLoraConfig", drawn, exact=1e-6 if sparse else 1e-13, **more)
case("fourierft-all", "FourierFTConfig", {"n_frequency": 3 * 19 * 10, "scaling": 7.5}, exact=1e-6)
case("fourierft-seed", "FourierFTConfig", {"n_frequency": 5, "random_loc_seed": 5}, exact=1e-6)

TURNED: dict[str, Any] = {"lora": NEAR, "weighs": False}
for at, more in (
    ("", {}),
    ("-conv", {"targets": ("conv",)}),
    ("-embedding", {"targets": ("embed_tokens",), "several": False}),
):
    oft = {"variants": "oft", **TURNED, **more}
    if at != "-embedding":
        oft["several"] = True
    case(f"oft{at}", "OFTConfig", {"oft_block_size": 6}, **oft)
    for terms in range(1, 8):
        options = {"oft_block_size": 4, "num_cayley_neumann_terms": terms}
        case(f"oft-{terms}{at}", "OFTConfig", options, changes=terms > 1, **oft)
    cayley = {"r": 3, "oft_block_size": 0, "use_cayley_neumann": False}
    case(f"oft-cayley{at}", "OFTConfig", cayley, **oft)
    for share in (False, True):
        bound = {"oft_block_size": 4, "coft": True, "eps": 0.5, "block_share": share}
        case(f"oft-bounded-{share}{at}", "OFTConfig", bound, exact=1e-6, **oft)
unnamed = {"targets": ("codes",), "several": False, "variants": "oft"}
case("oft-unnamed", "OFTConfig", {"oft_block_size": 4, "block_share": True}, **TURNED, **unnamed)
for at, more in (("", {}), ("-conv", {"targets": ("conv",)})):
    case(f"boft{at}", "BOFTConfig", {"boft_block_size": 6}, **TURNED, **more)
    case(
        f"boft-count{at}",
        "BOFTConfig",
        {"boft_block_size": 0, "boft_block_num": 3},
        **TURNED,
        **more,
    )
    case(f"hra{at}", "HRAConfig", {"r": 5}, **TURNED, **more)
    case(f"hra-orthogonal{at}", "HRAConfig", {"r": 4, "apply_GS": True}, **TURNED, **more)
case("miss", "MissConfig", {"r": 7})
case("miss-even", "MissConfig", {"r": 4})
case("miss-mini", "MissConfig", {"r": 5, "mini_r": 6, "init_weights": "mini"})
case("bat", "MissConfig", {"r": 6, "init_weights": "bat"}, **TURNED)
for kind in ("road_1", "road_2", "road_4"):
    options = {"variant": kind, "group_size": 6}
    case(f"road-{kind}", "RoadConfig", options, **TURNED, targets=("tall", "square"))
    case(
        f"road-{kind}-none", "RoadConfig", {**options, "group_size": 4}, **TURNED, targets=("wide",)
    )
for at, more in (
    ("", {}),
    ("-conv1d", {"targets": CONV1D, "build": gpt2}),
    ("-conv", {"targets": ("conv",)}),
    ("-embedding", {"targets": ("embed_tokens",)}),
):
    case(f"hira{at}", "HiraConfig", {"r": 3}, lora=NEAR, **more)

case(
    "boft-stages",
    "BOFTConfig",
    {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    **TURNED,
    targets=("wide",),
)
case("boft-three", "BOFTConfig", {"boft_block_size": 2, "boft_n_butterfly_factor": 3}, **TURNED)
case(
    "boft-stages-conv",
    "BOFTConfig",
    {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 2},
    **TURNED,
    targets=("conv",),
)
case("shira", "ShiraConfig", {"r": 3}, lora=NEAR)
case("c3a", "C3AConfig", {"block_size": 6}, lora=NEAR, exact=1e-8)
case(
    "c3a-pattern",
    "C3AConfig",
    {"block_size": 12, "block_size_pattern": {"square": 8}},
    lora=NEAR,
    exact=1e-8,
)
case("delora", "DeloraConfig", {"r": 4, "delora_lambda": 3})
case("delora-flat", "DeloraConfig", {"r": 4, "delora_lambda": 3}, size=1e-6, exact=1e-11)
for at, more in (("", {}), ("-conv1d", {"targets": CONV1D, "build": gpt2})):
    case(f"gralora{at}", "GraloraConfig", {"r": 4, "gralora_k": 2, "alpha": 9}, **more)
    hybrid = {"r": 6, "gralora_k": 3, "hybrid_r": 2}
    case(f"gralora-hybrid{at}", "GraloraConfig", hybrid, **more)
    bank = {"r": 3, "vector_length": 4, "num_vectors": 9, "topk": 3}
    case(f"vblora{at}", "VBLoRAConfig", bank, **more)
    case(
        f"vblora-topk{at}",
        "VBLoRAConfig",
        {**bank, "save_only_topk_weights": True},
        **more,
        exact=1e-12,
    )
case("ln_tuning", "LNTuningConfig", {}, lora=NEVER, several=False, targets=("norm",))
case(
    "ln_tuning-all",
    "LNTuningConfig",
    {},
    lora=NEVER,
    several=False,
    targets=("norm", "conv", "tall", "embed_tokens", "wide"),
)
case("beft", "BeftConfig", {}, lora=NEVER, targets=("tall", "square"))

case("supertuning", "SupertuningConfig", {"sparsity": 0.9}, lora=NEAR)
hybrid = {"sparsity": 0.8, "r": 3, "lora_alpha": 5}
case("supertuning-lora", "SupertuningConfig", hybrid, lora=NEAR)
for at, more in (("", {}), ("-conv1d", {"targets": CONV1D, "build": gpt2})):
    one = {"r": 3, "theta_d_length": 40, "save_indices": True}
    case(f"unilora{at}", "UniLoraConfig", one, **more)

for at, more in (("", {}), ("-conv1d", {"targets": CONV1D, "build": gpt2})):
    case(f"waveft{at}", "WaveFTConfig", {"n_frequency": 9}, **more)
    case(f"waveft-plain{at}", "WaveFTConfig", {"n_frequency": 9, "use_idwt": False}, **more)
for order in range(2, 11):
    options = {"n_frequency": 500, "wavelet_family": f"db{order}", "scaling": 0.3}
    case(f"waveft-{order}", "WaveFTConfig", {**options, "random_loc_seed": order}, exact=1e-11)

for at, more in (("", {}), ("-conv1d", {"targets": CONV1D, "build": gpt2})):
    for method in ("relu", "qr"):
        options = {"r": 3, "decomposition_method": method, "init_scale": 9.0}
        options["fan_in_fan_out"] = bool(at)  # PEFT forgets to say so for a second one
        case(f"deft-{method}{at}", "DeftConfig", options, lora=NEAR, exact=2e-6, **more)
        more_options = {**options, "para": True}
        case(f"deft-{method}-para{at}", "DeftConfig", more_options, lora=NEAR, exact=2e-6, **more)
case("deft-alpha", "DeftConfig", {"r": 3, "alpha": 6.0}, lora=NEAR, exact=2e-6)

for kind in ("lora", "vector", "constant", "none"):
    for bias in ("lora", "vector", "none"):
        scalars = {"lora": "constant", "vector": "vector"}.get(bias, "none")
        options = {"r": 3, "config_A_B": kind, "config_C": bias, "config_D_E": scalars}
        if (kind, bias) != ("none", "none"):
            targets = LINEAR if bias == "none" else ("tall", "square")
            case(f"glora-{kind}-{bias}", "GloraConfig", options, lora=NEAR, targets=targets)

# Beside a bias that is not there its terms are zeros.
case("glora-unbiased", "GloraConfig", {"r": 3, "config_C": "vector"}, lora=NEAR, targets=("wide",))


SEQUENCES = ("sequence", "point")
for name, options in (
    ("loha", {"r": 3, "alpha": 5}),
    ("loha-effective", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    ("lokr", {"r": 3, "alpha": 5}),
    ("lokr-factors", {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4}),
    ("lokr-whole-factors", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 12}),
    ("lokr-effective", {"r": 1, "alpha": 5, "use_effective_conv2d": True}),
):
    kind, bound = ("LoHaConfig", 1e-7) if "loha" in name else ("LoKrConfig", 1e-13)
    for at, targets in (("", LINEAR), ("-conv", ("conv",)), ("-conv1d", SEQUENCES)):
        if at == "-conv1d" and name == "lokr-effective":
            continue  # PEFT's merge of it fails
        more = {"variants": name[:4], "targets": targets, "exact": bound}
        case(f"{name}{at}", kind, options, **more)


for at, more in (("", {}), ("-conv1d", {"targets": CONV1D, "build": gpt2})):
    turned = {"fan_in_fan_out": bool(at)}  # PEFT forgets to say so for a second one
    case(f"tinylora{at}", "TinyLoraConfig", {"u": 5, "r": 3, **turned}, **more)
    for tying in (0.4, 1.0):
        options = {"r": 2, "weight_tying": tying, "projection_seed": 7, **turned}
        case(f"tinylora-{tying}{at}", "TinyLoraConfig", options, **more)
one = {"u": 3, "r": 2, "save_projection": False}
case("tinylora-drawn", "TinyLoraConfig", one, targets=("wide",), several=False, exact=1e-6)
case("tinylora-embedding", "TinyLoraConfig", {}, targets=("embed_tokens",))


for depth, function in ((0, "relu"), (1, "tanh"), (3, "silu"), (2, "sigmoid"), (1, "leaky_relu")):
    options = {"r": 3, "depth": depth, "act_fn": function, "scaling": 1.7}
    case(f"peanut-{function}", "PeanutConfig", options, lora=NEAR)
case("osf", "OSFConfig", {}, lora=NEAR, exact=2e-6, several=False)
case("osf-few", "OSFConfig", {"effective_rank": 20}, lora=NEAR, exact=2e-6, several=False)


class Diagonal:
    """What PEFT's extension for BOFT does, which only a GPU has."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    return partial(_trained, monkeypatch)


def _trained(
    monkeypatch: pytest.MonkeyPatch,
    chosen: Case,
    folder: Path,
    dtype: torch.dtype,
    count: int = 1,
) -> Any:
    """Write a base and adapters on it; return the model that PEFT has them on."""
    import peft

    if chosen.options.get("boft_n_butterfly_factor", 1) > 1:
        monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Diagonal)
    torch.manual_seed(3)
    model = chosen.build().to(dtype)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "base")
    else:
        (folder / "base").mkdir()
        save_file(model.state_dict(), folder / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def settings() -> Any:
            return getattr(peft, chosen.config)(
                target_modules=list(chosen.targets), **chosen.options
            )

        made = peft.get_peft_model(model, settings(), "a0")
        for index in range(1, count):
            made.add_adapter(f"a{index}", settings())
        made.base_model.set_adapter([f"a{index}" for index in range(count)])
        for name, parameter in made.named_parameters():
            if any(f".a{index}" in name for index in range(count)):
                parameter.data += chosen.size * torch.randn_like(parameter)
        made.save_pretrained(folder / "adapters")
    return made


def tensors_of(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    if not hasattr(model, "save_pretrained"):
        return {name: value.double() for name, value in model.state_dict().items()}
    model.save_pretrained(folder)
    return loaded(folder)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}


def merged(made: Any, folder: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tensors_of(made.merge_and_unload(adapter_names=names), folder)


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any], bound: float) -> float:
    assert found.keys() == wanted.keys()
    worst = 0.0
    for name, value in wanted.items():
        error = float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-9))
        assert error <= bound, (name, error)
        worst = max(worst, error)
    return worst


def changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_it_merges_as_peft_does(
    name: str, dtype: torch.dtype, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    chosen = CASES[name]
    made = trained(chosen, tmp_path, dtype)
    base, adapter = tmp_path / "base", tmp_path / "adapters" / "a0"
    found = {module["variant"] for module in loratool.inspect(adapter).as_json()["modules"]}
    assert found == {chosen.variants or name.partition("-")[0]}
    findings = [f for f in loratool.validate(adapter, base=base) if f.severity != "info"]
    assert [str(f) for f in findings] == []
    loratool.merge(base, [adapter], tmp_path / "out")
    assert loratool.verify(tmp_path / "out", base=base, adapters=[adapter]) == ()
    before = loaded(base)
    wanted = merged(made, tmp_path / "wanted")
    assert bool(changed(before, wanted)) is chosen.changes
    # PEFT rounds its delta to the dtype of the weight, then the sum.
    bound = {torch.float64: chosen.exact, torch.float32: 3e-6, torch.bfloat16: 2**-6}[dtype]
    compare(loaded(tmp_path / "out"), wanted, bound)


@pytest.mark.parametrize("name", [name for name, each in CASES.items() if each.several])
def test_several_merge_as_peft_does(name: str, tmp_path: Path, trained: Callable[..., Any]) -> None:
    chosen = CASES[name]
    made = trained(chosen, tmp_path, torch.float64, count=2)
    adapters = [tmp_path / "adapters" / f"a{index}" for index in range(2)]
    loratool.merge(tmp_path / "base", adapters, tmp_path / "out")
    wanted = merged(made, tmp_path / "wanted", ["a0", "a1"])
    compare(loaded(tmp_path / "out"), wanted, 4 * chosen.exact)


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_a_share_or_is_refused(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    chosen = CASES[name]
    made = trained(chosen, tmp_path, torch.float64)
    base, adapter = tmp_path / "base", tmp_path / "adapters" / "a0"
    if not chosen.weighs:
        with pytest.raises(UnsupportedError, match=r"a weight of 0\.3 means nothing") as failure:
            loratool.merge(base, [adapter], tmp_path / "out", weights=[0.3])
        assert "--to-lora" in (failure.value.hint or "")
        return
    loratool.merge(base, [adapter], tmp_path / "out", weights=[0.3])
    before = loaded(base)
    whole = merged(made, tmp_path / "wanted")
    wanted = {name: value + 0.3 * (whole[name] - value) for name, value in before.items()}
    compare(loaded(tmp_path / "out"), wanted, 2 * chosen.exact)


@pytest.mark.parametrize(
    "name", [name for name, each in CASES.items() if each.lora != NEVER and each.changes]
)
def test_a_plain_lora_of_it_merges_to_the_same(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    from peft import PeftModel

    chosen = CASES[name]
    made = trained(chosen, tmp_path, torch.float64)
    base, adapter = tmp_path / "base", tmp_path / "adapters" / "a0"
    more = {} if chosen.lora == EXACT else {"rank": 96}
    loratool.convert(adapter, "peft", tmp_path / "plain", base=base, to_lora=True, **more)
    wanted = merged(made, tmp_path / "wanted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = chosen.build().double()
        if hasattr(model, "save_pretrained"):
            model = type(model).from_pretrained(base, dtype=torch.float64)
        else:
            model.load_state_dict(load_file(base / "model.safetensors"))
        plain = PeftModel.from_pretrained(model, str(tmp_path / "plain"))
        found = tensors_of(plain.merge_and_unload(), tmp_path / "plain merged")
    compare(found, wanted, max(1e-6, chosen.exact))
    loratool.merge(base, [tmp_path / "plain"], tmp_path / "out")
    compare(loaded(tmp_path / "out"), wanted, max(1e-6, chosen.exact))
    written = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float64}


ALONE = ("lokr-conv1d", "lokr-whole-factors-conv1d")
"""What only PEFT means by its tensors, whose A and B they tell alone."""


def test_without_a_base_nothing_is_guessed(tmp_path: Path, trained: Callable[..., Any]) -> None:
    for name in CASES:
        folder = tmp_path / name
        folder.mkdir()
        made = trained(CASES[name], folder, torch.float32)
        if name in ALONE:
            report = loratool.convert(folder / "adapters" / "a0", "peft", folder / "plain")
            assert report.relative_error < 1e-6, name
            loratool.merge(folder / "base", [folder / "plain"], folder / "out")
            bound = 1e-5  # of float32
            assert compare(loaded(folder / "out"), merged(made, folder), bound) < bound, name
            continue
        with pytest.raises(LoratoolError) as failure:
            loratool.convert(folder / "adapters" / "a0", "peft", folder / "plain")
        assert failure.value.hint, name
        assert not (folder / "plain").exists()


@pytest.mark.parametrize("name", CASES)
def test_it_computes_with_tensors_as_with_arrays(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    trained(CASES[name], tmp_path, torch.float64)
    base = open_model(tmp_path / "base")
    adapter = with_places(open_adapter(tmp_path / "adapters" / "a0"), base)

    def read(stored: StoredTensor) -> torch.Tensor:
        return torch.from_numpy(decode(stored))

    for site in adapter.sites:
        shape = base.place(site.module).shape if site.variant.has_matrix else ()
        if site.variant.has_factors:
            width = site.variant.width(site, shape)
            arrays = site.variant.factors(site, decode, width)
            for one, two in zip(arrays, site.variant.factors(site, read, width), strict=True):
                assert np.allclose(one, two.numpy(), atol=1e-12)
            assert arrays[0].shape[0] == arrays[1].shape[1] == site.variant.factor_rank(site)
            assert arrays[0].shape[1] == width
            assert width == np.prod(shape[1:]) or site.module == "embed_tokens"
        elif site.variant.has_change:
            weight = np.random.default_rng(1).standard_normal(shape)
            values = {slot: decode(stored) for slot, stored in site.slots.items()}
            change = site.variant.change(site, values, shape, 1.0)
            whole = change.changed(weight, 0, 0)
            assert np.allclose(whole - weight, change.difference(weight, 0, 0), atol=1e-13)
            turned = {slot: torch.from_numpy(value) for slot, value in values.items()}
            other = site.variant.change(site, turned, shape, 1.0)
            found = other.changed(torch.from_numpy(weight), 0, 0).numpy()
            assert np.allclose(whole, found, atol=1e-12)
            steps = [grain or side for grain, side in zip(change.grain, shape[:2], strict=True)]
            for row in range(0, shape[0], steps[0]):
                for column in range(0, shape[1], steps[1]):
                    cut = slice(row, row + steps[0]), slice(column, column + steps[1])
                    part = change.changed(weight[cut], row, column)
                    assert np.allclose(part, whole[cut], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("is_tied", [False, True])
def test_trained_tokens_merge_as_peft_does(is_tied: bool, tmp_path: Path) -> None:
    import peft
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, vocab_size=20, tie_word_embeddings=is_tied
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=[7, 2, 19]))
        for name, parameter in made.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.data = torch.randn_like(parameter)
        made.save_pretrained(tmp_path / "adapter")
    findings = loratool.validate(tmp_path / "adapter", base=tmp_path / "base")
    assert [str(f) for f in findings if f.severity != "info"] == []
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    wanted = merged(made, tmp_path / "wanted")
    assert changed(loaded(tmp_path / "base"), wanted)
    compare(loaded(tmp_path / "out"), wanted, 0.0)


SEEDED = [name for name in CASES if "-seed" in name and "conv1d" not in name]


@pytest.mark.parametrize("name", SEEDED)
def test_modules_that_are_left_out_have_their_share_in_projections(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    chosen = CASES[name]
    made = trained(chosen, tmp_path, torch.float64)
    base, adapter = tmp_path / "base", tmp_path / "adapters" / "a0"
    is_drawn = "fourier" not in name
    if is_drawn:
        with pytest.raises(UnsupportedError, match="the largest of all") as failure:
            loratool.merge(base, [adapter], tmp_path / "out", skip=["tall"])
        assert "-w MODULE=0" in (failure.value.hint or "")
    loratool.merge(base, [adapter], tmp_path / "out", weights=["tall=0"])
    wanted = merged(made, tmp_path / "wanted")
    wanted["tall.weight"] = loaded(base)["tall.weight"]
    compare(loaded(tmp_path / "out"), wanted, chosen.exact)


@pytest.mark.parametrize("name", ["fourierft-all", "waveft-2"])
def test_many_entries_are_added_in_pieces(
    name: str, tmp_path: Path, trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_variants, "CHUNK", 7)
    made = trained(CASES[name], tmp_path, torch.float64)
    loratool.merge(tmp_path / "base", [tmp_path / "adapters" / "a0"], tmp_path / "out")
    compare(loaded(tmp_path / "out"), merged(made, tmp_path / "wanted"), CASES[name].exact)


DISTINCT = [
    *("vera", "vera-seed", "pvera", "randlora", "randlora-seed", "fourierft", "waveft"),
    *("oft", "oft-embedding", "oft-conv", "boft", "boft-three", "hra", "miss", "miss-mini"),
    *("bat", "road-road_1", "hira", "hira-conv", "hira-embedding", "shira", "c3a", "delora"),
    *("gralora-hybrid", "vblora", "vblora-topk", "ln_tuning-all", "beft", "supertuning-lora"),
    "unilora",
    "deft-qr",
    "glora-lora-lora",
    "glora-vector-vector",
    "tinylora",
    "peanut-tanh",
    "osf",
]


UNTOLD = {
    **dict.fromkeys(
        ("vera-seed", "randlora", "randlora-seed", "fourierft", "waveft", "oft", "oft-embedding"),
        "adapter_config",
    ),
    **dict.fromkeys(("oft-conv", "hra", "road-road_1", "gralora-hybrid"), "adapter_config"),
    **dict.fromkeys(
        ("vblora", "supertuning-lora", "deft-qr", "tinylora", "peanut-tanh"), "adapter_config"
    ),
    "miss-mini": "shape",
}


def is_spare(key: str, name: str, wrong: torch.Tensor | None) -> bool:
    """Whether what is left is an adapter too: of fewer modules, ranks, entries or copies."""
    leaf = key.removesuffix(".weight").rpartition(".")[2]
    if wrong is None:
        is_only = leaf in ("oft_R", "oft_embedding_R", "hra_u", "miss_block", "c3a_kernel")
        is_whole = leaf.endswith(("_spectrum", "bias")) or "ln_tuning" in key
        return is_only or is_whole or leaf in ("randlora_A", "randlora_B")
    return wrong.numel() > 0 and leaf in ("hra_u", "fourierft_spectrum", "waveft_spectrum")


@pytest.mark.parametrize("name", DISTINCT)
def test_a_tensor_that_is_missing_or_cut_is_an_error(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    trained(CASES[name], tmp_path, torch.float32)
    adapter = tmp_path / "adapters" / "a0"
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    count = 0
    for key, value in tensors.items():
        shapes = [None, value[..., :-1].clone(), value[None].clone(), value[:0].clone()]
        for wrong in shapes:
            others = {k: v for k, v in tensors.items() if k != key}
            save_file(others if wrong is None else {**others, key: wrong}, file)
            loratool.validate(adapter, base=tmp_path / "base")
            count += 1
            output = tmp_path / f"out{count}"
            with suppress(LoratoolError):
                loratool.merge(tmp_path / "base", [adapter], output)
                assert is_spare(key, name, wrong), (key, wrong if wrong is None else wrong.shape)


@pytest.mark.parametrize("name", DISTINCT)
def test_without_a_configuration_it_is_the_same_or_refused(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    made = trained(CASES[name], tmp_path, torch.float64)
    adapter = tmp_path / "adapters" / "a0"
    (adapter / "adapter_config.json").unlink()
    if name in UNTOLD:
        with pytest.raises(LoratoolError, match=UNTOLD[name]):
            loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
        return
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    compare(loaded(tmp_path / "out"), merged(made, tmp_path / "wanted"), CASES[name].exact)


@pytest.mark.parametrize("name", DISTINCT)
def test_another_base_is_refused(name: str, tmp_path: Path, trained: Callable[..., Any]) -> None:
    trained(CASES[name], tmp_path, torch.float32)
    adapter, file = tmp_path / "adapters" / "a0", tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        if value.ndim > 1:
            tensors[key] = value[:-1, :-1].clone()
        elif key.endswith("bias") or "norm" in key:
            tensors[key] = value[:-1].clone()
    save_file(tensors, file)
    if name in ("fourierft", "waveft", "shira", "ln_tuning-all"):
        return  # they fit many
    findings = loratool.validate(adapter, base=tmp_path / "base")
    assert any(finding.is_error for finding in findings)
    with pytest.raises(LoratoolError):
        loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")


OPTIONS = {
    "vera-seed": ("projection_prng_key", "seven"),
    "randlora": ("randlora_alpha", [3]),
    "fourierft": ("scaling", "150"),
    "waveft": ("wavelet_family", "sym4"),
    "oft": ("num_cayley_neumann_terms", 2.5),
    "hra": ("apply_GS", "no"),
    "road-road_1": ("variant", "road_3"),
    "road-road_2": ("group_size", 7),
    "gralora": ("alpha", "many"),
    "vblora": ("topk", None),
    "supertuning-lora": ("lora_alpha", "x"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_impossible_option_is_told(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    trained(CASES[name], tmp_path, torch.float32)
    adapter = tmp_path / "adapters" / "a0"
    key, value = OPTIONS[name]
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, key: value}))
    if value is None:
        loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")  # the default
        return
    with pytest.raises(LoratoolError, match=f"{key}|wavelet"):
        loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("XLORA", "router"),
        ("POLY", "router"),
        ("LILY", "router"),
        ("ADAPTION_PROMPT", "prompts"),
        ("PREFIX_TUNING", "prefix"),
        ("CPT", "prompt"),
        ("CARTRIDGE", "cache"),
        ("PSOFT", "signs"),
        ("FROD", "directions"),
        ("ADAMSS", "clusters"),
    ],
)
def test_what_has_no_fixed_weights_is_refused_by_name(
    kind: str, words: str, tmp_path: Path
) -> None:
    save_file(
        {"base_model.model.a.lora_A.weight": torch.ones(2, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(UnsupportedError, match=f"{kind}.*{words}"):
        loratool.inspect(tmp_path)


def test_what_only_the_live_model_tells_can_be_saved_with_it(
    tmp_path: Path, trained: Callable[..., Any]
) -> None:
    from peft import PeftModel

    options = {"r": 3, "save_projection": False}
    made = trained(Case("TinyLoraConfig", options), tmp_path, torch.float64)
    base, adapter = tmp_path / "base", tmp_path / "adapters" / "a0"
    with pytest.raises(UnsupportedError, match="place in the live model") as failure:
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "save_projection true" in (failure.value.hint or "")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "save_projection": True}))
    model = Toy().double()
    model.load_state_dict(load_file(base / "model.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(model, str(adapter)).save_pretrained(tmp_path / "again")
    loratool.merge(base, [tmp_path / "again"], tmp_path / "out")
    compare(loaded(tmp_path / "out"), merged(made, tmp_path / "wanted"), 1e-6)


def test_projections_of_another_seed_are_told(tmp_path: Path, trained: Callable[..., Any]) -> None:
    trained(CASES["tinylora"], tmp_path, torch.float32)
    config = tmp_path / "adapters" / "a0" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "projection_seed": 1}))
    with pytest.raises(AdapterError, match="not drawn by the seed"):
        loratool.merge(tmp_path / "base", [config.parent], tmp_path / "out")


@pytest.mark.parametrize("name", DISTINCT)
def test_a_scale_multiplies_its_change_or_is_refused(
    name: str, tmp_path: Path, trained: Callable[..., Any]
) -> None:
    trained(CASES[name], tmp_path, torch.float64)
    base, adapter = tmp_path / "base", tmp_path / "adapters" / "a0"
    with suppress(UnsupportedError, AdapterError):
        loratool.rescale(adapter, tmp_path / "half", scale=0.5)
        loratool.merge(base, [adapter], tmp_path / "one", weights=[0.5])
        loratool.merge(base, [tmp_path / "half"], tmp_path / "other")
        compare(loaded(tmp_path / "other"), loaded(tmp_path / "one"), 1e-12)
        return
    assert name not in ("vera", "fourierft", "delora", "miss", "c3a", "shira", "gralora-hybrid")
