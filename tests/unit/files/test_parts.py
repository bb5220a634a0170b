"""How an object is put together: parts tile it, keep S3's rules, and send little of what is kept.

The rules are tried at sizes that can be drawn: a shortest part of 5, a longest of 50.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.files.objects import parts as rules
from loratool.files.objects.parts import Kept, Part, parts_of

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        for name, value in (("SHORTEST", 5), ("LONGEST", 50), ("SENT_BYTES", 8)):
            monkeypatch.setattr(rules, name, value)


@st.composite
def objects(draw: st.DrawFn) -> tuple[int, list[Kept]]:
    """A size, and runs of bytes that others have: some neighbours, some of one source."""
    at, kept = 0, []
    for _ in range(draw(st.integers(0, 9))):
        at += draw(st.sampled_from([0, 0, 1, 3, 4, 5, 7, 20]))
        size = draw(st.integers(0, 130))
        source = draw(st.sampled_from("ab"))
        offset = draw(st.sampled_from([at, at, at + 100]))
        kept.append(Kept(at, size, source, offset))
        at += size
    return at + draw(st.sampled_from([0, 0, 1, 4, 5, 30])), kept


def check(size: int, kept: list[Kept], parts: tuple[Part, ...]) -> None:
    """The rules of S3, and that copies are copies of what is kept."""
    ends = [0, *(part.stop for part in parts)]
    assert ends[-1] == size and [part.start for part in parts] == ends[:-1]
    assert all(part.size >= rules.SHORTEST for part in parts[:-1])
    assert all(0 < part.size <= rules.LONGEST for part in parts)
    assert len(parts) <= rules.MOST_PARTS
    for part in parts:
        if part.kept is None:
            continue
        assert (part.kept.start, part.kept.stop) == (part.start, part.stop)
        for at in (part.start, part.stop - 1):
            (owner,) = (each for each in kept if each.start <= at < each.stop)
            assert part.kept.source == owner.source
            assert part.kept.offset - part.kept.start == owner.offset - owner.start


@settings(deadline=None, max_examples=600)
@given(objects())
def test_parts_tile_an_object_and_keep_the_rules(drawn: tuple[int, list[Kept]]) -> None:
    size, kept = drawn
    parts = parts_of(size, kept)
    check(size, kept, parts)
    sent = [part for part in parts if part.kept is None]
    assert all(part.size <= 2 * rules.SHORTEST for part in sent)
    for each in rules._joined(kept):
        copied = [part for part in parts if part.kept and part.kept.source == each.source]
        inside = [part for part in copied if each.start <= part.start and part.stop <= each.stop]
        if each.size >= 3 * rules.SHORTEST:  # all but what its neighbours lack
            assert inside[0].start - each.start < rules.SHORTEST
            assert each.stop - inside[-1].stop < rules.SHORTEST
            assert all(a.stop == b.start for a, b in pairwise(inside))


@settings(deadline=None)
@given(objects(), st.integers(2, 6))
def test_few_parts_are_allowed(drawn: tuple[int, list[Kept]], most: int) -> None:
    size, kept = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "LONGEST", 1 << 30)
        patch.setattr(rules, "MOST_PARTS", most)
        check(size, kept, parts_of(size, kept))


def test_nothing_changed() -> None:
    assert parts_of(0, []) == ()
    assert parts_of(3, [Kept(0, 3, "a", 0)]) == (Part(0, 3, Kept(0, 3, "a", 0)),)
    whole = parts_of(120, [Kept(0, 60, "a", 0), Kept(60, 60, "a", 60)])
    assert [(p.start, p.stop, p.kept and p.kept.offset) for p in whole] == [
        (0, 40, 0),
        (40, 80, 40),
        (80, 120, 80),
    ]


def test_a_short_change_is_filled_up_from_what_is_beside_it() -> None:
    parts = parts_of(100, [Kept(0, 40, "a", 0), Kept(42, 58, "a", 42)])
    assert [(p.start, p.stop, p.kept is None) for p in parts] == [
        (0, 37, False),
        (37, 42, True),
        (42, 71, False),
        (71, 100, False),
    ]


def test_a_short_change_at_the_end_is_the_last_part() -> None:
    parts = parts_of(42, [Kept(0, 40, "a", 0)])
    assert [(p.start, p.stop, p.kept is None) for p in parts] == [(0, 40, False), (40, 42, True)]


def test_real_sizes() -> None:
    """A layer of 8 B: q and v are sent, between copies, and nothing else."""
    names = [("k", 8), ("o", 32), ("q", 32), ("v", 8), ("up", 112), ("gate", 112), ("down", 112)]
    at, kept, changed = 0, [], 0
    for _ in range(4):
        for name, size in names:
            if name in "qv":
                changed += size * MIB
            else:
                kept.append(Kept(at, size * MIB, "base", at))
            at += size * MIB
    parts = parts_of(at, kept)
    check(at, kept, parts)
    sent = [part for part in parts if part.kept is None]
    assert sum(part.size for part in sent) == changed
    assert max(part.size for part in sent) <= 10 * MIB
    assert len(parts) < 40


def test_real_objects_that_are_large() -> None:
    size = 600 << 30
    kept = [Kept(at, 6 << 20, "base", at) for at in range(0, size, 12 << 20)]
    check(size, kept, parts_of(size, kept))
    check(size, [], parts_of(size, []))
