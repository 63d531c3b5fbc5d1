"""The order: bands, ageing, fair shares, arrival. Times are the tests' own."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.admission.fairness import MOVED, RANK, TENANTS_KNOWN, Debt, Kind, Place, Queue, Rules
from app.inference import Band

SECOND = 1_000_000
HOUR = 3600 * SECOND
RULES = Rules(
    tenant_limit=10_000,
    band_limit=10_000,
    total_limit=10_000,
    tenant_bytes=10**9,
    band_bytes=10**9,
    total_bytes=10**9,
    ageing_us=10 * SECOND,
    us_per_token=0,
)


class Bench:
    """A queue in front of one worker with one slot, held at the start."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.queue = Queue(rules)
        self.queue.set_slots("w", 1, 0)
        self.names = itertools.count()
        self.tenants: dict[str, str] = {}
        self.now_us = 0
        self.holder = self.arrive("first")

    def arrive(
        self, tenant: str = "t", band: int = 2, cost: float = 10, weight: float = 1, patience_us: int = HOUR
    ) -> str:
        place = Place(f"r.{next(self.names):06}", band, "w", ("w",), tenant, weight, cost, patience_us)
        verdict, _ = self.queue.arrive(place, self.now_us)
        assert verdict.kind in (Kind.GRANTED, Kind.WAITS)
        self.tenants[place.id] = tenant
        return place.id

    def next(self, owed: float = 0) -> str:
        """Who is granted when the holder leaves; it holds from then on."""
        debt = Debt(2, self.tenants[self.holder], owed)
        (grant,) = self.queue.release(self.holder, "w", debt, self.now_us)
        self.holder = grant.id
        return grant.id


def test_bands_go_highest_first_and_who_moves_before_all() -> None:
    bench = Bench()
    batch, flex, default, priority = (bench.arrive(band=RANK[band]) for band in reversed(Band))
    moved = bench.arrive(band=MOVED)
    assert [bench.next() for _ in range(5)] == [moved, priority, default, flex, batch]


def test_a_flow_is_first_come_first_served() -> None:
    bench = Bench()
    asked = []
    for cost in (50.0, 1.0, 20.0):
        bench.now_us += 1
        asked.append(bench.arrive(cost=cost))
    assert [bench.next() for _ in asked] == asked


def test_shortest_first_yields_to_who_has_waited() -> None:
    """At a tenth of a second per token, ten tokens more are worth a second of waiting."""
    bench = Bench(msgspec.structs.replace(RULES, us_per_token=100_000))
    long = bench.arrive(cost=30)
    short = bench.arrive(cost=5)
    bench.now_us += 3 * SECOND
    late = bench.arrive(cost=5)
    assert [bench.next() for _ in range(3)] == [short, long, late]


@pytest.mark.parametrize("ahead", [Band.PRIORITY, Band.DEFAULT, Band.FLEX])
def test_the_lowest_band_does_not_starve(ahead: Band) -> None:
    """V6: under a steady stream of higher tickets it waits no longer than its distance in ageing steps, and one."""
    bench = Bench()
    low = bench.arrive("low", band=RANK[Band.BATCH])
    for second in range(60):
        bench.now_us = second * SECOND
        bench.arrive("high", band=RANK[ahead])
        if bench.next() == low:
            break
    distance = RANK[Band.BATCH] - RANK[ahead]
    assert distance * 10 <= second <= (distance + 1) * 10


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from((1.0, 2.0, 5.0)), min_size=2),
    st.lists(st.sampled_from((1.0, 7.0, 40.0)), min_size=10, max_size=10),
)
def test_backlogged_tenants_are_served_by_weight(weights: dict[str, float], costs: list[float]) -> None:
    """I11: served over weight differs by one largest cost over weight, at every moment while all have tickets."""
    bench = Bench()
    cost_of: dict[str, float] = {}
    for tenant, weight in weights.items():
        for cost in costs * 3:
            cost_of[bench.arrive(tenant, cost=cost, weight=weight)] = cost
    served: Counter[str] = Counter()
    left = Counter(dict.fromkeys(weights, 30))
    while min(left.values()) > 0:
        granted = bench.next()
        tenant = bench.tenants[granted]
        left[tenant] -= 1
        served[tenant] += cost_of[granted]  # type: ignore[assignment]
        for a, b in itertools.combinations(weights, 2):
            apart = abs(served[a] / weights[a] - served[b] / weights[b])
            assert apart <= max(costs) / weights[a] + max(costs) / weights[b]


