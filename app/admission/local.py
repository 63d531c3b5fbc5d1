"""Admission inside one process: the order of fairness.py on slots that no other process knows of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from app import settings
from app.admission.fairness import Debt, Grant, Kind, Overview, Queue, Rules
from app.admission.quota import Metered, Settlement, Taking
from app.admission.reservation import Reservation
from app.admission.roster import US, QueuedAdmission, QueuedLease, Roster, new_name, rules_of
from app.telemetry.metrics import Metrics


class LocalDesk:
    """See `roster.Desk`. Of each limit it gives a part, where other processes cannot be asked what they give."""

    def __init__(
        self,
        rules: Rules,
        roster: Roster,
        clock: Callable[[], float],
        part_of: Callable[[int], int] = lambda limit: limit,
    ) -> None:
        self._queue = Queue(rules)
        self._part_of = part_of
        self._roster = roster
        self._clock = clock

    def arrive(self, lease: QueuedLease) -> None:
        now = self._clock()
        if lease.reservation is not None and lease.reservation.home is None:
            lease.reservation.demand = lease.reservation.demand.share(self._part_of)
        place = lease.place(now, self._roster.route(lease.ticket.candidates), now - lease.since)
        verdict, grants = self._queue.arrive(place, int(now * US))
        if verdict.kind is Kind.GRANTED:
            self._roster.grant(lease.id, verdict.worker)
        elif verdict.kind is Kind.WAITS:
            self._roster.park(lease, verdict.wait_us)
        else:
            self._roster.refuse_as(lease, verdict.kind, verdict.wait_us, verdict.readings)
        if place.demand is not None and verdict.kind <= Kind.WAITS:
            self._roster.reserve(lease, self, verdict.readings)
        self._tell(grants)

    def settle(self, settlement: Settlement) -> None:
        self._queue.settle(settlement, int(self._clock() * US))

    def leave(self, lease: QueuedLease, debt: Debt) -> None:
        now = self._clock()
        if lease.worker_id:
            self._tell(self._queue.release(lease.id, lease.worker_id, debt, int(now * US)))
        else:
            self._queue.cancel(lease.id)

    def hold(self, lease: QueuedLease) -> None:
        """A lease that was granted at another desk stands here from now on."""
        route = self._roster.route(lease.ticket.candidates)
        self._queue.hold(lease.place(self._clock(), route, 0.0), lease.worker_id)

    def hold_reservation(self, reservation: Reservation) -> None:
        """It was made elsewhere, and its claims were taken there; here it counts as one of those at once."""
        demand = msgspec.structs.replace(reservation.demand, claims=())
        self._queue.quota.hold(reservation.tenant, demand, int(self._clock() * US))

    def takings_of_ended(self) -> list[Taking]:
        """What it gave of its part of the limits, but to those that still run; the desk is not used any more."""
        return self._queue.quota.takings_of_ended(int(self._clock() * US))

    def set_slots(self, worker_id: str, slots: int) -> None:
        now = self._clock()
        self._tell(self._queue.set_slots(worker_id, slots, int(now * US)))

    def ask_standing(self, tickets: list[str]) -> None:
        for ticket_id in tickets:
            self._roster.tell(ticket_id, self._queue.standing(ticket_id))

    def overview(self, metered: Sequence[Metered] = ()) -> Overview:
        return self._queue.overview(int(self._clock() * US), metered)

    def _tell(self, grants: list[Grant]) -> None:
        for grant in grants:
            self._roster.grant(grant.id, grant.worker)


class LocalAdmission(QueuedAdmission):
    """Admission without Redis."""

    def __init__(self, limits: settings.Admission, metrics: Metrics, clock: Callable[[], float]) -> None:
        roster = Roster(new_name(), metrics, clock)
        self._local = LocalDesk(rules_of(limits), roster, clock)
        super().__init__(limits, roster, self._local)

    async def overview(self, metered: Sequence[Metered] = ()) -> Overview:
        return self._local.overview(metered)
