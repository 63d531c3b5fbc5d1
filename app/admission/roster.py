"""The tickets and leases of one process, and the desk that they stand at: in this process, or in the shared ledger."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Protocol, Self

from msgspec import structs

from app import settings
from app.admission.announcer import Announcer
from app.admission.cost import Costs
from app.admission.fairness import MOVED, RANK, Debt, Kind, Overview, Place, Rules, Standing
from app.admission.preemption import chosen
from app.admission.quota import CONCURRENT, Metered, Reading, Settlement
from app.admission.reservation import Home, Reservation, too_large
from app.admission.ticket import Ticket
from app.errors import Allowance, GatewayError, NoHealthyWorker, Overloaded, QueueTimeout, TenantQueueFull
from app.inference import Band, QueueListener, Spent, TokenUsage
from app.telemetry.metrics import Metrics

US = 1_000_000
FOREVER_US = 10**15
ROUTES_KNOWN = 4096
MIB = 1024 * 1024


class QueuedLease:
    """See `ticket.Lease`. Waiting while `worker_id` is empty and `granted` is pending; over when it is on no roster.

    `id` is new for every slot that is waited for: 128 random bits, after the name of the process that holds it.
    """

    __slots__ = (
        "_admission",
        "cost",
        "deadline",
        "granted",
        "id",
        "is_again",
        "is_moved",
        "is_preempted",
        "is_unserved",
        "reservation",
        "since",
        "ticket",
        "timer",
        "wait_us",
        "waited_s",
        "worker_id",
    )

    def __init__(self, admission: QueuedAdmission, ticket: Ticket, cost: float) -> None:
        self._admission = admission
        self.ticket = ticket
        self.cost = cost
        self.id = ""
        self.worker_id = ""
        self.waited_s = ticket.waited_s
        self.is_again = False
        self.is_moved = False
        self.is_preempted = False
        self.is_unserved = False
        self.wait_us = 0
        self.since = 0.0
        self.deadline = float("inf")
        self.granted: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.reservation: Reservation | None = None

    @property
    def allowances(self) -> tuple[Allowance, ...]:
        """What was left of its tenant's limits when it arrived."""
        return () if self.reservation is None else self.reservation.allowances

    @property
    def band(self) -> int:
        return MOVED if self.is_moved else RANK[self.ticket.band]

    @property
    def tokens(self) -> float:
        """What a slot costs its tenant; a move has been paid for."""
        return 0.0 if self.is_moved else self.cost

    @property
    def on_wait(self) -> QueueListener | None:
        return self.ticket.on_wait

    @property
    def is_waiting(self) -> bool:
        return not self.worker_id and self.granted is not None and not self.granted.done()

    def place(self, now: float, route: str, waited_s: float) -> Place:
        """Itself as the order sees it at `now`, monotonic seconds, after it has waited so long already."""
        ticket, reservation = self.ticket, self.reservation
        return Place(
            id=self.id,
            band=self.band,
            route=route,
            candidates=ticket.candidates,
            tenant=ticket.tenant.name,
            weight=ticket.tenant.weight,
            cost=self.tokens,
            patience_us=int(min(max(0.0, self.deadline - now) * US, FOREVER_US)),
            waited_us=int(waited_s * US),
            held_bytes=ticket.prompt_bytes,
            demand=reservation.demand if reservation is not None and reservation.home is None else None,
        )

    def debt(self, tokens: float) -> Debt:
        """Its tenant pays for `tokens` more than were estimated."""
        tenant = self.ticket.tenant
        return Debt(RANK[self.ticket.band], tenant.name, tokens / tenant.weight)

    async def move(self, candidates: tuple[str, ...]) -> None:
        await self._admission.move(self, candidates)

    def release(self, spent: TokenUsage | Spent | None = None) -> None:
        self._admission.leave(self, spent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Roster:
    """Who of this process waits and who holds. Only here a lease becomes one or the other."""

    def __init__(self, name: str, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.name = name
        self._metrics = metrics
        self.clock = clock
        self._routes: dict[tuple[str, ...], str] = {}
        self._loads: Counter[str] = Counter()
        self.waiting: dict[str, QueuedLease] = {}
        self.held: dict[str, QueuedLease] = {}
        self.preemptible: dict[str, QueuedLease] = {}
        """Those of `held` that may be asked to give their slot back, by grant."""
        self.reserved: dict[str, Reservation] = {}
        self.slots: dict[str, int] = {}
        """Of each worker, as this process was told."""

    def new_id(self) -> str:
        """Never given before: 128 random bits, after the name of this process."""
        return f"{self.name}.{os.urandom(16).hex()}"

    def enter(self, lease: QueuedLease, patience_s: float) -> asyncio.Future[None]:
        """A new wait begins, under a new id; done when it is granted."""
        lease.id = self.new_id()
        lease.since = self.clock()
        lease.deadline = min(lease.ticket.deadline, lease.since + patience_s)
        granted = lease.granted = asyncio.get_running_loop().create_future()
        lease.is_again = False
        self.waiting[lease.id] = lease
        return granted

    def rename(self, lease: QueuedLease) -> None:
        """A waiting lease goes on under another id, where the old one may or may not have been granted."""
        del self.waiting[lease.id]
        lease.id = self.new_id()
        self.waiting[lease.id] = lease

    def route(self, candidates: tuple[str, ...]) -> str:
        """The name of a set of workers, whatever their rank."""
        found = self._routes.get(candidates)
        if found is None:
            if len(self._routes) >= ROUTES_KNOWN:
                self._routes.clear()
            text = "\n".join(sorted(candidates)).encode()
            found = self._routes[candidates] = hashlib.blake2b(text, digest_size=8).hexdigest()
        return found

    def grant(self, lease_id: str, worker_id: str) -> None:
        """The ticket waits no more. Nothing happens if it has left: whoever left it has told so."""
        lease = self.waiting.pop(lease_id, None)
        if lease is None:
            return
        lease.worker_id = worker_id
        lease.waited_s += self.clock() - lease.since
        self.held[lease_id] = lease
        self._loads[worker_id] += 1
        if lease.ticket.on_preempt is not None:
            self.preemptible[lease_id] = lease
        self._finish(lease, None)

    def refuse(self, lease_id: str, error: GatewayError) -> None:
        lease = self.waiting.pop(lease_id, None)
        if lease is not None:
            self._finish(lease, error)

    def count_rejection(self, limit: str) -> None:
        self._metrics.limit_rejections.labels(limit).inc()

    def refuse_as(self, lease: QueuedLease, kind: Kind, wait_us: int, readings: Sequence[Reading] = ()) -> None:
        """Refused by the order's own bounds, or by a limit of its tenant."""
        limit, error = _refusal(lease, kind, wait_us, readings)
        if not lease.ticket.is_trial:
            self.count_rejection(limit)
        if lease.reservation is not None:
            self.reserved.pop(lease.reservation.demand.reservation, None)
        self.refuse(lease.id, error)

    def reserve(self, lease: QueuedLease, home: Home, readings: Sequence[Reading]) -> None:
        """Its demand is met, at `home`."""
        reservation = lease.reservation
        if reservation is not None and reservation.home is None:
            reservation.home, reservation.made = home, self.clock()
            reservation.readings = readings

    def park(self, lease: QueuedLease, wait_us: int) -> None:
        """It was not granted at once: from now on its deadline is watched, and who may have to makes room for it."""
        lease.wait_us = wait_us  # how long from here on, as far as the drain rate tells
        if lease.timer is None and lease.granted is not None and not lease.granted.done():
            left_s = max(0.0, lease.deadline - self.clock())
            lease.timer = asyncio.get_running_loop().call_later(left_s, self._expire, lease)
            if self.preemptible and lease.ticket.band is not Band.BATCH:
                self.preempt(lease.ticket.candidates)

    def preempt(self, workers: Collection[str], most: int = 1) -> int:
        """Ask for up to `most` slots of these workers back; how many were asked for. None is asked for twice."""
        leases = chosen(reversed(self.preemptible.values()), workers, self.slots, most)
        for lease in leases:
            del self.preemptible[lease.id]
            lease.is_preempted = True
            if lease.ticket.on_preempt is not None:
                lease.ticket.on_preempt()
        return len(leases)

    def tell(self, lease_id: str, standing: Standing) -> None:
        """Where it stands, for whoever listens while it waits."""
        lease = self.waiting.get(lease_id)
        if lease is not None and lease.is_waiting and lease.on_wait is not None and standing.position:
            lease.on_wait(standing.position, standing.of, standing.wait_us / US)

    def drop(self, lease: QueuedLease) -> bool:
        """Take it off the roster, waiting or held. False if it is on none."""
        if self.waiting.pop(lease.id, None) is None and self.held.pop(lease.id, None) is None:
            return False
        if lease.worker_id:
            self._loads[lease.worker_id] -= 1
        if lease.ticket.on_preempt is not None:
            self.preemptible.pop(lease.id, None)
        if lease.timer is not None:
            lease.timer.cancel()
            lease.timer = None
        return True

    def held_on(self, worker_id: str) -> int:
        return self._loads[worker_id]

    def depth(self) -> Counter[Band]:
        return Counter(lease.ticket.band for lease in self.waiting.values())

    def oldest(self) -> dict[Band, float]:
        """Seconds that the first of each band has waited."""
        now = self.clock()
        found: dict[Band, float] = {}
        for lease in self.waiting.values():
            band = lease.ticket.band
            found[band] = max(found.get(band, 0.0), now - lease.since)
        return found

    def in_order(self) -> list[QueuedLease]:
        """Those who wait, in order of arrival."""
        return sorted(self.waiting.values(), key=lambda lease: lease.since)

    def turn_away(self, error: GatewayError) -> None:
        """Nobody waits on."""
        for lease in list(self.waiting.values()):
            self._end_wait(lease, error)

    def _expire(self, lease: QueuedLease) -> None:
        lease.timer = None
        self._end_wait(lease, _expiry(lease))

    def _end_wait(self, lease: QueuedLease, error: GatewayError) -> None:
        if lease.granted is not None and not lease.granted.done():
            # It stays on the roster: who waits for it leaves it, and the desk hears of that.
            lease.granted.set_exception(error)

    def _finish(self, lease: QueuedLease, error: GatewayError | None) -> None:
        if lease.timer is not None:
            lease.timer.cancel()
            lease.timer = None
        if lease.granted is None or lease.granted.done():
            return  # cancelled or expired in this very tick; who waits for it is about to leave it
        if error is None:
            lease.granted.set_result(None)
        else:
            lease.granted.set_exception(error)


class Desk(Protocol):
    """Where the roster's leases stand. Its methods never wait and never fail."""

    def arrive(self, lease: QueuedLease) -> None:
        """A waiting lease stands here: sooner or later it is granted, refused or parked on the roster."""

    def leave(self, lease: QueuedLease, debt: Debt) -> None:
        """It was dropped from the roster: end its wait, or free its slot."""

    def settle(self, settlement: Settlement) -> None:
        """See `reservation.Home`."""

    def set_slots(self, worker_id: str, slots: int) -> None:
        """See `ticket.Admission`."""

    def ask_standing(self, tickets: list[str]) -> None:
        """Have the roster told where these stand."""


class QueuedAdmission:
    """See `ticket.Admission`: takes tickets to the desk of the moment, and brings the leases back."""

    def __init__(self, limits: settings.Admission, roster: Roster, desk: Desk) -> None:
        self._limits = limits
        self._costs = Costs()
        self._max_wait_s = {band: limits.max_wait_s(band) for band in Band}
        self.roster = roster
        self.desk = desk
        self.announcer = Announcer(lambda tickets: self.desk.ask_standing(tickets), roster.clock)
        self.slots = roster.slots
        self.limits: dict[str, int] = {}
        self.steered: dict[str, int] = {}
        """The limits of adaptive workers that another gateway process sets."""
        self.served: set[str] = set()
        self._closed: GatewayError | None = None

    async def overview(self, metered: Sequence[Metered] = ()) -> Overview:
        """All that waits, wherever it arrived, and what these tenants have used. Raises DependencyUnavailable."""
        raise NotImplementedError

    @property
    def processes(self) -> int:
        """How many share the queue, this one included."""
        return 1

    @property
    def is_degraded(self) -> bool:
        """Whether it does without the ledger that it should have."""
        return False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do what has to be done all the time."""
        try:
            yield
        finally:
            self.announcer.close()

    def waiting(self, band: Band) -> int:
        """Tickets of this process that wait in `band`."""
        return self.roster.depth()[band]

    def held(self, worker_id: str) -> int:
        """Slots of the worker that this process holds."""
        return self.roster.held_on(worker_id)

    def set_slots(self, worker_id: str, slots: int, *, is_served: bool | None = None, limit: int | None = None) -> None:
        self.slots[worker_id] = slots
        if limit is not None:
            self.limits[worker_id] = limit
        (self.served.add if is_served or (is_served is None and slots) else self.served.discard)(worker_id)
        self.desk.set_slots(worker_id, self.share(slots))

    def names(self, worker_id: str) -> bool:
        """Whether somebody here holds a slot of the worker, or might still get one."""
        return self.roster.held_on(worker_id) > 0 or any(
            worker_id in lease.ticket.candidates for lease in self.roster.waiting.values()
        )

    def forget(self, worker_id: str) -> None:
        """Say no more about a worker whose slots are 0, and that nobody here names."""
        self.slots.pop(worker_id, None)
        self.limits.pop(worker_id, None)
        self.served.discard(worker_id)

    def share(self, slots: int) -> int:
        """What the desk of the moment may grant of a worker's slots."""
        return slots

    def turn_away(self, error: GatewayError) -> None:
        """Let nobody wait any more: who does is refused with `error`, and so is who comes later."""
        self._closed = error
        self.roster.turn_away(error)

    async def admit(self, ticket: Ticket) -> QueuedLease:
        cost = self._costs.of(ticket.model).estimate(ticket.prompt_bytes, ticket.max_tokens)
        lease = QueuedLease(self, ticket, cost)
        if not ticket.tenant.limits.is_unlimited:
            self._reserve(lease)
        try:
            await self._stand(lease)
        except BaseException as error:
            self._settle(lease, None)
            if isinstance(error, GatewayError):
                error.allowances = lease.allowances
            raise
        return lease

    async def move(self, lease: QueuedLease, candidates: tuple[str, ...]) -> None:
        """The slot goes first, in a step of its own: an arrival may be refused for want of memory, a release never."""
        self._drop(lease, 0.0)
        lease.ticket = structs.replace(lease.ticket, candidates=candidates)
        lease.is_moved = True
        await self._stand(lease)

    def leave(self, lease: QueuedLease, spent: TokenUsage | Spent | None) -> None:
        """The end of a lease. In the order of the queue the estimate stands where usage is not known.

        Who was preempted has had nothing for it, and stands in the queue again.
        """
        owed = -lease.cost if lease.is_preempted else 0.0
        if isinstance(spent, TokenUsage):
            self._costs.of(lease.ticket.model).learn(lease.ticket.prompt_bytes, spent)
            owed = spent.prompt_tokens + spent.completion_tokens - lease.cost
        self._drop(lease, owed)
        self._settle(lease, spent)

    def _reserve(self, lease: QueuedLease) -> None:
        """Let it claim of its tenant's limits when it arrives. Raises RateLimitExceeded for what they never give."""
        ticket = lease.ticket
        guessed = self._costs.of(ticket.model).guess(ticket.prompt_bytes)
        limits = ticket.tenant.limits
        reservation = Reservation(self.roster.new_id(), ticket.tenant.name, limits, guessed, ticket.max_tokens)
        claim = reservation.too_large
        if claim is not None:
            self.roster.count_rejection(claim.limit)
            raise too_large(claim)
        lease.reservation = self.roster.reserved[reservation.demand.reservation] = reservation

    def _settle(self, lease: QueuedLease, spent: TokenUsage | Spent | None) -> None:
        """End its reservation, where it was made and where the lease stands now; once."""
        reservation = lease.reservation
        if reservation is None or self.roster.reserved.pop(reservation.demand.reservation, None) is None:
            return
        settlement = reservation.settlement(spent)
        self.desk.settle(settlement)
        if reservation.home is not None and reservation.home is not self.desk:
            reservation.home.settle(settlement)

    def _drop(self, lease: QueuedLease, owed_tokens: float) -> None:
        if self.roster.drop(lease):
            self.desk.leave(lease, lease.debt(owed_tokens))
            lease.worker_id = ""

    async def _stand(self, lease: QueuedLease) -> None:
        limits, ticket = self._limits, lease.ticket
        if self._closed is not None:
            raise self._closed
        lease.is_unserved = self.served.isdisjoint(ticket.candidates)
        # A lease that moves waits on: its patience is for all of its waits together.
        patience_s = max(0.0, self._max_wait_s[ticket.band] - lease.waited_s)
        granted = self.roster.enter(lease, limits.no_worker_timeout_s if lease.is_unserved else patience_s)
        try:
            self.desk.arrive(lease)
            if lease.on_wait is not None and lease.is_waiting:
                self.announcer.watch(lease)
            await granted
        except BaseException:
            # A grant may have come in the same tick as the cancellation or the expiry: a slot unused, and not paid for.
            self._drop(lease, -lease.tokens)
            raise


def rules_of(limits: settings.Admission) -> Rules:
    return Rules(
        tenant_limit=limits.queue_limit_per_tenant,
        band_limit=limits.queue_limit_per_band,
        total_limit=limits.queue_limit,
        tenant_bytes=limits.queue_mib_per_tenant * MIB,
        band_bytes=limits.queue_mib_per_band * MIB,
        total_bytes=limits.queue_mib * MIB,
        ageing_us=int(limits.ageing_s * US),
        us_per_token=int(limits.order_s_per_token * US),
    )


def new_name() -> str:
    """A name for one process, never used before."""
    return secrets.token_hex(6)


def _refusal(lease: QueuedLease, kind: Kind, wait_us: int, readings: Sequence[Reading]) -> tuple[str, GatewayError]:
    """The name of the bound, and what the client is told."""
    if lease.reservation is not None:
        lease.reservation.readings = readings
        if kind is Kind.TOO_MANY:
            return CONCURRENT, lease.reservation.refusal_at_once()
        if kind is Kind.RATE_LIMITED:
            return lease.reservation.refusal(wait_us)
    return kind.name.lower(), _refusal_of_order(kind, max(1.0, wait_us / US))


def _refusal_of_order(kind: Kind, retry_after_s: float) -> GatewayError:
    if kind is Kind.TENANT_FULL:
        return TenantQueueFull("You have too many requests waiting. Please try later.", retry_after_s=retry_after_s)
    if kind is Kind.HOPELESS:
        return Overloaded(
            "No slot will come free before the request's deadline. Please try later.",
            retry_after_s=retry_after_s,
        )
    return Overloaded("The queue is full. Please try again later.", retry_after_s=retry_after_s)


def _expiry(lease: QueuedLease) -> GatewayError:
    retry_after_s = max(5.0, lease.wait_us / US)
    if lease.is_unserved:
        return NoHealthyWorker("No worker of this model is ready. Please try again later.", retry_after_s=retry_after_s)
    return QueueTimeout("No slot came free in time. Please try again later.", retry_after_s=retry_after_s)
