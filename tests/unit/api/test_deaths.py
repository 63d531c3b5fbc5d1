"""How soon a dead process gets a successor, and when there have been too many."""

from __future__ import annotations

from app.api.processes import Deaths


def test_the_first_is_replaced_at_once_and_the_others_ever_later() -> None:
    deaths = Deaths()
    assert [deaths.died(float(second)) for second in range(6)] == [0, 0.25, 0.5, 1, 1.5, 1.5]


def test_what_is_long_ago_is_forgiven() -> None:
    deaths = Deaths()
    deaths.died(0.0)
    assert deaths.died(61.0) == 0


def test_five_in_a_minute_are_too_many_until_the_minute_is_over() -> None:
    deaths = Deaths()
    said = []
    for second in (0.0, 10.0, 20.0, 30.0, 40.0):
        deaths.died(second)
        said.append(deaths.are_too_many(second))
    assert said == [False, False, False, False, True]
    assert deaths.are_too_many(59.0)
    assert not deaths.are_too_many(61.0)
