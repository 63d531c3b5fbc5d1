"""Admission inside one process: the order of fairness.py on slots that no other process knows of."""

from __future__ import annotations

from collections.abc import Callable

from app import settings
from app.admission.fairness import Debt, Grant, Kind, Overview, Queue, Rules
from app.admission.roster import US, QueuedAdmission, QueuedLease, Roster, new_name, rules_of
from app.telemetry.metrics import Metrics


class LocalDesk:
    """See `roster.Desk`."""

    def __init__(self, rules: Rules, roster: Roster, clock: Callable[[], float]) -> None:
        self._queue = Queue(rules)
        self._roster = roster
        self._clock = clock

    def arrive(self, lease: QueuedLease) -> None:
        now = self._clock()
        place = lease.place(now, self._roster.route(lease.ticket.candidates), now - lease.since)
        verdict, grants = self._queue.arrive(place, int(now * US))
        if verdict.kind is Kind.GRANTED:
            self._roster.grant(lease.id, verdict.worker)
        elif verdict.kind is Kind.WAITS:
            self._roster.park(lease, verdict.wait_us)
        else:
            self._roster.refuse_as(lease.id, verdict.kind, verdict.wait_us)
        self._tell(grants)

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

    def set_slots(self, worker_id: str, slots: int) -> None:
        now = self._clock()
        self._tell(self._queue.set_slots(worker_id, slots, int(now * US)))

    def ask_standing(self, tickets: list[str]) -> None:
        for ticket_id in tickets:
            self._roster.tell(ticket_id, self._queue.standing(ticket_id))

    def overview(self) -> Overview:
        return self._queue.overview(int(self._clock() * US))

    def _tell(self, grants: list[Grant]) -> None:
        for grant in grants:
            self._roster.grant(grant.id, grant.worker)


class LocalAdmission(QueuedAdmission):
    """Admission without Redis."""

    def __init__(self, limits: settings.Admission, metrics: Metrics, clock: Callable[[], float]) -> None:
        roster = Roster(new_name(), metrics, clock)
        self._local = LocalDesk(rules_of(limits), roster, clock)
        super().__init__(limits, roster, self._local)

    async def overview(self) -> Overview:
        return self._local.overview()
