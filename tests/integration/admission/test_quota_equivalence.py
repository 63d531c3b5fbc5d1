"""quota.py and the scripts are one machine: random requests against limits through both, every answer compared."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.admission import ledger
from app.admission.fairness import Kind, Place, Queue
from app.admission.ledger import Departures
from app.admission.quota import SLICES, Claim, Demand, Settlement
from tests.integration.admission.driving import RULES, Clock, Replica
from tests.integration.admission.fleet import Dump
from tests.processes import Valkey

WINDOWS = {"requests_per_min": 600_000, "tokens_per_min": 600_000, "tokens_per_day": 6_000_000}
SLICE_US = 600_000 // SLICES

amount = st.sampled_from((0, 1, 7, 30, 100))
claim = st.tuples(st.sampled_from(sorted(WINDOWS)), st.sampled_from((3, 40, 100, 250)), amount)
demand = st.tuples(st.sampled_from((0, 0, 2, 5)), st.lists(claim, max_size=3, unique_by=lambda drawn: drawn[0]))
pick = st.integers(0, 1 << 16)
event = st.one_of(
    st.tuples(st.just("arrive"), st.lists(st.tuples(st.sampled_from("ab"), demand), min_size=1, max_size=4)),
    st.tuples(st.just("arrive"), st.lists(st.tuples(st.sampled_from("ab"), demand), min_size=1, max_size=4)),
    st.tuples(st.just("settle"), pick, st.lists(amount, min_size=3, max_size=3)),
    st.tuples(st.just("settle_again"), pick),
    st.tuples(st.just("arrive_again"), pick),
    st.tuples(st.just("passes"), st.sampled_from((1, SLICE_US, SLICE_US + 1, 7 * SLICE_US, 61 * SLICE_US, 2_000_000))),
    st.tuples(st.just("passes"), st.sampled_from((-1, -3 * SLICE_US, -2_000_000))),
)


class Pair:
    """The specification and the scripts, side by side. No slot is free, so that only limits decide."""

    def __init__(self, replica: Replica, clock: Clock) -> None:
        self.queue = Queue(RULES)
        self.replica = replica
        self.clock = clock
        self.places: list[Place] = []
        self.kinds: list[Kind] = []

    async def arrive(self, drawn: list[tuple[str, tuple[int, list[tuple[str, int, int]]]]]) -> None:
        await self._compare([self._place(*values) for values in drawn])

    async def arrive_again(self, at: int) -> None:
        """A ticket of a reservation that is live, or was: another place, the same demand."""
        if self.places:
            old = self.places[at % len(self.places)]
            await self._compare([self._place_of(old.tenant, old.demand)])

    async def settle(self, at: int, amounts: list[int]) -> None:
        if self.places:
            place = self.places[at % len(self.places)]
            made = place.demand
            assert made is not None
            used = tuple(amounts[: len(made.claims)])
            await self._settle(Settlement(made.reservation, place.tenant, made.claims, used))

    async def settle_again(self, at: int) -> None:
        await self.settle(at, [0, 0, 0])

    async def passes(self, by_us: int) -> None:
        self.clock.move(by_us)

    async def _compare(self, places: list[Place]) -> None:
        answer = await self.replica.arrive(*places)
        for index, (place, arrived) in enumerate(zip(places, answer.body, strict=True)):
            # The script keeps those apart that arrive in one call.
            verdict, _ = self.queue.arrive(msgspec.structs.replace(place, waited_us=-index), self.clock.now_us)
            assert (arrived.kind, arrived.outcome) == (verdict.kind, verdict.worker or verdict.wait_us)
            assert arrived.readings == verdict.readings
            self.kinds.append(verdict.kind)
            self.places.append(place)

    async def _settle(self, settlement: Settlement) -> None:
        departures = Departures.none()
        departures.settle(settlement)
        await self.replica.call(ledger.depart(departures))
        self.queue.settle(settlement, self.clock.now_us)

    def _place(self, tenant: str, drawn: tuple[int, list[tuple[str, int, int]]]) -> Place:
        concurrent, claims = drawn
        made = tuple(Claim(limit, most, WINDOWS[limit], min(amount, most)) for limit, most, amount in claims)
        return self._place_of(tenant, Demand(self.replica.new_id(), concurrent, made))

    def _place_of(self, tenant: str, demand: Demand | None) -> Place:
        return Place(self.replica.new_id(), 2, "w", ("w",), tenant, 1.0, 1.0, 60_000_000, demand=demand)


async def run(url: str, happened: list[tuple[Any, ...]]) -> Pair:
    with redis.Redis.from_url(url) as client:
        client.flushall()
        clock = Clock(client)
        async with Replica(url, "r1", RULES) as replica:
            pair = Pair(replica, clock)
            await replica.sync({"w": 0})
            for name, *arguments in happened:
                await getattr(pair, name)(*arguments)
            dump = Dump(url)
            assert dump.reserved == pair.queue.quota.names()
            assert dump.reserving == set(dump.live)
            for tenant in "ab":
                assert len(dump.live.get(tenant, ())) == pair.queue.quota.live(tenant)
    return pair


def test_the_specification_and_the_scripts_limit_alike(valkey: Valkey) -> None:
    kinds: list[Kind] = []

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(event, min_size=30, max_size=100))
    def alike(happened: list[tuple[Any, ...]]) -> None:
        kinds.extend(asyncio.run(run(valkey.url, happened)).kinds)

    alike()
    for kind in (Kind.WAITS, Kind.RATE_LIMITED, Kind.TOO_MANY, Kind.TENANT_FULL):
        assert kinds.count(kind) > 40, f"hardly anything was {kind.name}"
