"""Sums that do not depend on how they were divided."""

from __future__ import annotations

import math
import random
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from loratool.plan.run import RunResult, exact_sum

numbers = st.floats(allow_nan=False, allow_infinity=False, width=64).filter(
    lambda number: abs(number) < 1e300
)


@given(st.lists(numbers, max_size=40))
def test_the_sum_is_exact(many: list[float]) -> None:
    found = exact_sum(many)
    assert sum(map(Fraction, found), Fraction()) == sum(map(Fraction, many), Fraction())
    if found:
        assert found[0] == math.fsum(many)
        assert [abs(each) for each in found] == sorted(map(abs, found), reverse=True)


@given(st.lists(numbers, min_size=1, max_size=40), st.integers(1, 8), st.randoms())
def test_sums_of_sums_are_those_of_everything(
    many: list[float], count: int, order: random.Random
) -> None:
    mixed = order.sample(many, len(many))
    parts = [exact_sum(mixed[number::count]) for number in range(count)]
    order.shuffle(parts)
    assert exact_sum([each for part in parts for each in part]) == exact_sum(many)
    result = RunResult.of([each for part in parts for each in part], many, is_empty=False)
    assert result.kept == result.total == math.fsum(many)


def test_numbers_that_are_infinite_end() -> None:
    for many in ([math.inf], [math.inf, -math.inf], [math.nan], [1e308, 1e308], [1.0, math.inf]):
        assert exact_sum(many) == (math.inf,)
    assert exact_sum([]) == exact_sum([0.0]) == exact_sum([1.5, -1.5]) == ()
