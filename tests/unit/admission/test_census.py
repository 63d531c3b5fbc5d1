"""What replicas may grant without Redis: together never more than the slots, however they came and went."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.admission.census import Census

LEASE_S = 15.0
RENEW_S = 5.0
LATE_S = 2.0
SETTLE_S = RENEW_S + LATE_S


def census(at_least: int = 1) -> Census:
    return Census(at_least, memory_s=LEASE_S, settle_s=SETTLE_S)


@dataclass
class Life:
    """One process: when it begins and ends, and how late each of its syncs is."""

    begins: float
    lasts: float
    late: list[float]


lives = st.lists(
    st.builds(
        Life,
        begins=st.floats(0, 60),
        lasts=st.floats(0, 80),
        late=st.lists(st.floats(0, LATE_S), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=6,
)


def shares(lived: list[Life], lost_at: float, slots: int) -> list[int]:
    """Redis answers all syncs until `lost_at`; the shares of those that live then."""
    syncs: list[tuple[float, int]] = []
    for number, life in enumerate(lived):
        at, turn = life.begins, 0
        while at <= min(life.begins + life.lasts, lost_at):
            syncs.append((at, number))
            at += RENEW_S + life.late[turn % len(life.late)] * 0.99
            turn += 1
    alive: dict[int, float] = {}
    known = {number: census() for number in range(len(lived))}
    for at, number in sorted(syncs):
        alive = {other: seen for other, seen in alive.items() if at - seen <= LEASE_S} | {number: at}
        known[number].heard(len(alive), at)
    living = [number for number, life in enumerate(lived) if number in alive and life.begins + life.lasts >= lost_at]
    return [known[number].share(slots) for number in living]


@given(lives, st.floats(0, 100), st.integers(1, 64))
def test_all_shares_together_are_within_the_slots(lived: list[Life], lost_at: float, slots: int) -> None:
    assert sum(shares(lived, lost_at, slots)) <= slots


@pytest.mark.parametrize("count", [1, 2, 3])
def test_those_that_live_long_share_all(count: int) -> None:
    lived = [Life(begins=float(number), lasts=1000, late=[0.0]) for number in range(count)]
    assert shares(lived, 60.0, 12) == [12 // count] * count


def test_who_has_just_joined_waits_until_the_others_know() -> None:
    lived = [Life(0, 1000, [0.0]), Life(30.5, 1000, [0.0])]
    assert shares(lived, 32.0, 12) == [12, 0]
    assert shares(lived, 50.0, 12) == [6, 6]


def test_who_is_gone_is_forgotten_after_two_leases() -> None:
    lived = [Life(0, 1000, [0.0]), Life(0, 30, [0.0])]
    assert shares(lived, 31.0 + LEASE_S, 12) == [6]
    assert shares(lived, 31.0 + 2 * LEASE_S + RENEW_S, 12) == [12]


def test_one_that_never_reached_the_ledger_goes_by_what_is_configured() -> None:
    assert census(at_least=3).share(12) == 4


def test_a_configured_number_needs_no_counting() -> None:
    counted = census(at_least=3)
    counted.heard(2, 100.0)
    assert counted.share(12) == 4


def test_who_comes_back_after_a_lease_has_joined_anew() -> None:
    away = census()
    for at in (0.0, 5.0, 10.0):
        away.heard(2, at)
    assert away.share(12) == 6
    away.heard(2, 10.0 + LEASE_S + 1)
    assert away.share(12) == 0
