"""Admission of several replicas through one ledger, nothing broken."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from app.errors import NoHealthyWorker, Overloaded, QueueTimeout, TenantQueueFull
from app.inference import Band, TokenUsage
from tests.integration.admission.fleet import (
    Dump,
    granted_in_time,
    is_told,
    parked,
    queued,
    replica,
    soon,
    ticket,
    until,
)
from tests.processes import Valkey


async def test_a_free_slot_is_granted_and_given_back(valkey: Valkey) -> None:
    async with replica(valkey.url) as one:
        lease = await granted_in_time(one, ticket())
        assert Dump(valkey.url).held == {"w": {lease.id}}
        lease.release(TokenUsage(5, 7))
        await until(lambda: not Dump(valkey.url).leases)


async def test_slots_are_those_of_all_replicas_together(valkey: Valkey) -> None:
    async with replica(valkey.url, 3) as one, replica(valkey.url, 3) as two:
        leases = [await one.admit(ticket()), await two.admit(ticket()), await one.admit(ticket())]
        (waiting,) = await queued(two, ticket())
        assert len(Dump(valkey.url).held["w"]) == 3
        leases[0].release()
        lease = await soon(waiting)
        assert Dump(valkey.url).held["w"] == {leases[1].id, leases[2].id, lease.id}


async def test_a_slot_freed_by_one_replica_reaches_the_ticket_of_another_soon(valkey: Valkey) -> None:
    """V2. No sync helps: the grant itself comes over."""
    async with replica(valkey.url, lease_s=200) as one, replica(valkey.url, lease_s=200) as two:
        held = await one.admit(ticket())
        giver, taker = one, two
        for _ in range(11):
            (waiting,) = await queued(taker, ticket())
            held.release()
            held = await soon(waiting)
            giver, taker = taker, giver


async def test_bands_go_in_order_across_replicas(valkey: Valkey) -> None:
    async with replica(valkey.url) as one, replica(valkey.url) as two:
        held = await one.admit(ticket())
        low, high = [*await queued(one, ticket(band=Band.FLEX)), *await queued(two, ticket(band=Band.PRIORITY))]
        held.release()
        await soon(high)
        assert not low.done()
        low.cancel()


async def test_a_move_takes_another_slot_and_gives_the_old_one_up(valkey: Valkey) -> None:
    async with replica(valkey.url, {"a": 1, "b": 1}) as one:
        lease = await one.admit(ticket("a", "b"))
        first = lease.id
        await lease.move(("b", "a"))
        assert (lease.worker_id, Dump(valkey.url).held) == ("b", {"b": {lease.id}})
        assert lease.id != first


async def test_who_moves_goes_ahead_of_who_waits(valkey: Valkey) -> None:
    async with replica(valkey.url, {"a": 1, "b": 1}) as one:
        moving, held = await one.admit(ticket("a")), await one.admit(ticket("b"))
        (waiting,) = await queued(one, ticket("b", band=Band.PRIORITY))
        move = asyncio.create_task(moving.move(("b",)))
        await until(lambda: parked(one) == 2)
        held.release()
        await soon(move)
        assert not waiting.done()
        waiting.cancel()


async def test_limits_hold_across_replicas(valkey: Valkey) -> None:
    limits: dict[str, Any] = {"queue_limit_per_tenant": 2, "queue_limit": 3}
    async with replica(valkey.url, **limits) as one, replica(valkey.url, **limits) as two:
        await one.admit(ticket())
        waiting = [*await queued(one, ticket(tenant="a")), *await queued(two, ticket(tenant="a"))]
        with pytest.raises(TenantQueueFull) as refused:
            await one.admit(ticket(tenant="a"))
        assert refused.value.status == 429
        waiting += await queued(one, ticket(tenant="b"))
        with pytest.raises(Overloaded):
            await two.admit(ticket(tenant="c"))
        for task in waiting:
            task.cancel()


async def test_a_wait_ends_and_leaves_no_trace(valkey: Valkey) -> None:
    async with replica(valkey.url, queue_timeout_s=0.05) as one:
        await one.admit(ticket())
        with pytest.raises(QueueTimeout):
            await one.admit(ticket())
        await until(lambda: is_told(valkey.url, one))
        assert Dump(valkey.url).tickets == set()


async def test_no_worker_at_all_is_said_soon(valkey: Valkey) -> None:
    async with replica(valkey.url, 0, no_worker_timeout_s=0.05) as one:
        with pytest.raises(NoHealthyWorker):
            await one.admit(ticket())


async def test_no_hope_is_said_at_once(valkey: Valkey) -> None:
    """With the drain rate known, who cannot be served before its deadline is refused, and told when to come back."""
    async with replica(valkey.url) as one:
        held = await one.admit(ticket())
        tasks = await queued(one, *(ticket() for _ in range(40)))
        for task in tasks[:20]:
            await asyncio.sleep(0.05)
            held.release()
            held = await soon(task)
        with pytest.raises(Overloaded) as refused:
            await one.admit(ticket(deadline=time.monotonic() + 0.5))
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 0.5
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_one_replicas_view_of_a_worker_does_not_close_it_for_others(valkey: Valkey) -> None:
    async with replica(valkey.url) as one, replica(valkey.url) as two:
        (await two.admit(ticket())).release()
        one.set_slots("w", 0)
        await until(lambda: Dump(valkey.url).slots == {"w": 1})
        await granted_in_time(two, ticket())
        two.set_slots("w", 0)
        await until(lambda: Dump(valkey.url).slots == {"w": 0})


async def test_a_replica_that_ends_leaves_nothing(valkey: Valkey) -> None:
    async with replica(valkey.url) as other:
        async with replica(valkey.url) as one:
            await one.admit(ticket())
            (waiting,) = await queued(other, ticket())
            tasks = await queued(one, ticket())
            tasks[0].cancel()
        await soon(waiting)
        await until(lambda: is_told(valkey.url, other))


async def test_the_queue_can_be_looked_at(valkey: Valkey) -> None:
    async with replica(valkey.url) as one:
        await one.admit(ticket())
        tasks = await queued(one, ticket(tenant="a"), ticket(tenant="a"), ticket(tenant="b", band=Band.FLEX))
        overview = await one.overview()
        assert sorted((flow.band, flow.tenant, flow.tickets) for flow in overview.flows) == [(2, "a", 2), (3, "b", 1)]
        assert overview.slots == [("w", 1, 1)]
        for task in tasks:
            task.cancel()