def test_a_debt_is_paid_by_waiting() -> None:
    """Who was estimated too low is put back by what it owes."""
    bench = Bench()
    bench.tenants[bench.holder] = "greedy"
    for _ in range(3):
        bench.arrive("greedy")
        bench.arrive("modest")
    order = [bench.tenants[bench.next()], bench.tenants[bench.next(owed=100)]]
    assert order == ["greedy", "modest"]
    assert [bench.tenants[bench.next()] for _ in range(3)] == ["modest", "modest", "greedy"]


def test_a_standing_tells_of_ones_own_tenant_alone() -> None:
    bench = Bench(msgspec.structs.replace(RULES, us_per_token=100_000))
    long = bench.arrive(cost=30)
    others = [bench.arrive("other", band=band) for band in (1, 2, 2, 2)]
    short = bench.arrive(cost=5)
    bench.now_us += SECOND
    bench.next()  # the priority band's only ticket: a grant a second
    standings = {name: bench.queue.standing(name) for name in (short, long, *others)}
    assert [(standings[name].position, standings[name].of) for name in (short, long)] == [(1, 2), (2, 2)]
    assert [(standings[name].position, standings[name].of) for name in others] == [(0, 0), (1, 3), (2, 3), (3, 3)]
    # Of five that wait in two flows, two go until its own first has gone, and four until its second.
    assert [standings[name].wait_us for name in (short, long)] == [2 * SECOND, 4 * SECOND]
    assert bench.queue.standing("nobody").position == 0


def test_an_expired_ticket_is_never_granted() -> None:
    bench = Bench()
    bench.arrive(patience_us=SECOND)
    alive = bench.arrive()
    bench.now_us = SECOND
    assert bench.next() == alive
    assert bench.queue.waiting == 0


def verdict_of(bench: Bench, patience_us: int) -> Kind:
    """Of one more ticket like those that wait."""
    place = Place(f"r.{next(bench.names):06}", 2, "w", ("w",), "t", 1.0, 10.0, patience_us)
    return bench.queue.arrive(place, bench.now_us)[0].kind


def test_who_is_passed_by_for_too_long_is_refused() -> None:
    """20 s long the route's grants, one a second, went to a higher band: two tickets will take twice that."""
    bench = Bench(msgspec.structs.replace(RULES, ageing_us=HOUR))
    bench.arrive()
    for second in range(1, 21):
        bench.now_us = second * SECOND
        high = bench.arrive("high", band=1)
        assert bench.next() == high
    assert verdict_of(bench, 39 * SECOND) is Kind.HOPELESS
    assert verdict_of(bench, 41 * SECOND) is Kind.WAITS


def test_who_is_too_late_at_the_pace_of_its_own_flow_is_refused() -> None:
    """Every second grant goes to tenants that never wait for long, so that few flows are seen to wait."""
    bench = Bench()
    for _ in range(40):
        bench.arrive(patience_us=HOUR)
    for second in range(1, 41):
        bench.now_us = second * SECOND
        if second % 2:
            bench.arrive(f"brief {second}", cost=1)
        bench.next()
    waiting = bench.queue.waiting
    assert verdict_of(bench, round(1.8 * waiting) * SECOND) is Kind.HOPELESS
    assert verdict_of(bench, round(2.2 * waiting) * SECOND) is Kind.WAITS


def test_a_repeated_arrival_changes_nothing() -> None:
    bench = Bench()
    place = Place("r.again", 2, "w", ("w",), "t", 1.0, 10.0, HOUR)
    assert bench.queue.arrive(place, 0)[0].kind is Kind.WAITS
    assert bench.queue.arrive(place, 0)[0].kind is Kind.WAITS
    assert bench.queue.waiting == 1


def test_tenants_are_forgotten() -> None:
    bench = Bench()
    for number in range(TENANTS_KNOWN + 50):
        bench.arrive(f"tenant{number}") if number % 2 else bench.arrive("other")
        bench.next()
    assert len(bench.queue._finish) <= TENANTS_KNOWN
