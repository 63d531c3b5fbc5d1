"""The retry budget: in any ten seconds, at most its share of the requests and some for each second."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.relay.retry_budget import WINDOW_S, RetryBudget


def spend(budget: RetryBudget, now: float, wanted: int) -> int:
    return sum(budget.take(now) for _ in range(wanted))


def test_what_each_second_allows_needs_no_requests() -> None:
    budget = RetryBudget(0.2, 10)
    assert spend(budget, 1000.0, 500) == 100
    assert spend(budget, 1009.9, 500) == 0
    assert spend(budget, 1010.0, 500) == 100


def test_requests_add_their_share() -> None:
    budget = RetryBudget(0.2, 0)
    for _ in range(100):
        budget.request(1000.0)
    assert spend(budget, 1005.0, 500) == 20
    assert spend(budget, 1010.0, 500) == 0


def test_none_at_all() -> None:
    budget = RetryBudget(0, 0)
    budget.request(0.0)
    assert not budget.take(0.0)


@given(
    st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200),
    st.floats(0, 1),
    st.floats(0, 3),
    st.floats(0, 1e6),
)
def test_it_agrees_with_a_plain_count_of_whole_seconds(
    steps: list[tuple[float, bool]], share: float, per_s: float, start: float
) -> None:
    budget, now = RetryBudget(share, per_s), start
    requests: list[int] = []
    retries: list[int] = []
    for pause, is_request in steps:
        now += pause
        second = int(now)
        if is_request:
            budget.request(now)
            requests.append(second)
            continue
        recent = [when for when in requests if when > second - WINDOW_S]
        spent = [when for when in retries if when > second - WINDOW_S]
        allowed = len(spent) + 1 <= share * len(recent) + per_s * WINDOW_S
        assert budget.take(now) == allowed
        if allowed:
            retries.append(second)
