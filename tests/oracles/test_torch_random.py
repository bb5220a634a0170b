"""The random numbers of PyTorch against PyTorch, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loratool.math import torch_random
from loratool.math.torch_random import TorchGenerator, to_bfloat16

SEEDS = [0, 1, 42, 777, 2**31 - 1, 2**32 - 1, 2**32 + 5]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (16, 700), (7, 1, 33)])
def test_uniform_numbers(seed: int, shape: tuple[int, ...]) -> None:
    theirs, ours = generator(seed), TorchGenerator(seed)
    for low, high in ((0.0, 1.0), (-0.3, 0.3), (-math.sqrt(6 / 11), math.sqrt(6 / 11)), (2, 7.1)):
        wanted = torch.empty(shape).uniform_(low, high, generator=theirs)
        assert np.array_equal(ours.uniform(shape, low, high), wanted.numpy())
    assert np.array_equal(ours.uniform(shape, 0, 1), torch.rand(shape, generator=theirs).numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bound", [1.0, 0.3, 1 / math.sqrt(13), 0.0123])
def test_uniform_numbers_of_bfloat16(seed: int, bound: float) -> None:
    wanted = torch.empty(40, 77, dtype=torch.bfloat16)
    wanted.uniform_(-bound, bound, generator=generator(seed))
    found = TorchGenerator(seed).uniform((40, 77), -bound, bound, "bfloat16")
    assert np.array_equal(found, wanted.float().numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 2, 3, 17, 24 * 36, 100_003])
@pytest.mark.parametrize("wanted", [1, 2, 16, 1000, 200_000])
def test_the_first_of_a_permutation(seed: int, count: int, wanted: int) -> None:
    truth = torch.randperm(count, generator=generator(seed))[:wanted]
    found = TorchGenerator(seed).first_of_permutation(count, wanted)
    assert np.array_equal(found, truth.numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("low", [0.0, 100.0, -1000.0, 65536.0])
def test_numbers_that_are_rounded_up_to_the_end(seed: int, low: float) -> None:
    high = low + 1e-5 * max(1.0, abs(low))
    wanted = torch.empty(5000).uniform_(low, high, generator=generator(seed))
    assert np.array_equal(TorchGenerator(seed).uniform((5000,), low, high), wanted.numpy())


@pytest.mark.parametrize("wanted", [1, 5, 3000])
def test_a_permutation_drawn_inside_out(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule of long ones; PyTorch's own take gigabytes (checked once, at 214748375)."""
    monkeypatch.setattr(torch_random, "FEW", 0)
    monkeypatch.setattr(torch_random, "CHUNK", 64)
    count = 2000
    words = [int(word) for word in TorchGenerator(3).words(2 * count)]
    truth: list[int] = []
    for number in range(count):
        place = (words[2 * number] << 32 | words[2 * number + 1]) % (number + 1)
        truth.append(number)
        truth[number] = truth[place]
        truth[place] = number
    assert TorchGenerator(3).first_of_permutation(count, wanted).tolist() == truth[:wanted]


def test_draws_go_on_where_the_last_ones_ended() -> None:
    theirs, ours = generator(9), TorchGenerator(9)
    for count in (1, 700, 3):
        assert np.array_equal(ours.uniform((count,), 0, 1), torch.rand(count, generator=theirs))


def test_rounding_to_bfloat16() -> None:
    values = torch.randn(10_000, generator=generator(3)) * 3
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0])
    for each in (values, ties):
        assert np.array_equal(to_bfloat16(each.numpy()), each.bfloat16().float().numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1,), (3,), (15,), (16,), (17,), (31, 1), (64, 2, 2), (5, 3, 9)])
def test_normal_numbers(seed: int, shape: tuple[int, ...]) -> None:
    wanted = torch.normal(mean=0.0, std=0.7, size=shape, generator=generator(seed))
    found = TorchGenerator(seed).normal(shape, 0.7)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-6, atol=1e-6)
