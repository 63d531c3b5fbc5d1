"""The last minutes, in steps: what is counted in which, and the figures made of them."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.console.history import LATELY, STEP_S, STEPS_KEPT, History, added, pace_of, step_at, traffic, ttft_quantile
from app.telemetry.metrics import TTFT_BUCKETS
from app.telemetry.tally import Tally

BEYOND = len(TTFT_BUCKETS)
EDGES = (0.0, *TTFT_BUCKETS, inf)


def test_a_step_holds_what_came_in_it() -> None:
    history = History()
    history.take(7, {"m:v": Tally(10, 2, {3: 2})})
    history.take(8, {"m:v": Tally(25, 3, {3: 2, 4: 1}), "m:w": Tally(1, 1)})
    history.take(9, {"m:v": Tally(25, 3, {3: 2, 4: 1}), "m:w": Tally(1, 1)})
    assert history.steps == {
        7: {"m:v": Tally(10, 2, {3: 2})},
        8: {"m:v": Tally(15, 1, {4: 1}), "m:w": Tally(1, 1)},
        9: {},
    }


def test_only_the_last_steps_are_kept() -> None:
    history = History()
    for step in range(500):
        history.take(step, {"m:v": Tally(step, step)})
    assert sorted(history.steps) == list(range(500 - STEPS_KEPT, 500))


def test_processes_are_added_up_step_by_step() -> None:
    one = {1: {"m:v": Tally(10, 1, {2: 1})}, 2: {"m:v": Tally(5, 1)}}
    other = {2: {"m:v": Tally(7, 2, {2: 1}), "m:w": Tally(1, 1)}, 3: {}}
    assert added([one, other]) == {
        1: {"m:v": Tally(10, 1, {2: 1})},
        2: {"m:v": Tally(12, 3, {2: 1}), "m:w": Tally(1, 1)},
        3: {},
    }


def test_traffic_has_a_place_for_every_step_and_none_where_nobody_was() -> None:
    last = step_at(1000.0)
    shown = traffic({last - 1: {}, last: {"m:v": Tally(50, 10, {5: 10})}}, last)
    assert len(shown.paces) == STEPS_KEPT
    assert shown.paces[:-2] == [None] * (STEPS_KEPT - 2)
    idle, busy = shown.paces[-2:]
    assert idle is not None
    assert (idle.tokens_per_s, idle.ttft_p50_s) == (0, None)
    assert busy is not None
    assert (busy.tokens_per_s, busy.requests_per_s) == (50 / STEP_S, 10 / STEP_S)
    assert busy.ttft_p50_s == pytest.approx((EDGES[5] + EDGES[6]) / 2)


def test_present_figures_are_over_the_steps_that_are_known_of_the_last_minute() -> None:
    steps = {step: {"m:v": Tally(10, 1)} for step in range(3)}
    assert traffic(steps, 2).lately.tokens_per_s == 10 / STEP_S
    assert pace_of("m:v", steps, 2).tokens_per_s == 10 / STEP_S
    assert pace_of("m:w", steps, 2).tokens_per_s == 0
    steps |= {step: {} for step in range(3, LATELY)}
    assert traffic(steps, LATELY - 1).lately.tokens_per_s == pytest.approx(30 / (STEP_S * LATELY))
    assert traffic(steps, LATELY + 2).lately.tokens_per_s == 0


def test_a_quantile_of_nothing_is_none() -> None:
    assert ttft_quantile({}, 0.5) is None


def test_beyond_the_last_edge_only_the_edge_is_known() -> None:
    assert ttft_quantile({BEYOND: 4}, 0.5) == TTFT_BUCKETS[-1]


@given(
    st.dictionaries(st.integers(0, BEYOND), st.integers(1, 100), min_size=1),
    st.floats(0.01, 0.99),
)
def test_a_quantile_is_in_the_bucket_of_its_rank(counts: dict[int, float], quantile: float) -> None:
    """Against the list of all samples' buckets, in order."""
    found = ttft_quantile(counts, quantile)
    ordered = sorted(bucket for bucket, count in counts.items() for _ in range(int(count)))
    rank = quantile * len(ordered)
    below = ordered[max(0, int(rank) - 1)]
    above = ordered[min(len(ordered) - 1, int(rank))]
    assert found is not None
    assert EDGES[below] <= found
    assert found <= (EDGES[above + 1] if above < BEYOND else TTFT_BUCKETS[-1])
