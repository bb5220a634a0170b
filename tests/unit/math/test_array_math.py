"""What arithmetic on arrays of any library promises beside its formulas."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from libraries import Library, on_libraries

from loratool.math.closeness import differing
from loratool.math.extraction import Leading, leading_part, spacing_squares, squared_norm
from loratool.math.lowrank import LowRank, stack
from loratool.math.namespace import array_namespace, beside, on_host, padded
from loratool.math.precision import Precision
from loratool.math.randomness import generator_for

BFLOAT16 = Precision(2.0**-7, 2.0**-126)
HALF = Precision(2.0**-10, 2.0**-14)


# ----------------------------------------------------------------- namespaces


def test_an_array_tells_its_namespace() -> None:
    assert array_namespace(np.ones(2), None, np.ones(3)) is np
    xp = array_namespace(torch.ones(2), torch.nn.Parameter(torch.ones(2)), None)
    assert isinstance(xp.concat([torch.ones(1)], axis=0), torch.Tensor)
    with pytest.raises(TypeError, match="Tensor"):
        array_namespace(np.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="list"):
        array_namespace([1.0])


def test_arrays_go_to_the_processor_and_back() -> None:
    tensor = torch.ones(2, 3, requires_grad=True)
    values = on_host(tensor)
    assert isinstance(values, np.ndarray)
    back = beside(values[::-1], tensor)
    assert isinstance(back, torch.Tensor) and torch.equal(back, tensor)
    assert beside(values, values) is values


@on_libraries
def test_padding_adds_zeros(library: Library) -> None:
    matrix = torch.randn(2, 3)
    expected = torch.nn.functional.pad(matrix, (0, 1, 0, 2))
    assert torch.equal(library(padded, matrix, 4, 4), expected)
    assert torch.equal(library(padded, matrix, 1, 2), matrix)


def test_arithmetic_on_numpy_arrays_loads_no_torch() -> None:
    """Nor array_api_compat.numpy, which is what drags numpy.f2py and numpy.testing along."""
    script = """
import sys
import numpy as np
from loratool.math import combining, dense_variants, exact_variants, extraction, factored
from loratool.math import closeness, similarity
from loratool.math.lowrank import LowRank
delta = LowRank(np.ones((9, 2)), np.eye(2, 7), 0.5)
found = factored.factor(delta)
found.truncated(1), found.squared_distance(delta), similarity.overlap(found, found, (1, 1))
generator = np.random.default_rng(0)
combining.combine("della", [delta, delta], [1, 2], combining.Settings(), generator)
extraction.leading_part(np.random.default_rng(1).standard_normal((300, 400)), 3, generator)
closeness.differing(delta.up, delta.up + 1)
dense_variants.dora_delta(delta.up, delta.up, delta.up[:, 0], True)
exact_variants.kronecker_factors(delta.up, (delta.up, delta.down))
bad = [name for name in ("torch", "array_api_compat", "numpy.f2py", "numpy.testing")
       if name in sys.modules]
