"""Admission inside one process: slots per worker, one bounded queue, highest band first, first come first served.

What is kept per worker is the *set* of leases on it, never a counter beside it: a lease that is released twice, or
released after a failure, cannot free a slot that it does not hold.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from app import settings
from app.admission.ticket import Ticket
from app.errors import NoHealthyWorker, Overloaded, QueueTimeout
from app.inference import Band, TokenUsage


@dataclass(slots=True)
class _Slots:
    capacity: int = 0
    is_served: bool = False
    leases: set[LocalLease] = field(default_factory=set)

    @property
    def has_free(self) -> bool:
        return len(self.leases) < self.capacity


@dataclass(slots=True, eq=False)
class _Waiting:
    ticket: Ticket
    lease: LocalLease
    granted: asyncio.Future[None]


class LocalLease:
    """See `ticket.Lease`. Which slot it holds is written by `LocalAdmission` alone."""

    __slots__ = ("_admission", "ticket", "waited_s", "worker_id")

    def __init__(self, admission: LocalAdmission, ticket: Ticket) -> None:
        self._admission = admission
        self.ticket = ticket
        self.worker_id = ""
        self.waited_s = 0.0

    async def move(self, candidates: tuple[str, ...]) -> None:
        self.release()
        self.ticket = replace(self.ticket, candidates=candidates)
        await self._admission.take(self, ahead=True)

    def release(self, usage: TokenUsage | None = None) -> None:
        self._admission.give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class LocalAdmission:
    """See `ticket.Admission`."""

    def __init__(self, bounds: settings.Admission) -> None:
        self._bounds = bounds
        self._slots: dict[str, _Slots] = {}
        self._queues: dict[Band, deque[_Waiting]] = {band: deque() for band in Band}

    def waiting(self, band: Band) -> int:
        """Tickets of `band` that wait."""
        return len(self._queues[band])

    def held(self, worker_id: str) -> int:
        """Slots of the worker that are held."""
        return len(self._slots[worker_id].leases) if worker_id in self._slots else 0

    def set_slots(self, worker_id: str, slots: int, *, is_served: bool | None = None) -> None:
        known = self._slots.setdefault(worker_id, _Slots())
        known.capacity = slots
        known.is_served = slots > 0 if is_served is None else is_served
        self._grant(worker_id)

    async def admit(self, ticket: Ticket) -> LocalLease:
        lease = LocalLease(self, ticket)
        await self.take(lease)
        return lease

    async def take(self, lease: LocalLease, *, ahead: bool = False) -> None:
        """Give `lease` a slot on one of its ticket's candidates, at once or after a wait (first in line if `ahead`)."""
        for worker_id in lease.ticket.candidates:
            slots = self._slots.get(worker_id)
            if slots is not None and slots.has_free:
                slots.leases.add(lease)
                lease.worker_id = worker_id
                return
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        await self._wait(_Waiting(lease.ticket, lease, loop.create_future()), ahead, arrived)
        lease.waited_s += loop.time() - arrived

    def give_back(self, lease: LocalLease) -> None:
        """Free the slot that `lease` holds, if it holds one, and grant it to who is next."""
        worker_id, lease.worker_id = lease.worker_id, ""
        if worker_id:
            self._slots[worker_id].leases.discard(lease)
            self._grant(worker_id)

    async def _wait(self, waiting: _Waiting, ahead: bool, arrived: float) -> None:
        if sum(map(len, self._queues.values())) >= self._bounds.queue_limit:
            raise Overloaded(
                "The queue is full. Please try again later.", retry_after_s=self._bounds.queue_timeout_s / 2
            )
        queue = self._queues[waiting.ticket.band]
        (queue.appendleft if ahead else queue.append)(waiting)
        try:
            # A lease that moves waits on: its patience is for all of its waits together.
            patient_until = arrived + self._patience_s(waiting.ticket) - waiting.lease.waited_s
            async with asyncio.timeout_at(min(patient_until, waiting.ticket.deadline)):
                await waiting.granted
        except TimeoutError:
            self.give_back(waiting.lease)
            raise self._gave_up(waiting.ticket) from None
        except asyncio.CancelledError:
            # The grant may have come in the same tick as the cancellation.
            self.give_back(waiting.lease)
            raise
        finally:
            if not waiting.granted.done() or waiting.granted.cancelled():
                queue.remove(waiting)

    def _patience_s(self, ticket: Ticket) -> float:
        return self._bounds.queue_timeout_s if self._is_served(ticket) else self._bounds.no_worker_timeout_s

    def _gave_up(self, ticket: Ticket) -> QueueTimeout | NoHealthyWorker:
        if self._is_served(ticket):
            return QueueTimeout("No slot came free in time. Please try again later.", retry_after_s=5)
        return NoHealthyWorker("No worker of this model is ready. Please try again later.", retry_after_s=5)

    def _is_served(self, ticket: Ticket) -> bool:
        return any(self._slots[worker_id].is_served for worker_id in ticket.candidates if worker_id in self._slots)

    def _grant(self, worker_id: str) -> None:
        """Hand out the free slots of `worker_id`: highest band first, then in order of arrival."""
        slots = self._slots[worker_id]
        while slots.has_free:
            waiting = self._next_for(worker_id)
            if waiting is None:
                return
            slots.leases.add(waiting.lease)
            waiting.lease.worker_id = worker_id
            waiting.granted.set_result(None)

    def _next_for(self, worker_id: str) -> _Waiting | None:
        for queue in self._queues.values():
            for waiting in queue:
                if worker_id in waiting.ticket.candidates and not waiting.granted.done():
                    queue.remove(waiting)
                    return waiting
        return None
