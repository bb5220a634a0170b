"""Variants of LoRA as factors and as dense deltas, against the libraries that define them."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from libraries import Library, on_libraries
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn

from loratool.math.dense_variants import (
    boft_delta,
    diag_oft_delta,
    dora_delta,
    glora_delta,
    ia3_delta,
    is_old_glora,
)
from loratool.math.exact_variants import (
    fold_mid,
    hadamard_factors,
    hadamard_rank,
    kronecker_factors,
    kronecker_rank,
    vera_factors,
)

pytestmark = pytest.mark.slow

ALPHA = 2.5
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
"""LyCORIS inverts in float32 whatever the weights are."""

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "conv 1x1": lambda i, o: nn.Conv2d(i, o, 1),
    "conv 3x3": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
    "conv 2x3": lambda i, o: nn.Conv2d(i, o, (2, 3)),
    "conv1d": lambda i, o: nn.Conv1d(i, o, 3),
    "conv3d": lambda i, o: nn.Conv3d(i, o, (1, 2, 3)),
}


@pytest.fixture
def lycoris() -> Iterator[Any]:
    """LyCORIS' modules; its warnings are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lycoris")
        yield importlib.import_module("lycoris.modules")


def random_module(factory: Any, layer: nn.Module, **options: Any) -> Any:
    """A module of LyCORIS for a layer, both float64, with random parameters."""
    module = factory("x", layer, alpha=ALPHA, **options).double().requires_grad_(False)
    layer.double()
    for parameter in module.parameters():
        parameter.normal_()
    return module.eval()


def tensors_of(module: Any) -> dict[str, Tensor]:
    """What the module would store, by the ends of the keys."""
    return {key: value.detach() for key, value in module.state_dict().items()}


def base_weight(module: Any) -> Tensor:
    weight: Tensor = module.org_module[0].weight.detach()
    return weight


def difference(module: Any) -> Tensor:
    """The dense delta that the module's forward applies, seen through one-hot inputs."""
    layer = module.org_module[0]
    shape = layer.weight.shape
    count = math.prod(shape[1:])
    hot = torch.eye(count, dtype=layer.weight.dtype).reshape(count, *shape[1:])
    if len(shape) > 2:  # no padding, so that each output is one place
        module.kw_dict = {**module.kw_dict, "padding": 0}
        layer.padding = (0,) * (len(shape) - 2)
    with torch.no_grad():
        out = module(hot) - module.org_forward(hot)
    delta: Tensor = out.flatten(1).mT.reshape(shape)
    return delta


def product(factors: tuple[Tensor, Tensor], scale: float, like: Tensor) -> Tensor:
    up, down = factors
    assert up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
    return (up @ down * scale).reshape(like.shape)


