"""Admission inside one process: slots are exact, order is kept, nothing leaks."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from app import settings
from app.admission.local import LocalAdmission
from app.admission.roster import QueuedLease
from app.admission.ticket import Ticket
from app.errors import NoHealthyWorker, Overloaded, QueueTimeout, TenantQueueFull
from app.inference import Band
from app.telemetry.metrics import Metrics
from app.tenant import Tenant


def admission(*, slots: int = 1, workers: str = "a", **bounds: float) -> LocalAdmission:
    built = LocalAdmission(settings.Admission(**bounds), Metrics(CollectorRegistry()), time.monotonic)
    for worker in workers:
        built.set_slots(worker, slots)
    return built


def ticket(
    name: str = "t",
    band: Band = Band.DEFAULT,
    candidates: str = "a",
    deadline: float = float("inf"),
    tenant: str = "t",
) -> Ticket:
    return Ticket(name, band, tuple(candidates), tenant=Tenant(tenant), deadline=deadline)


async def queued(line: LocalAdmission, *tickets: Ticket) -> list[asyncio.Task[QueuedLease]]:
    """Tasks that wait for these tickets, in this order."""
    tasks = []
    for waiting in tickets:
        before = sum(line.waiting(band) for band in Band)
        tasks.append(asyncio.create_task(line.admit(waiting)))
        while sum(line.waiting(band) for band in Band) == before:
            await asyncio.sleep(0)
    return tasks


async def test_the_first_candidate_with_a_free_slot() -> None:
    line = admission(workers="ab")
    assert (await line.admit(ticket(candidates="ab"))).worker_id == "a"
    assert (await line.admit(ticket(candidates="ab"))).worker_id == "b"


async def test_a_freed_slot_goes_to_the_next_in_line() -> None:
    line = admission()
    held = await line.admit(ticket())
    first, second = await queued(line, ticket("1"), ticket("2"))
    held.release()
    lease = await first
    assert not second.done()
    lease.release()
    assert (await second).worker_id == "a"
    assert line.waiting(Band.DEFAULT) == 0


async def test_a_higher_band_goes_first() -> None:
    line = admission()
    held = await line.admit(ticket())
    low, high = await queued(line, ticket("low", Band.FLEX), ticket("high", Band.PRIORITY))
    held.release()
    await high
    assert not low.done()
    low.cancel()


async def test_releasing_twice_frees_one_slot() -> None:
    line = admission(slots=2)
    one, _two = await line.admit(ticket()), await line.admit(ticket())
    one.release()
    one.release()
    assert line.held("a") == 1


async def test_a_ticket_takes_only_its_candidates() -> None:
    line = admission(workers="ab")
    await line.admit(ticket(candidates="a"))
    (waiting,) = await queued(line, ticket(candidates="a"))
    held = await line.admit(ticket(candidates="b"))
    held.release()
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_a_worker_that_becomes_ready_serves_who_waits() -> None:
    line = admission(slots=0)
    (waiting,) = await queued(line, ticket())
    line.set_slots("a", 1)
    assert (await waiting).worker_id == "a"


async def test_the_queue_is_bounded() -> None:
    line = admission(queue_limit=1)
    await line.admit(ticket())
    (waiting,) = await queued(line, ticket())
    with pytest.raises(Overloaded):
        await line.admit(ticket())
    waiting.cancel()


async def test_by_default_neither_a_tenant_nor_a_band_fills_the_queue() -> None:
    """Each band floods from ever new tenants, the lowest first: the highest still finds all of its room."""
    defaults = settings.Admission()
    assert 4 * defaults.queue_limit_per_tenant <= defaults.queue_limit_per_band
    assert 4 * defaults.queue_mib_per_tenant <= defaults.queue_mib_per_band
    assert len(Band) * defaults.queue_mib_per_band <= defaults.queue_mib
    scale = defaults.queue_limit_per_tenant  # the same, a thousandth as large
    line = admission(
        queue_limit=defaults.queue_limit // scale,
        queue_limit_per_band=defaults.queue_limit_per_band // scale,
        queue_limit_per_tenant=1,
    )
    await line.admit(ticket())
    waiting: list[asyncio.Task[QueuedLease]] = []
    for band in reversed(Band):
        room = 4
        waiting += await queued(line, *[ticket(band=band, tenant=f"{band}-{n}") for n in range(room)])
        with pytest.raises(TenantQueueFull):
            await line.admit(ticket(band=band, tenant=f"{band}-0"))
        with pytest.raises(Overloaded):
            await line.admit(ticket(band=band, tenant="one more"))
        assert line.waiting(band) == room
    for task in waiting:
        task.cancel()


async def test_a_wait_ends() -> None:
    line = admission(queue_timeout_s=0.01)
    await line.admit(ticket())
    with pytest.raises(QueueTimeout):
        await line.admit(ticket())
    assert line.waiting(Band.DEFAULT) == 0


async def test_a_deadline_ends_a_wait_sooner() -> None:
    line = admission()
    await line.admit(ticket())
    with pytest.raises(QueueTimeout):
        await line.admit(ticket(deadline=asyncio.get_running_loop().time() + 0.01))


async def test_no_worker_at_all_is_said_soon() -> None:
    with pytest.raises(NoHealthyWorker):
        await admission(slots=0, no_worker_timeout_s=0.01).admit(ticket())


async def test_a_cancelled_wait_leaves_no_trace() -> None:
    line = admission()
    held = await line.admit(ticket())
    (waiting,) = await queued(line, ticket())
    waiting.cancel()
    await asyncio.wait([waiting])
    held.release()
    assert (line.waiting(Band.DEFAULT), line.held("a")) == (0, 0)


async def test_a_grant_that_meets_a_cancellation_is_given_back() -> None:
    line = admission()
    held = await line.admit(ticket())
    (waiting,) = await queued(line, ticket())
    held.release()  # grants, and then the client is gone before it could notice
    waiting.cancel()
    await asyncio.wait([waiting])
    assert line.held("a") == 0


async def test_a_move_gives_the_old_slot_up() -> None:
    line = admission(workers="ab")
    lease = await line.admit(ticket(candidates="ab"))
    await lease.move(("b", "a"))
    assert (lease.worker_id, line.held("a"), line.held("b")) == ("b", 0, 1)


async def test_who_moves_goes_ahead_of_who_waits() -> None:
    line = admission(workers="ab")
    moving, held = await line.admit(ticket(candidates="a")), await line.admit(ticket(candidates="b"))
    (waiting,) = await queued(line, ticket(candidates="b"))
    move = asyncio.create_task(moving.move(("b",)))
    while line.waiting(Band.DEFAULT) < 2:
        await asyncio.sleep(0)
    held.release()
    await move
    assert not waiting.done()
    waiting.cancel()
