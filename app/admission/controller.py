"""Admission shared by all gateway processes: one task that batches their calls of the ledger, and lives without it.

While a call is under way the next one gathers: whatever arrives and leaves meanwhile goes in one write, as one call of
a script each. Nobody but this task waits for Redis, and it never waits longer than a second.

    shared ──no answer, or an error──> local: a static part of the slots, or refusals, as configured
       ^───answers; all is told────────┘     open streams are not touched by either step
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from app import settings
from app.admission import ledger
from app.admission.census import Census
from app.admission.fairness import Debt, Grant, Kind, Overview, Place
from app.admission.ledger import (
    Answer,
    Arrived,
    Call,
    Departures,
    Heard,
    Ledger,
    LedgerChanged,
    LedgerFull,
    LedgerGone,
    LiveReservation,
    LocalTakings,
    Outcome,
    Scripts,
    SharedRules,
    Synced,
)
from app.admission.local import LocalDesk
from app.admission.quota import Metered, Settlement, Taking
from app.admission.reservation import Reservation
from app.admission.roster import US, QueuedAdmission, QueuedLease, Roster, new_name, rules_of
from app.errors import ConfigurationError, DependencyUnavailable, Overloaded
from app.telemetry.logs import Log
from app.telemetry.metrics import Metrics

RETRY_S = 0.5
UNTOLD = 16  # times without Redis whose takings are kept until Redis has heard of them
ARRIVALS_PER_CALL = 512  # keeps one script call below some ten milliseconds, for all replicas' sake
DEPARTURES_PER_CALL = 512
RENEWALS_PER_LEASE = 3
REAPS_PER_LEASE = 7.5
SETTLE_MARGIN_S = 1.0


class SharedDesk:
    """See `roster.Desk`: collects what the next call of the ledger is to tell."""

    def __init__(self, roster: Roster, due: asyncio.Event, limit: int) -> None:
        self._roster = roster
        self._due = due
        self._limit = limit
        self.arrivals: dict[str, QueuedLease] = {}
        self.departures = Departures.none()
        self.sent = Departures.none()
        self.asked: list[str] = []
        self.is_synced = False

    def arrive(self, lease: QueuedLease) -> None:
        if len(self.arrivals) >= self._limit:
            self._roster.refuse_as(lease, Kind.QUEUE_FULL, 0)
            return
        self.arrivals[lease.id] = lease
        self._due.set()

    def leave(self, lease: QueuedLease, debt: Debt) -> None:
        if self.arrivals.pop(lease.id, None) is not None:
            return
        if lease.worker_id:
            self.departures.release(lease.id, lease.worker_id, debt)
        else:
            self.departures.cancel(lease.id, lease.ticket.candidates, debt)
        self._due.set()

    def settle(self, settlement: Settlement) -> None:
        self.departures.settle(settlement)
        self._due.set()

    def set_slots(self, worker_id: str, slots: int) -> None:
        self.is_synced = False
        self._due.set()

    def ask_standing(self, tickets: list[str]) -> None:
        self.asked = tickets
        self._due.set()

    def take_arrivals(self) -> list[QueuedLease]:
        """Those for the next call, first come first."""
        if len(self.arrivals) <= ARRIVALS_PER_CALL:
            taken, self.arrivals = list(self.arrivals.values()), {}
            return taken
        self._due.set()
        return [self.arrivals.pop(lease_id) for lease_id in list(self.arrivals)[:ARRIVALS_PER_CALL]]

    def take_departures(self) -> Departures:
        """Those for the next call."""
        self.sent = self.departures.take(DEPARTURES_PER_CALL)
        if self.departures:
            self._due.set()
        return self.sent

    def clear(self) -> None:
        """What was collected is void, but for settlements: they count whenever they are told, and no more than once."""
        self.arrivals = {}
        self.departures = Departures([], [], [*self.sent.settlements, *self.departures.settlements])
        self.sent = Departures.none()
        self.asked = []
        self.is_synced = False


class ClosedDesk(LocalDesk):
    """Without Redis, and told to serve nothing then: what is held is noted, whoever comes is refused."""

    def arrive(self, lease: QueuedLease) -> None:
        self._roster.refuse(
            lease.id, DependencyUnavailable("A part of the service is out of reach. Please try again.", retry_after_s=2)
        )


class RedisAdmission(QueuedAdmission):
    """See `ticket.Admission`. Enter `running` before use."""

    def __init__(
        self,
        limits: settings.Admission,
        redis: settings.Redis,
        replicas: int,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
        scripts: Scripts | None = None,
    ) -> None:
        self._due = asyncio.Event()
        self._rules = rules_of(limits)
        roster = Roster(new_name(), metrics, clock)
        self._shared = SharedDesk(roster, self._due, limits.queue_limit + ARRIVALS_PER_CALL)
        super().__init__(limits, roster, self._shared)
        self._metrics = metrics
        metrics.ledger_resyncs.labels("changed")
        self._log = log
        self._clock = clock
        self._renew_s = limits.lease_s / RENEWALS_PER_LEASE
        settle_s = self._renew_s + 2 * redis.call_timeout_s
        self._census = Census(replicas, memory_s=limits.lease_s, settle_s=settle_s)
        self._reap_s = limits.lease_s / REAPS_PER_LEASE
        shared_rules = SharedRules(
            self._rules,
            lease_us=int(limits.lease_s * US),
            settle_us=int((self._renew_s + SETTLE_MARGIN_S) * US),
            replicas=replicas,
        )
        self._ledger = Ledger(redis, roster.name, shared_rules, scripts or Scripts())
        self._sync_at = self._reap_at = self._opens_at = 0.0
        self._fenced: frozenset[str] = frozenset()
        self._untold: deque[tuple[int, list[Taking]]] = deque(maxlen=UNTOLD)
        self._episode = 0
        self._asked: list[tuple[asyncio.Future[Overview], Sequence[Metered]]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Attend to the ledger. Raises ConfigurationError for a server that must not hold it."""
        try:
            await self._ledger.open()
        except LedgerGone as error:
            self._go_local(str(error))
        if self._ledger.doubt is not None:
            self._log.warning("redis in doubt", doubt=self._ledger.doubt)
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self.announcer.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._take_leave()

    async def overview(self, metered: Sequence[Metered] = ()) -> Overview:
        if isinstance(self.desk, LocalDesk):
            return self.desk.overview(metered)
        asked: asyncio.Future[Overview] = asyncio.get_running_loop().create_future()
        self._asked.append((asked, metered))
        self._due.set()
        return await asked

    @property
    def processes(self) -> int:
        return self._census.processes

    @property
    def is_degraded(self) -> bool:
        return self.desk is not self._shared

    # One life with the ledger after another

    async def _run(self) -> None:
        while True:
            try:
                if self.is_degraded:
                    await self._ledger.open()
                    self._come_back()
                await self._attend()
            except* (LedgerGone, ConfigurationError) as gone:
                self._go_local(str(_first(gone)))
            await self._ledger.close()
            await asyncio.sleep(RETRY_S)

    async def _attend(self) -> None:
        self._sync_at = self._reap_at = self._opens_at = 0.0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            while True:
                await self._until_due()
                await self._tick()

    async def _listen(self) -> None:
        async for grants in self._ledger.grants():
            self._granted(grants)

    async def _until_due(self) -> None:
        left_s = max(0.0, min(self._sync_at, self._reap_at) - self._clock())
        timer = asyncio.get_running_loop().call_later(left_s, self._due.set)
        await self._due.wait()
        timer.cancel()
        self._due.clear()

    async def _take_leave(self) -> None:
        """The last word: nothing is held, waited for or seen here any more."""
        if not self.is_degraded:
            with suppress(LedgerGone):
                await self._ledger.exchange(
                    [ledger.depart(self._shared.departures), ledger.sync((), (), (), _new_epoch())]
                )
        await self._ledger.close()

    def _go_local(self, reason: str) -> None:
        """What was sent and not answered counts as never sent: a new id, so that a grant of the old one is unknown."""
        if self.is_degraded:
            return
        self._log.warning("redis is out of reach", reason=reason, until="it answers", mode=self._limits.without_redis)
        self._metrics.admission_degraded.set(1)
        self.steered = {}
        desk = LocalDesk if self._limits.without_redis == "local" else ClosedDesk
        local = self.desk = desk(self._rules, self.roster, self._clock, self._census.share)
        self._shared.clear()
        for worker_id, slots in self.slots.items():
            local.set_slots(worker_id, self.share(slots))
        for lease in self.roster.held.values():
            local.hold(lease)
        for reservation in self.roster.reserved.values():
            if reservation.home is not None:
                local.hold_reservation(reservation)
        for lease in self.roster.in_order():
            self.roster.rename(lease)
            local.arrive(lease)
        for asked, metered in self._asked:
            if not asked.done():
                asked.set_result(local.overview(metered))
        self._asked = []

    def _come_back(self) -> None:
        """All leases, those granted here too, are told before anything new is granted: a tick syncs before it asks."""
        self._log.warning("redis is back", leases=len(self.roster.held), tickets=len(self.roster.waiting))
        self._metrics.admission_degraded.set(0)
        if isinstance(self.desk, LocalDesk):
            self._episode += 1
            self._untold.append((self._episode, self.desk.takings_of_ended()))
        self.desk = self._shared
        for lease in self.roster.waiting.values():
            lease.is_again = True  # the ledger will not know it, say so, and get it in the next call

    def share(self, slots: int) -> int:
        """Without the ledger nobody knows what the others grant, so each keeps to its part."""
        return self._census.share(slots) if self.is_degraded else slots

    # One tick

    async def _tick(self) -> None:
        """Tell what left, renew and reap if it is time, ask for what came. In this order, in one write."""
        now = self._clock()
        calls: list[Call] = []
        heard: list[Callable[[Outcome], object]] = []
        if self._shared.departures:
            calls.append(ledger.depart(self._shared.take_departures()))
            heard.append(self._hear_departures)
        if now >= self._sync_at or not self._shared.is_synced:
            calls.append(self._sync_call())
            heard.append(self._hear_sync)
        if self._shared.arrivals:
            arrivals = self._shared.take_arrivals()
            calls.append(ledger.arrive([self._place(lease, now) for lease in arrivals]))
            heard.append(lambda outcome: self._hear_arrivals(arrivals, outcome))
        if now >= self._reap_at:
            self._reap_at = now + self._reap_s
            calls.append(ledger.reap())
            heard.append(self._hear)
        if self._asked:
            calls.append(ledger.look(max((metered for _, metered in self._asked), key=len)))
            heard.append(self._hear_overview)
        if self._shared.asked:
            asked, self._shared.asked = self._shared.asked, []
            calls.append(ledger.standing(asked))
            heard.append(lambda outcome: self._hear_standing(asked, outcome))
        if calls:
            for hear, outcome in zip(heard, await self._ledger.exchange(calls), strict=True):
                hear(outcome)

    def _place(self, lease: QueuedLease, now: float) -> Place:
        """First come, first served by the server's clock; who asks again keeps the time of the first asking."""
        waited_s = now - lease.since if lease.is_again else 0.0
        place = lease.place(now, self.roster.route(lease.ticket.candidates), waited_s)
        lease.is_again = True
        return place

    def _sync_call(self) -> Call:
        self._shared.is_synced = True
        self._sync_at = self._clock() + self._renew_s
        leases = [(lease.id, lease.worker_id) for lease in self.roster.held.values()]
        tickets = [lease_id for lease_id in self.roster.waiting if lease_id not in self._shared.arrivals]
        limits, slots = list(self.limits.items()), list(self.slots.items())
        reserved, given = self._reservations(), self._given()
        return ledger.sync(leases, tickets, slots, _new_epoch(), limits, reserved, given, self._ledger.run_id)

    def _given(self) -> list[LocalTakings]:
        now_us = int(self._clock() * US)
        return [
            LocalTakings(number, [(*taking[:3], now_us - taking.taken_us, taking.amount) for taking in takings])
            for number, takings in self._untold
        ]

    def _reservations(self) -> list[LiveReservation]:
        now = self._clock()
        return [
            LiveReservation(name, made.tenant, int((now - made.made) * US), made.demand.claims, self._heard(made))
            for name, made in self.roster.reserved.items()
        ]

    def _heard(self, reservation: Reservation) -> Heard:
        if reservation.home is None:
            return Heard.NOTHING
        return Heard.TAKEN if reservation.home is self._shared else Heard.GIVEN

    def _hear(self, outcome: Outcome) -> Answer | None:
        """What all calls have in common: grants, and whether the ledger wants to be told anew."""
        if isinstance(outcome, Answer):
            self._granted(outcome.grants)
            if outcome.opens_in_s and self._clock() > self._opens_at:
                self._sync_at = 0.0
                self._due.set()
            return outcome
        if isinstance(outcome, LedgerChanged):
            self._metrics.ledger_resyncs.labels("changed").inc()
            self._sync_at = 0.0
            self._due.set()
        return None

    def _hear_departures(self, outcome: Outcome) -> None:
        self._shared.sent = Departures.none()
        self._hear(outcome)

    def _hear_sync(self, outcome: Outcome) -> None:
        if isinstance(outcome, Answer):
            # Once told, there is nothing to do but wait until the others have told as well.
            self._opens_at = self._clock() + outcome.opens_in_s
            self._reap_at = min(self._reap_at, self._opens_at) if outcome.opens_in_s else self._reap_at
        answer = self._hear(outcome)
        if answer is None:
            return
        synced: Synced = answer.body
        self._untold.clear()
        for reservation in self.roster.reserved.values():
            if reservation.home is not None:
                reservation.home = self._shared
        self.steered = dict(synced.steered)
        self._census.heard(synced.replicas, self._clock())
        self._ledger.expect(self._census.processes)
        lost = frozenset(synced.lost)
        if lost - self._fenced:
            self._log.warning("leases lost, their slots are taken", leases=len(lost - self._fenced))
            self._metrics.leases_fenced.inc(len(lost - self._fenced))
        self._fenced = lost
        for lease_id in synced.missing:
            if lease_id in self.roster.waiting:
                self._shared.arrive(self.roster.waiting[lease_id])

    def _hear_arrivals(self, arrivals: Sequence[QueuedLease], outcome: Outcome) -> None:
        answer = self._hear(outcome)
        if answer is not None:
            for lease, arrived in zip(arrivals, answer.body, strict=True):
                self._arrived(lease, arrived)
            return
        for lease in arrivals:
            if isinstance(outcome, LedgerFull):
                self.roster.refuse(
                    lease.id, Overloaded("The queue is out of memory. Please try again later.", retry_after_s=5)
                )
            elif lease.id in self.roster.waiting:
                self._shared.arrive(lease)

    def _hear_overview(self, outcome: Outcome) -> None:
        if isinstance(outcome, Answer):
            self._tell_overview(outcome.body)

    def _hear_standing(self, asked: Sequence[str], outcome: Outcome) -> None:
        if isinstance(outcome, Answer):
            for ticket_id, standing in zip(asked, outcome.body, strict=True):
                self.roster.tell(ticket_id, standing)

    def _tell_overview(self, overview: Overview) -> None:
        asked, self._asked = self._asked, []
        for future, _ in asked:
            if not future.done():
                future.set_result(overview)

    def _arrived(self, lease: QueuedLease, arrived: Arrived) -> None:
        if arrived.kind <= Kind.WAITS:
            self.roster.reserve(lease, self._shared, arrived.readings)
        if isinstance(arrived.outcome, str):
            self.roster.grant(lease.id, arrived.outcome)
        elif arrived.kind is Kind.WAITS:
            self.roster.park(lease, arrived.outcome)
        else:
            self.roster.refuse_as(lease, arrived.kind, arrived.outcome, arrived.readings)

    def _granted(self, grants: Sequence[Grant]) -> None:
        for grant in grants:
            self.roster.grant(grant.id, grant.worker)


def _new_epoch() -> str:
    return secrets.token_hex(8)


def _first(group: BaseExceptionGroup[Exception]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