def shapes(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


# LoCon


@pytest.mark.parametrize("layer", ["conv 3x3", "conv 2x3", "conv1d", "conv3d"])
@on_libraries
def test_mid_folds_into_down(library: Library, lycoris: Any, layer: str) -> None:
    module = random_module(lycoris.LoConModule, LAYERS[layer](5, 6), lora_dim=4, use_tucker=True)
    stored = tensors_of(module)
    names = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
    factors = library(fold_mid, *(stored[name] for name in names))
    assert factors[0].shape[1] == 4
    scale = float(stored["alpha"]) / stored["lora_down.weight"].shape[0]
    expected = difference(module)
    torch.testing.assert_close(product(factors, scale, expected), expected, **EXACT)


# LoHa


def loha_of(stored: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    names = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    return tuple(stored.get(f"hada_{name}") for name in names)


def check_loha(
    library: Library, tensors: tuple[Tensor | None, ...], scale: float, expected: Tensor
) -> None:
    factors = library(hadamard_factors, *tensors)
    torch.testing.assert_close(product(factors, scale, expected), expected, **EXACT)
    sizes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
    assert hadamard_rank(*sizes) == factors[0].shape[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("use_tucker", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("layer", LAYERS)
@on_libraries
def test_loha_of_lycoris(
    library: Library, lycoris: Any, layer: str, rank: int, use_tucker: bool
) -> None:
    module = random_module(
        lycoris.LohaModule, LAYERS[layer](7, 6), lora_dim=rank, use_tucker=use_tucker
    )
    stored = tensors_of(module)
    scale = float(stored["alpha"]) / stored["hada_w1_b"].shape[0]
    check_loha(library, loha_of(stored), scale, difference(module))


@on_libraries
def test_loha_of_two_ranks(library: Library) -> None:
    w1_a, w1_b = torch.randn(9, 2).double(), torch.randn(2, 8).double()
    w2_a, w2_b = torch.randn(9, 3).double(), torch.randn(3, 8).double()
    check_loha(library, (w1_a, w1_b, w2_a, w2_b, None, None), 1.0, (w1_a @ w1_b) * (w2_a @ w2_b))
    assert hadamard_rank(*shapes(w1_a, w1_b, w2_a, w2_b)) == 6


@on_libraries
def test_loha_with_one_core_is_refused(library: Library) -> None:
    half = (torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="only one half"):
        library(hadamard_factors, *half, *half, t1=torch.ones(2, 2, 3, 3))


# LoKr


def lokr_of(stored: Mapping[str, Tensor]) -> tuple[Any, Any, Tensor | None]:
    def half(name: str) -> Any:
        if f"lokr_{name}" in stored:
            return stored[f"lokr_{name}"]
        return stored[f"lokr_{name}_a"], stored[f"lokr_{name}_b"]

    return half("w1"), half("w2"), stored.get("lokr_t2")


def lokr_scale(stored: Mapping[str, Tensor], rank: int | None = None) -> float:
    """LyCORIS knows no rank where both are full, and uses one; PEFT takes its configuration's."""
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if rank is None and name in stored:
            rank = stored[name].shape[0]
    return 1.0 if rank is None else float(stored["alpha"]) / rank


def check_lokr(
    library: Library, stored: Mapping[str, Tensor], scale: float, expected: Tensor
) -> None:
    halves = lokr_of(stored)
    up, down = library(kronecker_factors, *halves)
    torch.testing.assert_close(product((up, down), scale, expected), expected, **EXACT)
    sizes: Any = [
        tuple(shapes(*half)) if isinstance(half, tuple) else None if half is None else half.shape
        for half in halves
    ]
    assert kronecker_rank(*sizes) == up.shape[1] <= min(up.shape[0], down.shape[1])


LOKR: dict[str, tuple[dict[str, Any], set[str]]] = {
    "w2 factored": ({"lora_dim": 2}, {"w1", "w2_a", "w2_b"}),
    "decompose_both": ({"lora_dim": 2, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    "full": ({"lora_dim": 64}, {"w1", "w2"}),
    "full_matrix": ({"lora_dim": 2, "full_matrix": True}, {"w1", "w2"}),
    "w1 factored": (
        {"lora_dim": 3, "decompose_both": True, "unbalanced_factorization": True},
        {"w1_a", "w1_b", "w2"},
    ),
}


@pytest.mark.parametrize("use_tucker", [False, True])
@pytest.mark.parametrize("kind", LOKR)
@pytest.mark.parametrize("layer", LAYERS)
@on_libraries
def test_lokr_of_lycoris(
    library: Library, lycoris: Any, layer: str, kind: str, use_tucker: bool
) -> None:
    options, names = LOKR[kind]
    sizes = (36, 32) if kind == "w1 factored" else (35, 24)
    module = random_module(
        lycoris.LokrModule, LAYERS[layer](*sizes), use_tucker=use_tucker, **options
    )
    stored = tensors_of(module)
    has_core = use_tucker and "w2_a" in names and layer not in ("linear", "conv 1x1")
    found = {key.removeprefix("lokr_") for key in stored if key.startswith("lokr_")}
    assert found == (names | {"t2"} if has_core else names)
    if kind == "full":
        stored["alpha"] = torch.tensor(1e4)
    check_lokr(library, stored, lokr_scale(stored), difference(module))


@on_libraries
def test_lokr_takes_the_smaller_side(library: Library) -> None:
    wide, tall = (2, 9), (7, 3)
    assert kronecker_rank(wide, tall) == 2 * 3
    assert kronecker_rank(((2, 1), (1, 9)), tall) == 3
    assert kronecker_rank(((2, 5), (5, 9)), ((7, 5), (5, 3))) == 2 * 3
    first, second = (torch.randn(2, 5), torch.randn(5, 9)), (torch.randn(7, 5), torch.randn(5, 3))
    up, down = library(kronecker_factors, first, second)
    assert up.shape == (14, 6) and down.shape == (6, 27)
    expected = torch.kron(first[0] @ first[1], second[0] @ second[1])
    torch.testing.assert_close(up @ down, expected, rtol=1e-4, atol=1e-4)


@on_libraries
def test_lokr_with_a_core_and_a_full_half_is_refused(library: Library) -> None:
    with pytest.raises(ValueError, match="factored half"):
        library(kronecker_factors, torch.ones(2, 2), torch.ones(2, 2, 3, 3), torch.ones(1, 1, 3, 3))


# LyCORIS' variants that need the base


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@on_libraries
def test_ia3_of_lycoris(library: Library, lycoris: Any, layer: str, on_input: bool) -> None:
    module = random_module(lycoris.IA3Module, LAYERS[layer](5, 6), train_on_input=on_input)
    stored = tensors_of(module)
    assert bool(stored["on_input"]) == on_input
    found = library(ia3_delta, base_weight(module), stored["weight"], on_input)
    torch.testing.assert_close(found, difference(module), **EXACT)


@pytest.mark.parametrize("sizes", [(5, 6), (6, 5), (5, 5), (2, 2)])
@pytest.mark.parametrize("layer", LAYERS)
@on_libraries
def test_glora(library: Library, lycoris: Any, layer: str, sizes: tuple[int, int]) -> None:
    module = random_module(lycoris.GLoRAModule, LAYERS[layer](*sizes), lora_dim=2)
    stored = tensors_of(module)
    parts = [stored[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2")]
    weight = base_weight(module)
    assert not is_old_glora(weight.shape, *shapes(*parts))
    scale = float(stored["alpha"]) / parts[0].shape[1]
    found = library(glora_delta, weight, *parts) * scale
    torch.testing.assert_close(found, difference(module), **EXACT)


@on_libraries
def test_glora_with_a_core(library: Library) -> None:
    weight = torch.randn(6, 5, 3, 3).double()
    zero = torch.zeros(5, 2).double()
    b1, b2, bm = torch.randn(6, 2, 1, 1), torch.randn(2, 5, 1, 1), torch.randn(2, 2, 3, 3)
    parts = [part.double() for part in (b1, b2, bm)]
    found = library(glora_delta, weight, zero, zero.mT, *parts)
    expected = torch.einsum("omxx,mnhw,nixx->oihw", parts[0], parts[2], parts[1])
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(("out", "size"), [(6, 5), (5, 6), (5, 5), (3, 5), (5, 3)])
@on_libraries
def test_old_glora(library: Library, out: int, size: int) -> None:
    """The formula that ComfyUI uses for it."""
    weight = torch.randn(out, size).double()
    a1, a2 = torch.randn(3, size).double(), torch.randn(size, 3).double()
    b1, b2 = torch.randn(3, size).double(), torch.randn(out, 3).double()
    parts = [a1, a2, b1, b2]
    assert is_old_glora(weight.shape, *shapes(*parts))
    expected = b2 @ b1 + weight @ a2 @ a1
    torch.testing.assert_close(library(glora_delta, weight, *parts), expected, **EXACT)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("name", ["DiagOFTModule", "ButterflyOFTModule"])
@pytest.mark.parametrize("layer", LAYERS)
@on_libraries
def test_rotations_of_lycoris(
    library: Library, lycoris: Any, layer: str, name: str, constraint: float, rescaled: bool
) -> None:
    module = random_module(
        getattr(lycoris, name),
        LAYERS[layer](5, 24),
        lora_dim=6,
        constraint=constraint,
        rescaled=rescaled,
    )
    module.float()
    module.org_module[0].float()
    module.oft_blocks.mul_(0.3)
    stored = tensors_of(module)
    blocks = stored["oft_blocks"]
    delta_of = diag_oft_delta if blocks.ndim == 3 else boft_delta
    assert name.startswith("Diag") or blocks.shape[0] > 1
    found = library(
        delta_of, base_weight(module), blocks, float(stored["alpha"]), stored.get("rescale")
    )
    torch.testing.assert_close(found, difference(module), **SINGLE)


@pytest.mark.parametrize("alpha", [1e-2, 1.0])
@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 3)])
@on_libraries
def test_oft_of_kohya(library: Library, shape: tuple[int, ...], alpha: float) -> None:
    """After the published ``merge_to`` of its ``networks/oft.py``."""
    weight, blocks = torch.randn(shape).double(), torch.randn(3, 4, 4).double()
    skew = blocks - blocks.mT
    norm = skew.norm()
    skew = skew * ((norm.clamp(max=alpha * 12) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(4).double()
    rotation = (eye + skew) @ (eye - skew).inverse()
    merged = torch.einsum("knm,kn...->km...", rotation, weight.reshape(3, 4, -1)).reshape(shape)
    found = library(diag_oft_delta, weight, blocks, alpha)
    torch.testing.assert_close(found, merged - weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("out_axis", [True, False])
@pytest.mark.parametrize("name", ["LoConModule", "LohaModule", "LokrModule"])
@pytest.mark.parametrize("layer", LAYERS)
@on_libraries
def test_dora_of_lycoris(
    library: Library, lycoris: Any, layer: str, name: str, out_axis: bool
) -> None:
    module = random_module(
        getattr(lycoris, name),
        LAYERS[layer](24, 24),
        lora_dim=2,
        weight_decompose=True,
        wd_on_out=out_axis,
    )
    module.dora_scale.normal_()
    stored = tensors_of(module)
    weight = base_weight(module)
    assert stored["dora_scale"].shape[0 if out_axis else 1] == 24
    scale = float(stored["alpha"]) / 2
    if name == "LohaModule":
        factors = library(hadamard_factors, *loha_of(stored))
    elif name == "LokrModule":
        factors = library(kronecker_factors, *lokr_of(stored))
    else:
        factors = stored["lora_up.weight"].flatten(1), stored["lora_down.weight"].flatten(1)
    delta = product(factors, scale, weight)
    found = library(dora_delta, weight, delta, stored["dora_scale"], out_axis)
    torch.testing.assert_close(found, difference(module), **EXACT)


@on_libraries
def test_dora_keeps_rows_of_zeros(library: Library) -> None:
    weight = torch.zeros(2, 3)
    weight[0] = 1
    found = library(
        dora_delta, weight, torch.zeros(2, 3), torch.tensor([3**0.5, 1.0]), out_axis=True
    )
    torch.testing.assert_close(found, torch.zeros(2, 3))


# PEFT


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self, size: int = 35, out: int = 24) -> None:
        super().__init__()
        self.linear = nn.Linear(size, out)
        self.pointwise = nn.Conv2d(size, out, 1)
        self.conv = nn.Conv2d(size, out, 3)
        self.conv1d = nn.Conv1d(size, out, 3)


def in_peft(config: Any, net: nn.Module | None = None) -> Any:
    """A model of PEFT, float64, with random parameters of the adapter."""
    net = (net or Net()).double().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_()
    return model.requires_grad_(False).eval()


def layer_of(model: Any, name: str) -> Any:
    return getattr(model.base_model.model, name)


def slots_of(layer: Any, *names: str) -> dict[str, Tensor]:
    found = {name: getattr(layer, name) for name in names}
    return {name: slot["default"] for name, slot in found.items() if "default" in slot}


def merged(layer: Any) -> tuple[Tensor, Tensor]:
    """Merge one layer and return what that adds to its weight and its bias."""
    base = layer.get_base_layer()
    before = base.weight.detach().clone(), base.bias.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()
    return base.weight.detach() - before[0], base.bias.detach() - before[1]


@pytest.mark.parametrize("name", ["linear", "pointwise", "conv", "conv1d"])
@pytest.mark.parametrize("effective", [False, True])
@on_libraries
def test_loha_of_peft(library: Library, name: str, effective: bool) -> None:
    config = LoHaConfig(r=2, alpha=3, target_modules=[name], use_effective_conv2d=effective)
    layer = layer_of(in_peft(config), name)
    stored = slots_of(layer, *layer.adapter_layer_names)
    check_loha(library, loha_of(stored), 3 / 2, layer.get_delta_weight("default"))


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize(
    ("name", "rank", "both"),
    [
        (name, rank, both)
        for name in ("linear", "pointwise", "conv", "conv1d")
        for rank, both in ((2, False), (2, True), (64, False))
        if (name, rank) != ("conv1d", 64)  # PEFT multiplies a full kernel along other axes
    ],
)
@on_libraries
def test_lokr_of_peft(library: Library, name: str, rank: int, both: bool, effective: bool) -> None:
    config = LoKrConfig(
        r=rank,
        alpha=3,
        target_modules=[name],
        decompose_both=both,
        use_effective_conv2d=effective,
    )
    layer = layer_of(in_peft(config), name)
    stored = slots_of(layer, *layer.adapter_layer_names)
    assert ("lokr_w2" in stored) == (rank == 64) and ("lokr_w1" in stored) == (not both)
    check_lokr(library, stored, 3 / rank, layer.get_delta_weight("default"))


@on_libraries
def test_vera_of_peft(library: Library) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(5, 9), nn.Linear(8, 6)

    model = in_peft(VeraConfig(r=3, target_modules=["small", "large"]), Two())
    for name in ("small", "large"):
        layer = layer_of(model, name)
        shared = layer.vera_A["default"], layer.vera_B["default"]
        vectors = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
        out, size = layer.get_base_layer().weight.shape
        factors = library(vera_factors, *vectors, *shared, out, size)
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(product(factors, 1.0, expected), expected, **EXACT)


@on_libraries
def test_vera_has_to_fit(library: Library) -> None:
    with pytest.raises(ValueError, match="too small"):
        library(
            vera_factors, torch.ones(4), torch.ones(2), torch.ones(2, 5), torch.ones(3, 2), 4, 5
        )


@pytest.mark.parametrize("name", ["linear", "pointwise", "conv"])
@on_libraries
def test_dora_of_peft(library: Library, name: str) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[name], use_dora=True)
    layer = layer_of(in_peft(config), name)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.normal_()
    weight = layer.get_base_layer().weight.clone()
    delta = layer.get_delta_weight("default")
    found = library(dora_delta, weight, delta, magnitude, out_axis=True)
    torch.testing.assert_close(found, merged(layer)[0], **EXACT)
