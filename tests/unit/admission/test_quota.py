"""Limits: what is taken comes back a window later, what is reserved is settled once. Times are the tests' own."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.admission.quota import (
    MINUTE_US,
    SLICES,
    Claim,
    Demand,
    Meter,
    Quota,
    Settlement,
    Tokens,
    amounts_of,
    claims_of,
)
from app.tenant import Limits

SECOND = 1_000_000
START = 1_800_000_000 * SECOND


class Tenant:
    """One tenant's requests against its limits."""

    def __init__(self, limits: Limits) -> None:
        self.quota = Quota()
        self.limits = limits
        self.now_us = START
        self.names = (f"r.{index}" for index in itertools.count())

    def demand(self, prompt: int = 0, output: int = 0) -> Demand:
        claims = claims_of(self.limits, Tokens(0, output), Tokens(prompt, 0))
        return Demand(next(self.names), self.limits.concurrent or 0, claims)

    def ask(self, prompt: int = 0, output: int = 0) -> Demand | None:
        """The demand if it is met."""
        demand = self.demand(prompt, output)
        if self.quota.objection("t", demand, self.now_us):
            return None
        self.quota.reserve("t", demand, self.now_us)
        return demand

    def settle(self, demand: Demand, prompt: int, output: int) -> None:
        amounts = amounts_of(demand.claims, Tokens(prompt, output), Tokens(0, 0))
        self.quota.settle(Settlement(demand.reservation, "t", demand.claims, amounts), self.now_us)

    def wait_us(self, prompt: int = 0, output: int = 0) -> int:
        objection = self.quota.objection("t", self.demand(prompt, output), self.now_us)
        assert objection is not None
        return objection.wait_us

    def used(self) -> list[int]:
        return [reading.used for reading in self.quota.readings("t", self.demand().claims, self.now_us)]


def test_a_limit_is_met_and_not_exceeded() -> None:
    tenant = Tenant(Limits(requests_per_min=3))
    assert [tenant.ask() is not None for _ in range(5)] == [True, True, True, False, False]


def test_what_is_taken_comes_back_a_window_later() -> None:
    tenant = Tenant(Limits(requests_per_min=1))
    tenant.ask()
    tenant.now_us += MINUTE_US
    assert tenant.ask() is None
    tenant.now_us += SECOND
    assert tenant.ask() is not None


def test_a_refusal_says_when_there_is_room() -> None:
    tenant = Tenant(Limits(tokens_per_min=100))
    for _ in range(10):
        tenant.ask(output=10)
        tenant.now_us += SECOND
    wait_us = tenant.wait_us(output=30)
    tenant.now_us += wait_us - 1
    assert tenant.ask(output=30) is None
    tenant.now_us += 1
    assert tenant.ask(output=30) is not None


def test_refused_by_one_limit_nothing_is_taken_of_another() -> None:
    tenant = Tenant(Limits(requests_per_min=5, tokens_per_min=10))
    tenant.ask(output=10)
    assert tenant.ask(output=1) is None
    assert tenant.used() == [1, 10]


def test_what_was_not_needed_comes_back_at_once() -> None:
    tenant = Tenant(Limits(tokens_per_min=100))
    demand = tenant.ask(prompt=20, output=80)
    assert demand is not None
    tenant.now_us += 5 * SECOND
    tenant.settle(demand, prompt=10, output=30)
    assert tenant.used() == [40]


def test_what_was_not_needed_is_not_given_back_twice() -> None:
    """It came back with its window already."""
    tenant = Tenant(Limits(tokens_per_min=100))
    demand = tenant.ask(output=80)
    assert demand is not None
    tenant.now_us += 2 * MINUTE_US
    tenant.ask(output=50)
    tenant.settle(demand, prompt=0, output=10)
    assert tenant.used() == [50]


def test_what_was_used_beyond_is_taken_when_it_is_known() -> None:
    tenant = Tenant(Limits(tokens_per_min=100))
    demand = tenant.ask(prompt=10)
    assert demand is not None
    tenant.now_us += 2 * MINUTE_US
    tenant.settle(demand, prompt=10, output=95)
    assert tenant.used() == [95]
    assert tenant.ask(output=10) is None


def test_a_settlement_counts_once() -> None:
    tenant = Tenant(Limits(tokens_per_min=100))
    first, second = tenant.ask(output=50), tenant.ask(output=50)
    assert first is not None
    assert second is not None
    tenant.settle(first, prompt=0, output=20)
    tenant.settle(first, prompt=0, output=20)
    assert tenant.used() == [70]


