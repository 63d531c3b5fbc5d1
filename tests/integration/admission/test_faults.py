"""Rows F23 to F35 and F39 of the fault matrix: what the admission of a replica does when the ledger breaks."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis

from app import settings
from app.admission.ledger import Ledger, LedgerGone, Scripts, SharedRules
from app.errors import DependencyUnavailable, Overloaded
from tests.fakes.fault_proxy import FaultProxy
from tests.integration.admission.driving import RULES
from tests.integration.admission.fleet import (
    Dump,
    gauge,
    granted_in_time,
    hasty,
    is_told,
    parked,
    queued,
    replica,
    restore,
    snapshot,
    soon,
    ticket,
    until,
)
from tests.processes import Valkey

SHARED = SharedRules(RULES, lease_us=1_500_000, settle_us=500_000, replicas=1)


@pytest.fixture
async def proxy(valkey: Valkey) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(valkey.port) as running:
        yield running


async def restarted(server: Valkey) -> None:
    await asyncio.to_thread(server.restart)


# F23


async def test_a_killed_ledger_leaves_streams_alone_and_a_share_is_served(own_valkey: Valkey) -> None:
    async with replica(hasty(own_valkey.url), 4, replicas=2, without_redis="local") as one:
        held = await one.admit(ticket())
        await asyncio.to_thread(own_valkey.kill)
        lease = await granted_in_time(one, ticket())
        assert one.is_degraded
        assert gauge(one, "sluice_admission_degraded") == 1
        (waiting,) = await queued(one, ticket())
        assert held.worker_id == "w"
        held.release()
        second = await soon(waiting)
        await restarted(own_valkey)
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(own_valkey.url, one))
        assert Dump(own_valkey.url).held["w"] == {lease.id, second.id}
        assert gauge(one, "sluice_admission_degraded") == 0


async def test_without_the_ledger_replicas_together_never_exceed_the_slots(own_valkey: Valkey) -> None:
    """I16, with more slots than divide evenly."""
    url = hasty(own_valkey.url)
    async with replica(url, 5, replicas=2) as one, replica(url, 5, replicas=2) as two:
        await asyncio.to_thread(own_valkey.kill)
        tasks = [asyncio.create_task(which.admit(ticket())) for which in (one, two) for _ in range(5)]
        await until(lambda: sum(task.done() for task in tasks) >= 4)
        await until(lambda: parked(one) == 3 and parked(two) == 3)
        assert sum(task.done() for task in tasks) == 4
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_without_a_configured_number_replicas_go_by_the_last_they_heard(own_valkey: Valkey) -> None:
    """I16 with a number that the ledger told; who joined too late for the others to know grants nothing."""
    url = hasty(own_valkey.url)
    async with replica(url, 5) as one, replica(url, 5) as two:
        await until(lambda: one._census.share(5) == two._census.share(5) == 2)
        async with replica(url, 5) as late:
            await until(lambda: late._census.processes == 3)
            await asyncio.to_thread(own_valkey.kill)
            tasks = [asyncio.create_task(which.admit(ticket())) for which in (one, two, late) for _ in range(4)]
            await until(lambda: parked(late) == 4 and all(which.is_degraded for which in (one, two)))
            assert sum(task.done() for task in tasks) <= 4
            assert one.held("w") == two.held("w") > 0
            assert late.held("w") == 0
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def test_live_leases_are_told_before_anything_is_granted(own_valkey: Valkey) -> None:
    """After an empty restart the first replica back finds half of the slots free; it must not believe that."""
    async with FaultProxy(own_valkey.port) as way:
        async with (
            replica(hasty(own_valkey.url), 4, replicas=2, lease_s=9) as one,
            replica(hasty(way.url), 4, replicas=2, lease_s=9) as two,
        ):
            held = [await admission.admit(ticket()) for admission in (one, one, two, two)]
            way.fall_silent()
            await restarted(own_valkey)
            (waiting,) = await queued(one, ticket())
            await until(lambda: Dump(own_valkey.url).leases == {held[0].id, held[1].id})
            way.heal()
            await until(lambda: is_told(own_valkey.url, one, two))
            assert len(Dump(own_valkey.url).held["w"]) == 4
            assert not waiting.done()
            held[3].release()
            await soon(waiting)


async def test_it_may_be_told_to_refuse_without_the_ledger(own_valkey: Valkey) -> None:
    async with replica(hasty(own_valkey.url), without_redis="refuse") as one:
        held = await one.admit(ticket())
        (waiting,) = await queued(one, ticket())
        await asyncio.to_thread(own_valkey.kill)
        with pytest.raises(DependencyUnavailable):
            await soon(waiting)
        with pytest.raises(DependencyUnavailable):
            await one.admit(ticket())
        held.release()
        await restarted(own_valkey)
        await until(lambda: not one.is_degraded)
        await granted_in_time(one, ticket())


# F24


async def test_a_paused_ledger_delays_nobody_and_leases_are_taken_again(own_valkey: Valkey) -> None:
    async with replica(hasty(own_valkey.url), 4, lease_s=1.5) as one:
        held = [await one.admit(ticket()) for _ in range(3)]
        own_valkey.pause()
        lease = await granted_in_time(one, ticket())
        await asyncio.sleep(2)  # longer than leases live
        own_valkey.resume()
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(own_valkey.url, one))
        assert Dump(own_valkey.url).held["w"] == {*(other.id for other in held), lease.id}


async def test_leases_that_expired_in_a_pause_are_not_given_to_others(own_valkey: Valkey) -> None:
    url = hasty(own_valkey.url)
    limits: dict[str, Any] = {"replicas": 2, "lease_s": 1.5}
    async with replica(url, 2, **limits) as one, replica(url, 2, **limits) as two:
        held = [await one.admit(ticket()), await two.admit(ticket())]
        own_valkey.pause()
        await until(lambda: one.is_degraded and two.is_degraded)
        await asyncio.sleep(2)
        own_valkey.resume()
        (waiting,) = await queued(one, ticket())
        await until(lambda: not (one.is_degraded or two.is_degraded))
        await until(lambda: is_told(own_valkey.url, one, two))
        assert {lease.id for lease in held} == Dump(own_valkey.url).held["w"]
        waiting.cancel()


# F25


async def test_out_of_memory_refuses_arrivals_whole_and_releases_still_work(own_valkey: Valkey) -> None:
    async with replica(own_valkey.url, lease_s=15) as one:  # no sync comes to help
        held = await one.admit(ticket())
        (waiting,) = await queued(one, ticket())
        with redis.Redis.from_url(own_valkey.url) as client:
            client.config_set("maxmemory", 1)
            before = Dump(own_valkey.url)
            with pytest.raises(Overloaded):
                await one.admit(ticket())
            after = Dump(own_valkey.url)
            assert (after.held, after.tickets, after.depth) == (before.held, before.tickets, before.depth)
            held.release()
            lease = await soon(waiting)
            assert Dump(own_valkey.url).held["w"] == {lease.id}
            client.config_set("maxmemory", 0)
        assert not one.is_degraded
        lease.release()
        await granted_in_time(one, ticket())


# F26


async def test_a_demoted_primary_is_left_and_found_again(own_valkey: Valkey, valkey: Valkey) -> None:
    async with replica(hasty(own_valkey.url), 2) as one:
        held = await one.admit(ticket())
        with redis.Redis.from_url(own_valkey.url) as client:
            client.execute_command("REPLICAOF", "127.0.0.1", valkey.port)
            await granted_in_time(one, ticket())
            assert one.is_degraded
            client.execute_command("REPLICAOF", "NO", "ONE")
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(own_valkey.url, one))
        assert held.id in Dump(own_valkey.url).leases


# F27


async def test_a_rolled_back_ledger_is_noticed_and_put_right(valkey: Valkey) -> None:
    limits: dict[str, Any] = {"replicas": 2, "lease_s": 3}
    async with replica(valkey.url, 4, **limits) as one, replica(valkey.url, 4, **limits) as two:
        gone = await one.admit(ticket())
        kept = await two.admit(ticket())
        saved = snapshot(valkey.url)
        gone.release()
        lost = [await one.admit(ticket()), await two.admit(ticket()), await two.admit(ticket())]
        await until(lambda: is_told(valkey.url, one, two))
        restore(valkey.url, saved)
        (waiting,) = await queued(one, ticket())
        await until(lambda: is_told(valkey.url, one, two))
        assert Dump(valkey.url).held["w"] == {kept.id, *(lease.id for lease in lost)}
        assert not waiting.done()
        gone.release()
        assert len(Dump(valkey.url).held["w"]) == 4
        kept.release()
        await soon(waiting)


# F28


async def test_a_replica_that_is_cut_off_loses_its_slots_and_finds_out(valkey: Valkey, proxy: FaultProxy) -> None:
    async with replica(hasty(proxy.url), 2, lease_s=1.5) as cut, replica(valkey.url, 2) as other:
        stale = [await cut.admit(ticket()), await cut.admit(ticket())]
        waiting = await queued(other, ticket(), ticket())
        proxy.fall_silent()
        taken = [await soon(task) for task in waiting]
        await until(lambda: cut.is_degraded)
        proxy.heal()
        await until(lambda: not cut.is_degraded)
        await until(lambda: gauge(cut, "sluice_leases_fenced_total") == 2)
        (next_one,) = await queued(cut, ticket())
        for lease in stale:
            lease.release()  # frees nothing: the slots are another's now
        await cut.overview()  # asked and answered after the releases
        assert not next_one.done()
        assert Dump(valkey.url).held["w"] == {lease.id for lease in taken}
        taken[0].release()
        await soon(next_one)


# F29


async def test_a_flushed_ledger_is_rebuilt_from_the_replicas(valkey: Valkey) -> None:
    async with replica(valkey.url, 2, replicas=2) as one, replica(valkey.url, 2, replicas=2) as two:
        held = [await one.admit(ticket()), await two.admit(ticket())]
        waiting = [*await queued(one, ticket()), *await queued(two, ticket())]
        with redis.Redis.from_url(valkey.url) as client:
            client.flushall()
        await until(lambda: is_told(valkey.url, one, two))
        assert sum(gauge(each, "sluice_ledger_resyncs_total", reason="changed") for each in (one, two)) >= 1
        assert len(Dump(valkey.url).held["w"]) == 2
        held[0].release()
        held[1].release()
        await soon(asyncio.gather(*waiting))


# F30


async def test_a_slow_ledger_adds_two_round_trips_at_most(proxy: FaultProxy) -> None:
    async with replica(proxy.url, 64, lease_s=15) as one:
        await granted_in_time(one, ticket())
        proxy.latency_s = 0.1
        # The worst case: it comes just after a call was sent, and goes with the next one.
        calls = one._ledger._number
        leases = [asyncio.create_task(granted_in_time(one, ticket())) for _ in range(2)]
        await until(lambda: one._ledger._number > calls)
        calls = one._ledger._number
        leases += [asyncio.create_task(granted_in_time(one, ticket())) for _ in range(20)]
        await asyncio.gather(*leases)
        assert one._ledger._number - calls <= 3  # all in one call; its time may have come to sync and to reap as well


async def test_a_busy_ledger_is_left_until_it_is_free(own_valkey: Valkey) -> None:
    async with replica(hasty(own_valkey.url), 2) as one:
        await one.admit(ticket())

        def keep_busy() -> None:
            with redis.Redis.from_url(own_valkey.url, socket_timeout=20) as client:
                client.config_set("busy-reply-threshold", 50)
                with pytest.raises(redis.ResponseError, match="killed"):
                    client.eval("while true do end", 0)

        busy = asyncio.create_task(asyncio.to_thread(keep_busy))
        await asyncio.sleep(0.2)
        await granted_in_time(one, ticket())
        assert one.is_degraded
        with redis.Redis.from_url(own_valkey.url) as client:
            client.script_kill()
        await busy
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(own_valkey.url, one))


# F31


async def test_a_ledger_that_cannot_save_is_out_of_reach(tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    with Valkey(directory) as server:
        async with replica(server.url, without_redis="refuse") as one:
            (await one.admit(ticket())).release()
            shutil.rmtree(directory)
            with redis.Redis.from_url(server.url) as client:
                client.config_set("save", "3600 1")
                client.bgsave()
                await until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
                with pytest.raises(DependencyUnavailable):
                    await soon(one.admit(ticket()))
                client.config_set("save", "")
            await until(lambda: not one.is_degraded)
            await granted_in_time(one, ticket())


# F32


async def test_a_lost_reply_neither_doubles_nor_loses_a_slot(valkey: Valkey, proxy: FaultProxy) -> None:
    async with replica(proxy.url, 3, lease_s=15) as one:
        held = [await one.admit(ticket())]
        for round_ in range(3):
            proxy.drop_replies(1)
            held.append(await granted_in_time(one, ticket()))
            assert proxy.replies_dropped == round_ + 1
            await until(lambda: not one.is_degraded)
            await until(lambda: is_told(valkey.url, one))
            held.pop(0).release()
            await until(lambda: is_told(valkey.url, one))
        assert Dump(valkey.url).held == {"w": {held[0].id}}


async def test_a_reset_connection_costs_nobody_his_place(valkey: Valkey, proxy: FaultProxy) -> None:
    async with replica(proxy.url, replicas=2) as one, replica(valkey.url, replicas=2) as other:
        held = await other.admit(ticket())
        waiting = await queued(one, ticket(), ticket())
        proxy.reset()
        await until(lambda: one.is_degraded)
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(valkey.url, one, other))
        held.release()
        first = await soon(waiting[0])
        assert not waiting[1].done()
        first.release()
        await soon(waiting[1])


# F35


@pytest.mark.parametrize(
    ("visitors", "visits"),
    [(100, 40), pytest.param(500, 200, marks=pytest.mark.slow)],
    ids=["4,000", "100,000"],
)
async def test_no_grant_reaches_another_through_cancelled_waits(
    valkey: Valkey, proxy: FaultProxy, visitors: int, visits: int
) -> None:
    """Each ticket may go to one worker of its own only: the worker is its nonce. A round trip takes 50 ms."""
    chance = random.Random(7)  # noqa: S311 - a test's dice
    workers = [f"w{index}" for index in range(visitors // 4)]
    ended: Counter[str] = Counter()
    bounds = ("queue_limit", "queue_limit_per_tenant", "queue_limit_per_band")
    limits: dict[str, Any] = dict.fromkeys(bounds, 2 * visitors)
    async with replica(proxy.url, dict.fromkeys(workers, 2), lease_s=60, **limits) as one:
        proxy.latency_s = 0.025

        async def visit(worker: str) -> None:
            patience_s = chance.choice((0.0, 0.02, 0.05, 0.06, 0.1, 5.0))
            try:
                async with asyncio.timeout(patience_s):
                    lease = await one.admit(ticket(worker))
            except TimeoutError:
                ended["cancelled"] += 1
                return
            assert lease.worker_id == worker
            ended["granted"] += 1
            await asyncio.sleep(chance.random() / 100)
            lease.release()

        async def visitor() -> None:
            for _ in range(visits):
                await visit(chance.choice(workers))

        await asyncio.gather(*(visitor() for _ in range(visitors)))
        assert ended.total() == visitors * visits
        assert min(ended["cancelled"], ended["granted"]) > visitors * visits / 20
        assert one._ledger._number > visits / 4  # a busy machine may pause it, but it was the ledger that granted
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(valkey.url, one))
        assert Dump(valkey.url).leases == set()
        assert Dump(valkey.url).depth == {}


async def test_a_server_that_accepts_and_is_silent_is_lost_after_the_configured_time(proxy: FaultProxy) -> None:
    proxy.fall_silent()
    ledger = Ledger(settings.Redis(url=proxy.url, call_timeout_s=0.25), "r", SHARED, Scripts())
    with pytest.raises(LedgerGone, match=r"no answer within 0.25 s"):
        await ledger.open()
