"""Goal L11: five thousand waiting requests are cancelled at once. Time is CPU time: the machine may be shared."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import pytest
import redis

from tests.integration.admission.fleet import Dump, granted_in_time, is_told, parked, replica, ticket, until
from tests.processes import Valkey

pytestmark = pytest.mark.slow

WAITING = 5000
MOST_PER_CALL = 512
LIMITS: dict[str, Any] = dict.fromkeys(("queue_limit", "queue_limit_per_tenant", "queue_limit_per_band"), 2 * WAITING)


class Stalls:
    """The longest turn of the event loop, in seconds of this thread's CPU time, while it watches."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._began = time.thread_time()
        self._next = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        now = time.thread_time()
        self.longest_s, self._began = max(self.longest_s, now - self._began), now
        self._next = self._loop.call_soon(self._turn)

    def stop(self) -> None:
        self._next.cancel()


async def test_l11_five_thousand_that_leave_at_once_are_gone_in_small_calls(valkey: Valkey) -> None:
    """How long that takes it prints: 0.1 to 0.2 s of CPU in all, 0.02 to 0.05 s the longest turn, on two cores."""
    async with replica(valkey.url, lease_s=60, queue_timeout_s=300, **LIMITS) as one:
        held = await one.admit(ticket())
        tasks = [asyncio.create_task(one.admit(ticket())) for _ in range(WAITING)]
        await until(lambda: parked(one) == WAITING, 60)
        assert len(Dump(valkey.url).tickets) == WAITING
        with redis.Redis.from_url(valkey.url) as client:
            client.config_resetstat()
        gc.collect()
        stalls, spent_s = Stalls(), time.process_time()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: not one._shared.departures)
        await one.overview()  # asked of the ledger after the last departures, in the same order
        spent_s = time.process_time() - spent_s
        stalls.stop()
        assert all(task.cancelled() for task in tasks)
        assert Dump(valkey.url).tickets == set()
        assert Dump(valkey.url).depth == {}
        assert is_told(valkey.url, one)
        print(f"{WAITING} gone after {spent_s:.3f} s of CPU, longest turn {stalls.longest_s * 1000:.1f} ms")
        # No call stops the server, which all replicas share, for as long as all of them together would.
        with redis.Redis.from_url(valkey.url) as client:
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= WAITING / MOST_PER_CALL
        held.release()
        await granted_in_time(one, ticket())
