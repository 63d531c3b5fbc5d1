"""When a change of files counts."""

from __future__ import annotations

from app.reload import Looks

OLD, HALF, NEW = ((1, 10, 7),), ((2, 4, 7),), ((3, 12, 7),)


def test_a_file_counts_when_two_looks_at_it_agree_and_once() -> None:
    looks = Looks(OLD)
    assert [looks.has_settled(now) for now in (OLD, OLD, HALF, NEW, NEW, NEW)] == [False] * 4 + [True, False]


def test_what_was_taken_meanwhile_is_nothing_new() -> None:
    """By a signal, between a first look and a second."""
    looks = Looks(OLD)
    assert not looks.has_settled(NEW)
    looks.take(NEW)
    assert not looks.has_settled(NEW)
    assert [looks.has_settled(OLD) for _ in range(2)] == [False, True]


def test_a_file_that_is_gone_is_a_change() -> None:
    looks = Looks(OLD)
    assert [looks.has_settled((None,)) for _ in range(3)] == [False, True, False]
