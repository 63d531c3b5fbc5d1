"""Goal L8 by counts: one of four workers is lost at 70 % load, and only the streams that it had begun notice."""

from __future__ import annotations

import asyncio
import time

from app.workers.worker import State
from tests.fakes.engine import Timing
from tests.integration.faults.asking import MakePool
from tests.integration.house import PATIENCE_S, House, Told, house, request

SLOTS = 8
CLIENTS = int(0.7 * 4 * SLOTS)
SPARED_AFTER_S, LASTS_S = 2.0, 5.0


def refused(home: House) -> float:
    """Requests that were sent to a worker where nothing listened."""
    return home.metric("sluice_retries_total", reason="refused")


class Load:
    """Clients that ask for streams, one after the other, each of which asks again when it was answered."""

    def __init__(self, home: House) -> None:
        self._home = home
        self._stops = asyncio.Event()
        self.told: list[Told] = []

    async def client(self) -> None:
        while not self._stops.is_set():
            told = Told()
            await self._home.read(request("load", stream=True, max_tokens=10), told)
            self.told.append(told)

    async def running(self, count: int, events: asyncio.Task[None]) -> None:
        """`count` clients at once, until `events` are over and all are answered."""
        async with asyncio.TaskGroup() as clients:
            for _ in range(count):
                clients.create_task(self.client())
            await events
            self._stops.set()


async def test_l08_a_worker_lost_under_load_fails_only_the_streams_it_had_begun(pool: MakePool) -> None:
    workers = await pool(4)
    lost, *others = workers
    for worker in workers:
        worker.timing = Timing(decode_s=0.02)
    begun, asked = 0, 0.0
    async with house(*workers, slots=SLOTS, admission={"no_worker_timeout_s": 3}) as home:
        load = Load(home)

        async def events() -> None:
            nonlocal begun, asked
            async with asyncio.timeout(2 * PATIENCE_S):
                while len(load.told) < 2 * CLIENTS or lost.counts.open < 2:
                    await asyncio.sleep(0.005)
            begun = lost.counts.open
            lost.crash()
            gone = time.monotonic()
            await home.becomes(lost, State.LOST, timeout_s=SPARED_AFTER_S)
            await asyncio.sleep(SPARED_AFTER_S - (time.monotonic() - gone))
            asked = refused(home)
            await asyncio.sleep(LASTS_S - SPARED_AFTER_S)

        await load.running(CLIENTS, asyncio.create_task(events()))
        failed = [told for told in load.told if not told.ok]
        assert begun > 0
        assert len(failed) <= begun
        assert all(told.parts and told.code == "worker_lost" for told in failed), [told.code for told in failed]
        assert refused(home) - asked <= 1
        # What is left has room for all: 22 clients on 24 slots.
        assert len(load.told) - len(failed) > 3 * CLIENTS
        assert all(home.known(worker).condition.state is State.READY for worker in others)
        await lost.stop()
