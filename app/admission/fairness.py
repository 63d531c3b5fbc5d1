"""The order in which waiting tickets are granted, as a pure machine: the executable specification.

`scripts/queue.lua` does the same, step by step, on state that all replicas share; a test drives both with the same
random events and compares every grant. Times are integer microseconds of one clock and come in as arguments.

- A *line* holds the tickets of one band that may go to the same set of workers, their *route*. In a line each tenant
  has a *flow*: its tickets by arrival, or shortest predicted first with ageing (`Rules.us_per_token` > 0).
- Start-time fair queueing inside a band: a flow's tag is where its next ticket starts in virtual time. Granting it
  moves the band's virtual time there and the tenant's finish to `tag + cost / weight`. The finish counts across
  routes: a tag that it has overtaken is put right when the flow is looked at.
- A slot of a worker goes to the smallest tag among the lines that the worker is in, band by band; among bands to the
  highest, where each `ageing_us` of waiting lifts a ticket by one, so that no band starves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import msgspec

from app.admission.quota import Demand, Metered, Quota, Reading, Settlement, Usage
from app.tenant import Band

# Tickets that held a slot already stand before all bands: their request has waited its turn once.
MOVED = 0
RANK = {band: rank for rank, band in enumerate(Band, start=1)}

DRAIN_WINDOW = 32  # grants that the drain rate is averaged over
TENANTS_KNOWN = 10_000  # whose finish is remembered; the one that is the least behind is forgotten first
DRAIN_TRUSTED = 16  # grants after which it is believed; below, nobody is refused because of it


class Rules(msgspec.Struct, array_like=True, frozen=True):
    """What bounds and shapes the order; limits are tickets and bytes of held request bodies that may wait."""

    tenant_limit: int
    band_limit: int
    total_limit: int
    tenant_bytes: int
    band_bytes: int
    total_bytes: int
    ageing_us: int
    us_per_token: int


class Place(msgspec.Struct, array_like=True, frozen=True):
    """A ticket as the order sees it. `candidates` are worker ids, best first; `band` is MOVED or a RANK.

    `patience_us` is what is left until its deadline and `waited_us` what it waited before, both at the time it arrives:
    clocks of different machines are never compared. `demand` is None for who has no limits, or has reserved already.
    """

    id: str
    band: int
    route: str
    candidates: tuple[str, ...]
    tenant: str
    weight: float
    cost: float
    patience_us: int
    waited_us: int = 0
    held_bytes: int = 0
    demand: Demand | None = None


class Kind(IntEnum):
    """What became of an arrival."""

    GRANTED = 0
    WAITS = 1
    TENANT_FULL = 2
    BAND_FULL = 3
    QUEUE_FULL = 4
    HOPELESS = 5
    RATE_LIMITED = 6
    TOO_MANY = 7


class Verdict(NamedTuple):
    """`worker` for GRANTED; otherwise `wait_us`, the expected wait at the present drain rate (0: not known), or until a
    limit has room. `readings` are those of the place's claims, afterwards.
    """

    kind: Kind
    worker: str = ""
    wait_us: int = 0
    readings: Sequence[Reading] = ()


class Standing(msgspec.Struct, array_like=True, frozen=True):
    """Where a waiting ticket stands among the `of` tickets of its flow, from 1, and its expected wait (0: not known).

    All zero for one that does not wait. Of other tenants it tells nothing.
    """

    position: int
    of: int
    wait_us: int


class Grant(NamedTuple):
    id: str
    worker: str


class Debt(NamedTuple):
    """What a tenant's virtual time in a band is put right by: (real - estimated cost) / weight."""

    band: int
    tenant: str
    amount: float


class Flow(msgspec.Struct, array_like=True, frozen=True):
    """What waits of one tenant in one line."""

    band: int
    route: str
    candidates: tuple[str, ...]
    tenant: str
    tickets: int
    oldest_us: int


class Overview(msgspec.Struct, array_like=True, frozen=True):
    """All that waits, and what it waits for: (route, mean gap between grants in us, how many it is the mean of), and
    (worker, slots held, slots); what the tenants asked for have used of their limits."""

    flows: list[Flow]
    drains: list[tuple[str, float, int]]
    slots: list[tuple[str, int, int]]
    usages: list[Usage] = []


@dataclass(slots=True)
class Drain:
    """How fast waiting tickets are granted, of a route or of a flow: mean gap between grants while somebody waits."""

    last_us: int
    gap_us: float = 0.0
    count: int = 0

    def granted(self, now_us: int) -> None:
        self.count = min(self.count + 1, DRAIN_WINDOW)
        self.gap_us += (now_us - self.last_us - self.gap_us) / self.count
        self.last_us = now_us


