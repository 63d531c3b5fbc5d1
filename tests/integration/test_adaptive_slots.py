"""`max_concurrency: auto` on workers that behave like an engine: a batch that slows down, a queue of their own."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from app.workers.worker import Worker
from tests.fakes.engine import Timing
from tests.fakes.worker import FakeWorker
from tests.integration.house import House, house

CLIENTS = 32
FAST = {"probe_interval_s": 0.05}
STEADY = {"probe_interval_s": 0.1}


@dataclass
class Seen:
    """One row for each reading of the worker's metrics."""

    limits: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)

    def note(self, worker: Worker) -> None:
        if worker.load is not None:
            self.limits.append(worker.slots)
            self.waiting.append(worker.load.waiting)
            self.running.append(worker.load.running)

    def last(self, count: int) -> Seen:
        return Seen(self.limits[-count:], self.waiting[-count:], self.running[-count:])


@asynccontextmanager
async def overloaded(home: House) -> AsyncIterator[None]:
    """Many clients, each of which asks again as soon as it was answered."""

    async def ask() -> None:
        while True:
            assert (await home.ask(max_tokens=12)).ok

    async with asyncio.TaskGroup() as clients:
        tasks = [clients.create_task(ask()) for _ in range(CLIENTS)]
        yield
        for task in tasks:
            task.cancel()


async def watch(home: House, worker: FakeWorker, readings: int) -> Seen:
    seen, known = Seen(), home.known(worker)
    before = known.load
    while len(seen.limits) < readings:
        await asyncio.sleep(0.005)
        if known.load is not before:
            before = known.load
            seen.note(known)
    return seen


async def test_the_limit_stays_near_the_knee() -> None:
    """A step takes 40 ms for up to six sequences, and in proportion beyond: more than six bring nothing.

    On a busy machine steps take longer, whatever the batch, which moves the knee up.
    """
    timing = Timing(decode_floor_s=0.04, decode_s_per_running=0.04 / 6)
    async with FakeWorker(timing=timing) as worker, house(worker, slots="auto", health=STEADY) as home:
        async with overloaded(home):
            seen = (await watch(home, worker, 100)).last(60)
        assert 3 <= statistics.median(seen.limits) <= 20
        assert max(seen.waiting) <= 1


async def test_the_limit_grows_to_what_the_engine_takes() -> None:
    async with FakeWorker(timing=Timing(decode_s=0.04), max_num_seqs=24) as worker:
        async with house(worker, slots="auto", health=STEADY) as home:
            async with overloaded(home):
                seen = (await watch(home, worker, 100)).last(60)
            assert 19 <= statistics.median(seen.limits) <= 24
            assert statistics.median(seen.running) >= 19


async def test_the_engines_own_queue_stays_empty_and_the_engine_full() -> None:
    async with FakeWorker(timing=Timing(decode_s=0.01), max_num_seqs=5) as worker:
        async with house(worker, slots="auto", health=FAST) as home:
            async with overloaded(home):
                seen = (await watch(home, worker, 160)).last(100)
            assert statistics.median(seen.limits) == 5
            assert sum(waiting > 1 for waiting in seen.waiting) <= 5
            assert statistics.fmean(seen.running) >= 0.85 * 5


async def test_without_auto_the_engines_queue_fills() -> None:
    """What the other test would see if nothing adapted."""
    async with FakeWorker(timing=Timing(decode_s=0.01), max_num_seqs=5) as worker:
        async with house(worker, slots=16, health=FAST) as home:
            async with overloaded(home):
                seen = (await watch(home, worker, 30)).last(20)
            assert statistics.median(seen.waiting) > 5