def test_a_reservation_counts_once() -> None:
    tenant = Tenant(Limits(requests_per_min=5))
    demand = tenant.ask()
    assert demand is not None
    tenant.quota.reserve("t", demand, tenant.now_us)
    assert tenant.used() == [1]


def test_so_many_at_once_and_one_more_when_one_ends() -> None:
    tenant = Tenant(Limits(concurrent=2))
    first = tenant.ask()
    assert first is not None
    assert tenant.ask() is not None
    assert tenant.ask() is None
    tenant.settle(first, prompt=0, output=0)
    assert tenant.ask() is not None


def test_a_share_of_less_than_one_is_none() -> None:
    demand = Tenant(Limits(requests_per_min=5, concurrent=1)).demand().share(lambda limit: limit // 2)
    assert (demand.claims[0].most, Quota().objection("t", demand, START) is not None) == (2, True)


def test_a_limit_that_is_lowered_or_raised_counts_at_once() -> None:
    tenant = Tenant(Limits(requests_per_min=5))
    for _ in range(3):
        tenant.ask()
    tenant.limits = Limits(requests_per_min=3)
    assert tenant.ask() is None
    tenant.limits = Limits(requests_per_min=4)
    assert tenant.ask() is not None


def test_a_clock_set_back_neither_frees_nor_blocks_for_longer_than_a_window() -> None:
    tenant = Tenant(Limits(requests_per_min=1))
    tenant.ask()
    tenant.now_us -= 3600 * SECOND
    assert tenant.ask() is None
    tenant.now_us += MINUTE_US + SECOND
    assert tenant.ask() is not None


@pytest.mark.parametrize(
    ("limits", "stated", "guessed", "amounts"),
    [
        (Limits(requests_per_min=1, tokens_per_min=1000), 200, Tokens(50, 0), [1, 250]),
        (Limits(tokens_per_min=1000), 0, Tokens(50, 128), [178]),
        (Limits(tokens_per_min=100), 0, Tokens(50, 128), [100]),  # a guess is never too large
        (Limits(tokens_per_min=100), 200, Tokens(50, 0), [200]),  # a statement is
        (Limits(input_tokens_per_min=40, output_tokens_per_min=900), 200, Tokens(50, 0), [40, 200]),
        (Limits(tokens_per_day=10_000), 200, Tokens(50, 0), [250]),
    ],
)
def test_what_a_request_claims(limits: Limits, stated: int, guessed: Tokens, amounts: list[int]) -> None:
    claims = claims_of(limits, Tokens(0, stated), guessed)
    assert [claim.amount for claim in claims] == amounts
    assert [claim.is_too_large for claim in claims] == [claim.amount > claim.most for claim in claims]


def test_what_is_never_known_stands_as_it_was_reserved() -> None:
    claims = claims_of(Limits(requests_per_min=9, tokens_per_min=100), Tokens(0, 0), Tokens(250, 20))
    assert amounts_of(claims, Tokens(0, 0), Tokens(250, 20)) == (1, 100)
    assert amounts_of(claims, Tokens(0, 7), Tokens(250, 0)) == (1, 100)
    assert amounts_of(claims, Tokens(30, 7), Tokens(0, 0)) == (1, 37)


takings = st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(1, 40)), min_size=20, max_size=150)


@given(takings)
def test_no_window_holds_more_and_none_with_room_refuses(asked: list[tuple[int, int]]) -> None:
    """Exact from above; from below, what left the window less than a sixtieth ago may still count."""
    meter, width_us = Meter(MINUTE_US // SLICES), MINUTE_US // SLICES
    taken: list[tuple[int, int]] = []
    now_us = START
    for after_us, amount in asked:
        now_us += after_us
        claim = Claim("tokens_per_min", 100, MINUTE_US, amount)
        if meter.used(now_us) + amount <= claim.most:
            meter.take(amount, now_us)
            taken.append((now_us, amount))
            assert _within(taken, now_us, MINUTE_US) <= claim.most
        else:
            assert _within(taken, now_us, MINUTE_US + width_us) + amount > claim.most
            later = deepcopy(meter)
            wait_us = meter.wait_us(claim, now_us)
            assert later.used(now_us + wait_us - 1) + amount > claim.most
            assert later.used(now_us + wait_us) + amount <= claim.most


def _within(taken: list[tuple[int, int]], now_us: int, window_us: int) -> int:
    return sum(amount for at_us, amount in taken if now_us - at_us < window_us)