@dataclass(slots=True)
class _Waiting:
    place: Place
    order: float
    arrived_us: int
    deadline_us: int


@dataclass(slots=True)
class _Flow:
    tag: float
    drain: Drain
    tickets: list[tuple[float, str]] = field(default_factory=list)  # (order, id), sorted

    def wait_us(self, position: int, route: Drain) -> int:
        """At the flow's own pace, which tells what others take: higher bands, and tenants that do not wait now.

        A flow that gets nothing is as slow as the time for which its route was granted to others.
        """
        passed_by_us = route.last_us - self.drain.last_us
        gap_us = max(passed_by_us, self.drain.gap_us if self.drain.count >= DRAIN_TRUSTED else 0)
        return int(position * gap_us)


Line = tuple[int, str]  # band, route


class Queue:
    """The whole state of admission: slots, leases, waiting tickets, virtual times."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._slots: dict[str, int] = {}
        self._held: dict[str, dict[str, Place]] = defaultdict(dict)
        self._waiting: dict[str, _Waiting] = {}
        self._lines: dict[Line, dict[str, _Flow]] = {}
        self._of_worker: dict[str, set[Line]] = defaultdict(set)
        self._virtual: dict[int, float] = defaultdict(float)
        self._finish: dict[tuple[int, str], float] = {}
        self._depth: Counter[tuple[str, object]] = Counter()
        self._drain: dict[str, Drain] = {}
        self.quota = Quota()

    def held(self, worker: str) -> int:
        return len(self._held[worker])

    def slots(self, worker: str) -> int:
        return self._slots.get(worker, 0)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def set_slots(self, worker: str, slots: int, now_us: int) -> list[Grant]:
        self._slots[worker] = slots
        return self._grant(worker, now_us)

    def hold(self, place: Place, worker: str) -> None:
        """Note a lease that was granted elsewhere. It may stand above the worker's slots; then none are free."""
        self._held[worker][place.id] = place

    def arrive(self, place: Place, now_us: int) -> tuple[Verdict, list[Grant]]:
        """Grant `place` at once, let it wait, or refuse it. The grants are those of others that this brought about."""
        known = self._known(place, now_us)
        if known is not None:
            return self._with_readings(known, place, now_us), []
        verdict, grants = self._over_limits(place, now_us) or self._admit(place, now_us)
        if place.demand is not None and verdict.kind <= Kind.WAITS:
            self.quota.reserve(place.tenant, place.demand, now_us)
        return self._with_readings(verdict, place, now_us), grants

    def _with_readings(self, verdict: Verdict, place: Place, now_us: int) -> Verdict:
        if place.demand is None:
            return verdict
        return verdict._replace(readings=self.quota.readings(place.tenant, place.demand.claims, now_us))

    def _over_limits(self, place: Place, now_us: int) -> tuple[Verdict, list[Grant]] | None:
        found = place.demand and self.quota.objection(place.tenant, place.demand, now_us)
        if not found:
            return None
        return Verdict(Kind.TOO_MANY if found.is_live else Kind.RATE_LIMITED, wait_us=found.wait_us), []

    def _admit(self, place: Place, now_us: int) -> tuple[Verdict, list[Grant]]:
        for worker in place.candidates:
            if self._is_free(worker) and not self._of_worker[worker]:
                self._take(place, worker, self._start(place))
                return Verdict(Kind.GRANTED, worker), []
        wait_us = self._expected_wait(place, now_us)
        refusal = self._refusal(place, wait_us)
        if refusal is not None:
            return Verdict(refusal, wait_us=wait_us), []
        self._enqueue(place, now_us)
        grants = [grant for worker in place.candidates for grant in self._grant(worker, now_us)]
        mine = next((grant for grant in grants if grant.id == place.id), None)
        if mine is not None:
            grants.remove(mine)
            return Verdict(Kind.GRANTED, mine.worker), grants
        return Verdict(Kind.WAITS, wait_us=wait_us), grants

    def release(self, lease_id: str, worker: str, debt: Debt, now_us: int) -> list[Grant]:
        """Free a slot and grant it to who is next. A lease that is not held changes nothing."""
        if self._held[worker].pop(lease_id, None) is None:
            return []
        self._settle(debt)
        return self._grant(worker, now_us)

    def settle(self, settlement: Settlement, now_us: int) -> None:
        """End a reservation. It outlives its ticket and every lease that the ticket became."""
        self.quota.settle(settlement, now_us)

    def cancel(self, ticket_id: str) -> bool:
        """Take a waiting ticket out. False if it does not wait."""
        waiting = self._waiting.get(ticket_id)
        if waiting is not None:
            self._dequeue(waiting)
        return waiting is not None

    def _known(self, place: Place, now_us: int) -> Verdict | None:
        for worker in place.candidates:
            if place.id in self._held[worker]:
                return Verdict(Kind.GRANTED, worker)
        if place.id in self._waiting:
            return Verdict(Kind.WAITS, wait_us=self._expected_wait(place, now_us))
        return None

    def _is_free(self, worker: str) -> bool:
        return len(self._held[worker]) < self._slots.get(worker, 0)

    # Bounds

    def _refusal(self, place: Place, wait_us: int) -> Kind | None:
        if place.band == MOVED:
            return None  # there are never more of these than slots
        rules, tenant, band = self._rules, place.tenant, place.band
        for kind, scope, limit, limit_bytes in (
            (Kind.TENANT_FULL, ("tenant", tenant), rules.tenant_limit, rules.tenant_bytes),
            (Kind.BAND_FULL, ("band", band), rules.band_limit, rules.band_bytes),
            (Kind.QUEUE_FULL, ("all", None), rules.total_limit, rules.total_bytes),
        ):
            tickets, held_bytes = self._depth[scope], self._depth["bytes", scope]
            if tickets + 1 > limit or held_bytes + place.held_bytes > limit_bytes:
                return kind
        drain = self._drain.get(place.route)
        if drain is not None and drain.count >= DRAIN_TRUSTED and wait_us > place.patience_us:
            return Kind.HOPELESS
        return None

    def _order(self, place: Place, now_us: int) -> float:
        """Where it stands in its flow, in microseconds: by arrival, put back by what it is expected to cost."""
        return now_us - place.waited_us + self._rules.us_per_token * place.cost

    def _expected_wait(self, place: Place, now_us: int) -> int:
        """Of one that comes now."""
        flow = self._lines.get((place.band, place.route), {}).get(place.tenant)
        position = bisect_left(flow.tickets, (self._order(place, now_us), "")) + 1 if flow else 1
        return self._wait_at(place, position, newcomers=1)

    def _wait_at(self, place: Place, position: int, newcomers: int) -> int:
        """The longer of what the paces of its route and of its own flow tell of this position in the flow."""
        drain = self._drain.get(place.route)
        if drain is None:
            return 0
        flows = self._lines.get((place.band, place.route), {})
        ahead = self._ahead(place, position * (len(flows) + (place.tenant not in flows)), newcomers)
        at_own_pace = flows[place.tenant].wait_us(position, drain) if place.tenant in flows else 0
        return max(int(ahead * drain.gap_us), at_own_pace)

    def _ahead(self, place: Place, in_turn: int, newcomers: int) -> int:
        """How many are granted first, if all cost the same: the higher bands; of each flow as many as of its own."""
        higher = sum(self._depth["line", (band, place.route)] for band in range(place.band))
        return higher + min(self._depth["line", (place.band, place.route)] + newcomers, in_turn)

    def _count(self, place: Place, sign: int) -> None:
        for scope in (("tenant", place.tenant), ("band", place.band), ("all", None)):
            self._add(scope, sign)
            self._add(("bytes", scope), sign * place.held_bytes)
        self._add(("line", (place.band, place.route)), sign)

    def _add(self, key: tuple[str, object], amount: int) -> None:
        self._depth[key] += amount
        if not self._depth[key]:
            del self._depth[key]

    # Waiting

    def _enqueue(self, place: Place, now_us: int) -> None:
        order = self._order(place, now_us)
        waiting = _Waiting(place, order, now_us - place.waited_us, now_us + place.patience_us)
        self._waiting[place.id] = waiting
        line = (place.band, place.route)
        if line not in self._lines:
            self._lines[line] = {}
            for worker in place.candidates:
                self._of_worker[worker].add(line)
        flow = self._lines[line].setdefault(place.tenant, _Flow(self._start(place), Drain(now_us)))
        insort(flow.tickets, (order, place.id))
        if not any(self._depth["line", (band, place.route)] for band in range(len(Band) + 1)):
            self._drain.setdefault(place.route, Drain(now_us)).last_us = now_us
        self._count(place, 1)

    def _dequeue(self, waiting: _Waiting) -> None:
        place = waiting.place
        line = (place.band, place.route)
        del self._waiting[place.id]
        self._count(place, -1)
        flow = self._lines[line][place.tenant]
        del flow.tickets[bisect_left(flow.tickets, (waiting.order, place.id))]
        if flow.tickets:
            return
        del self._lines[line][place.tenant]
        if not self._lines[line]:
            del self._lines[line]
            for worker in place.candidates:
                self._of_worker[worker].discard(line)

    # Granting

    def _grant(self, worker: str, now_us: int) -> list[Grant]:
        """Hand out the free slots of `worker`."""
        grants = []
        while self._is_free(worker):
            found = self._next_for(worker, now_us)
            if found is None:
                break
            tag, waiting = found
            place = waiting.place
            self._drain[place.route].granted(now_us)
            flow = self._lines[place.band, place.route][place.tenant]
            flow.drain.granted(now_us)
            self._dequeue(waiting)
            flow.tag = self._take(place, worker, tag)
            grants.append(Grant(place.id, worker))
        return grants

    def _next_for(self, worker: str, now_us: int) -> tuple[float, _Waiting] | None:
        first: dict[int, tuple[float, str, _Waiting]] = {}
        for line in sorted(self._of_worker[worker]):
            head = self._head(line, now_us)
            if head is not None and (line[0] not in first or head[0] < first[line[0]][0]):
                first[line[0]] = (head[0], line[1], head[1])
        if not first:
            return None
        band = min(first, key=lambda band: (self._level(band, first[band][2], now_us), band))
        return first[band][0], first[band][2]

    def _level(self, band: int, waiting: _Waiting, now_us: int) -> int:
        return band - (now_us - waiting.arrived_us) // self._rules.ageing_us

    def _head(self, line: Line, now_us: int) -> tuple[float, _Waiting] | None:
        """The flow with the smallest tag, and its first ticket that has not expired."""
        while flows := self._lines.get(line):
            tenant = min(flows, key=lambda tenant: (flows[tenant].tag, tenant))
            flow = flows[tenant]
            finish = self._finish_of(line[0], tenant)
            if finish > flow.tag:
                flow.tag = finish
                continue
            waiting = self._waiting[flow.tickets[0][1]]
            if waiting.deadline_us > now_us:
                return flow.tag, waiting
            self._dequeue(waiting)
        return None

    def standing(self, ticket_id: str) -> Standing:
        waiting = self._waiting.get(ticket_id)
        if waiting is None:
            return Standing(0, 0, 0)
        place = waiting.place
        tickets = self._lines[place.band, place.route][place.tenant].tickets
        position = bisect_left(tickets, (waiting.order, ticket_id)) + 1
        return Standing(position, len(tickets), self._wait_at(place, position, newcomers=0))

    def overview(self, now_us: int, metered: Sequence[Metered] = ()) -> Overview:
        flows = []
        for (band, route), line in sorted(self._lines.items()):
            for tenant, flow in sorted(line.items()):
                waiting = [self._waiting[name] for _, name in flow.tickets]
                oldest = max(now_us - ticket.arrived_us for ticket in waiting)
                flows.append(Flow(band, route, waiting[0].place.candidates, tenant, len(waiting), oldest))
        drains = [(route, drain.gap_us, drain.count) for route, drain in self._drain.items()]
        slots = [(worker, len(self._held[worker]), count) for worker, count in self._slots.items()]
        return Overview(flows, drains, slots, [self.quota.usage(tenant, now_us) for tenant in metered])

    # Virtual time

    def _start(self, place: Place) -> float:
        return max(self._virtual[place.band], self._finish_of(place.band, place.tenant))

    def _finish_of(self, band: int, tenant: str) -> float:
        """Where the tenant's last ticket ended; 0 if virtual time has passed it, which is as good as forgotten."""
        finish = self._finish.get((band, tenant), 0.0)
        return finish if finish > self._virtual[band] else 0.0

    def _take(self, place: Place, worker: str, tag: float) -> float:
        """Give `place` a slot of `worker`; the tenant's finish."""
        self._held[worker][place.id] = place
        self._virtual[place.band] = max(self._virtual[place.band], tag)
        finish = tag + place.cost / place.weight
        self._put_finish(place.band, place.tenant, finish)
        return max(self._virtual[place.band], finish)

    def _settle(self, debt: Debt) -> None:
        band, tenant, amount = debt
        if amount:
            finish = self._finish_of(band, tenant)
            if finish or amount > 0:
                self._put_finish(band, tenant, max(finish, self._virtual[band]) + amount)

    def _put_finish(self, band: int, tenant: str, finish: float) -> None:
        if finish > self._virtual[band]:
            self._finish[band, tenant] = finish
        else:
            self._finish.pop((band, tenant), None)
        if len(self._finish) > TENANTS_KNOWN:
            self._finish = {key: value for key, value in self._finish.items() if value > self._virtual[key[0]]}
        if len(self._finish) > TENANTS_KNOWN:
            del self._finish[min(self._finish, key=self._finish.__getitem__)]