sys.exit(f"loaded: {bad}" if bad else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("purpose", [("a.b", 0), ("a.b", 1), ("c",)])
def test_random_numbers_depend_on_seed_and_purpose(purpose: tuple[str | int, ...]) -> None:
    first, again = generator_for(3, *purpose).random(4), generator_for(3, *purpose).random(4)
    assert np.array_equal(first, again)
    for other in (generator_for(4, *purpose), generator_for(3, "other"), generator_for(3)):
        assert not np.array_equal(first, other.random(4))


@on_libraries
def test_a_stack_has_the_scales_in_b(library: Library) -> None:
    terms = [LowRank(torch.randn(5, r), torch.randn(r, 4), 0.3 * r) for r in (1, 2)]
    found = library(stack, terms)
    expected = sum((t.scale * (t.up @ t.down) for t in terms), torch.zeros(5, 4))
    torch.testing.assert_close(found.up @ found.down * found.scale, expected)


# ------------------------------------------------------------------ closeness


def differing_bfloat16(library: Library, *tensors: torch.Tensor) -> tuple[int, int, float]:
    """Compare; numpy holds such values in float32."""
    if library.name == "numpy":
        wide = [tensor.float() for tensor in tensors]
        found: tuple[int, int, float] = library(differing, *wide, precision=BFLOAT16)
        return found
    same: tuple[int, int, float] = library(differing, *tensors)
    return same


@on_libraries
def test_differing_knows_rounding_from_errors(library: Library) -> None:
    a = torch.tensor([1.0, 2.0, 3.0, float("nan"), float("inf")]).bfloat16()
    assert differing_bfloat16(library, a, a.clone()) == (0, 0, 0.0)
    b = a.clone()
    b[1] = 2 + 2**-6
    assert differing_bfloat16(library, a, b)[:2] == (1, 0)
    b[2] = 4.0
    assert differing_bfloat16(library, a, b) == (2, 1, 1.0)
    assert library(differing, torch.tensor([1, 2]), torch.tensor([1, 3]))[:2] == (1, 1)


@on_libraries
def test_a_change_may_have_been_rounded_before_it_was_added(library: Library) -> None:
    before, wanted = torch.tensor([4.0]).bfloat16(), torch.tensor([0.5]).bfloat16()
    found = wanted + 2**-5  # eight units of the sum, but one of the change
    assert differing_bfloat16(library, wanted, found)[:2] == (1, 1)
    assert differing_bfloat16(library, wanted, found, before)[:2] == (1, 0)


@on_libraries
def test_infinities_are_close_to_themselves_only(library: Library) -> None:
    wanted, plain = torch.tensor([float("inf"), 1.0]), torch.tensor([1.0, 1.0])
    assert library(differing, wanted, wanted)[:2] == (0, 0)
    assert library(differing, wanted, plain) == (1, 1, math.inf)
    assert library(differing, plain, wanted) == (1, 1, math.inf)


# ----------------------------------------------------------------- extraction


def leading(library: Library, delta: torch.Tensor, rank: int, method: str) -> Leading:
    generator = np.random.default_rng(3)
    found: Leading = library(leading_part, delta, rank, generator, method=method)
    return found


def error(delta: torch.Tensor, found: Leading) -> float:
    return float((delta.double() - found.up.double() @ found.down.double()).norm())


@pytest.mark.parametrize(
    ("shape", "method"), [((520, 540), "exact"), ((540, 520), "exact"), ((300, 350), "randomised")]
)
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@on_libraries
def test_the_leading_part_is_nearly_the_best(
    library: Library, decay: float, shape: tuple[int, int], method: str
) -> None:
    values = torch.arange(1, min(shape) + 1).double() ** -decay
    U, V = (torch.linalg.qr(torch.randn(size, min(shape)).double())[0] for size in shape)
    delta = ((U * values) @ V.mT).float()
    found = leading(library, delta, 24, method)
    lost, best = error(delta, found), float(values[24:].norm())
    limit = 1e-6 if method == "exact" else 0.01 if decay < 0.3 else 0.001
    assert lost <= best * (1 + limit)
    assert math.isclose(math.sqrt(found.squared_residual), lost, rel_tol=1e-5)
    assert found.is_exact == (method == "exact")
    assert found.up.dtype == found.down.dtype == torch.float32
    if method == "exact":
        assert torch.allclose(found.singular_values, values[:24], rtol=1e-6)


@pytest.mark.parametrize("rank", [7, 20])
@pytest.mark.parametrize("method", ["exact", "randomised"])
@on_libraries
def test_an_exactly_low_rank_matrix_keeps_all_digits(
    library: Library, method: str, rank: int
) -> None:
    """The factors are as near as their rounding to float32 lets them be."""
    delta = (torch.randn(600, 7).double() @ torch.randn(7, 640).double()).float()
    found = leading(library, delta, rank, method)
    assert error(delta, found) < 1e-7 * float(delta.double().norm())
    wide = (torch.randn(600, 7) @ torch.randn(7, 640)).double()
    assert error(wide, leading(library, wide, rank, method)) < 1e-6 * float(wide.norm())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@on_libraries
def test_what_is_not_finite_has_no_leading_part(library: Library, value: float) -> None:
    delta = torch.randn(30, 40)
    delta[3, 4] = value
    with pytest.raises(ValueError, match="finite"):
        leading(library, delta, 2, "auto")


@pytest.mark.parametrize("method", ["exact", "randomised"])
@on_libraries
def test_zero_has_zero_as_its_leading_part(library: Library, method: str) -> None:
    found = leading(library, torch.zeros(600, 580), 5, method)
    assert found.up.shape == (600, 5) and found.down.shape == (5, 580)
    assert not found.up.any() and not found.down.any() and found.squared_residual == 0


@on_libraries
def test_a_seed_means_the_same_in_every_library(library: Library) -> None:
    delta = torch.randn(600, 580)
    found = leading(library, delta, 5, "randomised")
    expected = leading_part(delta, 5, np.random.default_rng(3), method="randomised")
    torch.testing.assert_close(
        found.up @ found.down, expected.up @ expected.down, atol=1e-4, rtol=1e-3
    )


@on_libraries
@pytest.mark.parametrize("value", [0.1, 1e-22, 1e22, 1e-30])
def test_squares_are_summed_without_loss(library: Library, value: float) -> None:
    matrix = torch.full((1000, 1000), value)
    exact = 1e6 * float(np.float32(value)) ** 2
    assert math.isclose(library(squared_norm, matrix), exact, rel_tol=1e-6)
    assert math.isclose(library(squared_norm, torch.randn(700, 900)), 630000, rel_tol=0.02)
    matrix[3, 4] = math.inf
    assert not math.isfinite(library(squared_norm, matrix))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, BFLOAT16),
        (torch.float16, HALF),
    ],
)
@on_libraries
def test_spacings_are_those_of_the_stored_dtype(
    library: Library, dtype: torch.dtype, precision: Precision | None
) -> None:
    """The distance to the next number away from zero, as PyTorch and numpy know it."""
    stored = (torch.randn(40) * 10.0 ** torch.arange(-6, 4).repeat(4)).to(dtype)
    stored[:3] = torch.tensor([0.0, 1.0, -2.0])
    info = torch.finfo(dtype)
    magnitude = stored.double().abs().clamp(min=info.smallest_normal)
    expected = float((2.0 ** magnitude.log2().floor() * info.eps).square().sum())
    held = stored.float() if precision is not None and library.name == "numpy" else stored
    found = library(spacing_squares, held, precision if held is not stored else None)
    assert math.isclose(found, expected, rel_tol=1e-6)
    wide = torch.cat([held, torch.tensor([math.inf, -math.inf, math.nan]).to(held.dtype)])
    assert math.isclose(library(spacing_squares, wide, precision), expected, rel_tol=1e-6)
