"""Shares of a job: together all of it, each part once, none much longer than it has to be."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import OptionError
from loratool.shards.dealing import Share, dealt, longest_first, parse_share

sizes = st.lists(st.integers(0, 10**12), max_size=60)


@given(sizes, st.integers(1, 70))
def test_shares_are_all_parts_each_once(sizes: list[int], count: int) -> None:
    shares = [dealt(sizes, Share(number, count)) for number in range(1, count + 1)]
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert shares == [dealt(sizes, Share(number, count)) for number in range(1, count + 1)]
    for share in shares:
        assert share == sorted(share, key=lambda index: (-sizes[index], index))
    if len(sizes) >= count:
        assert all(shares)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.integers(1, 20))
def test_no_share_is_much_longer_than_it_has_to_be(sizes: list[int], count: int) -> None:
    """Whoever has most got the last of it when nobody had less: the bound of list scheduling."""
    loads = [sum(sizes[n] for n in dealt(sizes, Share(k, count))) for k in range(1, count + 1)]
    assert count * max(loads) <= sum(sizes) + max(sizes) * (count - 1)
    if len(sizes) > count:
        assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize(
    ("sizes", "count", "best"), [([3, 3, 2, 2, 2], 2, 6), ([5, 5, 4, 4, 3, 3, 3], 3, 9)]
)
def test_grahams_bound(sizes: list[int], count: int, best: int) -> None:
    loads = [sum(sizes[n] for n in dealt(sizes, Share(k, count))) for k in range(1, count + 1)]
    assert best <= max(loads) <= (Fraction(4, 3) - Fraction(1, 3 * count)) * best


@given(sizes)
def test_the_longest_is_first(sizes: list[int]) -> None:
    assert [sizes[index] for index in longest_first(sizes)] == sorted(sizes, reverse=True)


def test_what_a_share_is_called() -> None:
    assert parse_share("3/8") == Share(3, 8)
    assert parse_share("auto").is_auto
    for text in ("3/8", "1/1", "auto"):
        assert str(parse_share(text)) == text


@pytest.mark.parametrize(
    "text", ["", "0/3", "4/3", "-1/3", "1", "1/0", "a/b", "1/2/3", "٣/٤ ", "AUTO"]
)
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(OptionError, match="is no share"):
        parse_share(text)
