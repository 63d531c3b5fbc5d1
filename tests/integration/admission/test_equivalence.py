"""fairness.py and the scripts are one machine: random events through both, every grant, wait and refusal compared."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.admission import ledger
from app.admission.fairness import MOVED, Debt, Kind, Place, Queue
from app.admission.ledger import Departures
from tests.integration.admission.driving import RULES, Clock, Replica
from tests.processes import Valkey

WORKERS = ("w1", "w2", "w3")
ROUTES = (("w1",), ("w2", "w1"), ("w1", "w2"), ("w3",), ("w3", "w2", "w1"))
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 3.0}

arrival = st.tuples(
    st.sampled_from((MOVED, 1, 2, 2, 3, 4)),
    st.sampled_from(ROUTES),
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from((1.0, 10.0, 33.0, 400.0)),
    st.sampled_from((500_000, 60_000_000, 60_000_000)),
    st.sampled_from((0, 0, 300)),
)
pick = st.integers(0, 1 << 16)
arrive = st.tuples(st.just("arrive"), st.lists(arrival, min_size=1, max_size=3))
release = st.tuples(st.just("release"), pick, st.sampled_from((0.0, 0.0, 7.5, -20.0, 300.0)))
event = st.one_of(
    arrive,
    arrive,
    release,
    release,
    st.tuples(st.just("cancel"), pick),
    st.tuples(st.just("passes"), st.sampled_from((1, 1000, 70_000))),
    st.tuples(st.just("passes"), st.sampled_from((2_100_000, 4_000_000))),  # longer than a ticket needs to age
    st.just(("stand",)),
    st.tuples(st.just("resize"), st.sampled_from(WORKERS), st.integers(0, 3)),
)


class Pair:
    """The specification and the scripts, side by side."""

    def __init__(self, queue: Queue, replica: Replica, clock: Clock) -> None:
        self.queue = queue
        self.replica = replica
        self.clock = clock
        self.slots = dict.fromkeys(WORKERS, 2)
        self.held: dict[str, tuple[str, Place]] = {}
        self.waiting: dict[str, Place] = {}
        self.outcomes: list[str] = []

    async def begin(self) -> None:
        for worker, slots in self.slots.items():
            self.queue.set_slots(worker, slots, self.clock.now_us)
        await self.replica.sync(self.slots)

    async def arrive(self, drawn: list[tuple[Any, ...]]) -> None:
        places = [self._place(*values) for values in drawn]
        answer = await self.replica.arrive(*places)
        expected: dict[str, str] = {}
        refused: dict[str, tuple[Kind, int]] = {}
        waits: dict[str, int] = {}
        for index, place in enumerate(places):
            self.waiting[place.id] = place
            # Those of one call keep their order: each counts as a microsecond younger than the one before it.
            verdict, grants = self.queue.arrive(msgspec.structs.replace(place, waited_us=-index), self.clock.now_us)
            expected.update(grants)
            if verdict.kind is Kind.GRANTED:
                expected[place.id] = verdict.worker
            elif verdict.kind is Kind.WAITS:
                waits[place.id] = verdict.wait_us
            else:
                refused[place.id] = (verdict.kind, verdict.wait_us)
                del self.waiting[place.id]
        told = {place.id: arrived for place, arrived in zip(places, answer.body, strict=True)}
        granted = dict(answer.grants) | {k: v.outcome for k, v in told.items() if v.kind is Kind.GRANTED}
        assert granted == expected
        assert {k: (v.kind, v.outcome) for k, v in told.items() if v.kind > Kind.WAITS} == refused
        assert {k: told[k].outcome for k in waits} == waits
        self._note(expected)

    async def release(self, at: int, amount: float) -> None:
        if not self.held:
            return
        lease_id = sorted(self.held)[at % len(self.held)]
        worker, place = self.held.pop(lease_id)
        debt = Debt(place.band, place.tenant, amount)
        departures = Departures.none()
        departures.release(lease_id, worker, debt)
        expected = dict(self.queue.release(lease_id, worker, debt, self.clock.now_us))
        assert dict((await self.replica.call(ledger.depart(departures))).grants) == expected
        self._note(expected)

    async def cancel(self, at: int) -> None:
        if not self.waiting:
            return
        place = self.waiting.pop(sorted(self.waiting)[at % len(self.waiting)])
        self.queue.cancel(place.id)
        departures = Departures.none()
        departures.cancel(place.id, place.candidates, Debt(place.band, place.tenant, 0.0))
        assert (await self.replica.call(ledger.depart(departures))).grants == []

    async def stand(self) -> None:
        """Where everybody stands, the held and the unknown too."""
        ids = [*self.waiting, *list(self.held)[:2], "r1.unknown"]
        answer = await self.replica.call(ledger.standing(ids))
        assert answer.body == [self.queue.standing(ticket_id) for ticket_id in ids]

    async def passes(self, by_us: int) -> None:
        """A replica is never silent for long: then it syncs."""
        self.clock.move(by_us)
        if by_us > 1_000_000:
            await self.resize(WORKERS[0], self.slots[WORKERS[0]])

    async def resize(self, worker: str, slots: int) -> None:
        """A sync, which looks at every worker for free slots."""
        self.slots[worker] = slots
        grants_of = {name: self.queue.set_slots(name, self.slots[name], self.clock.now_us) for name in WORKERS}
        expected = {ticket: name for grants in grants_of.values() for ticket, name in grants}
        leases = [(lease_id, where) for lease_id, (where, _) in self.held.items()]
        body, grants = await self.replica.sync(self.slots, leases, [*self.waiting])
        assert body.lost == []
        assert dict(grants) == expected
        self.waiting = {k: v for k, v in self.waiting.items() if k not in body.missing}
        self._note(expected)

    def _note(self, granted: dict[str, str]) -> None:
        for ticket_id, worker in granted.items():
            self.held[ticket_id] = (worker, self.waiting.pop(ticket_id))
            self.outcomes.append(worker)

    def _place(
        self, band: int, candidates: tuple[str, ...], tenant: str, cost: float, patience_us: int, held_bytes: int
    ) -> Place:
        return Place(
            id=self.replica.new_id(),
            band=band,
            route="+".join(sorted(candidates)),
            candidates=candidates,
            tenant=tenant,
            weight=WEIGHTS[tenant],
            cost=0.0 if band == MOVED else cost,
            patience_us=patience_us,
            held_bytes=held_bytes,
        )


async def run(url: str, happened: list[tuple[Any, ...]], us_per_token: int) -> Pair:
    rules = msgspec.structs.replace(RULES, us_per_token=us_per_token)
    with redis.Redis.from_url(url) as client:
        client.flushall()
        clock = Clock(client)
        async with Replica(url, "r1", rules) as replica:
            pair = Pair(Queue(rules), replica, clock)
            await pair.begin()
            for name, *arguments in happened:
                await getattr(pair, name)(*arguments)
    return pair


@pytest.mark.parametrize("us_per_token", [0, 50_000], ids=["fifo", "shortest_first"])
def test_the_specification_and_the_scripts_grant_alike(valkey: Valkey, us_per_token: int) -> None:
    total = 0

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(event, min_size=40, max_size=120))
    def alike(happened: list[tuple[Any, ...]]) -> None:
        nonlocal total
        total += len(asyncio.run(run(valkey.url, happened, us_per_token)).outcomes)

    alike()
    assert total > 500, "hardly anything was granted"
