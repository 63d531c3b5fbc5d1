"""Prompts go where they are cached: conversations come back, a popular prefix spreads, a lost worker is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT
from tests.integration.gateway.conftest import SHORT
from tests.integration.gateway.running import GatewayProcess, model, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG = "and so on, for a good while, until it fills more than a block or two; " * 8


class Two:
    """A gateway with two workers."""

    def __init__(self) -> None:
        self.workers = (FakeWorker("m"), FakeWorker("m"))
        self.gateway: GatewayProcess

    async def ask(self, *turns: str) -> None:
        """Have the next turn of a conversation; the client's turns and the answers so far alternate."""
        roles = ("user", "assistant")
        messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(turns)]
        answer = await self.gateway.http.post(CHAT, json={"model": "m", "messages": messages, "max_tokens": 1})
        assert answer.status_code == 200, answer.text

    async def at_once(self, *firsts: str) -> None:
        """Ask all of these while no worker answers, so that the load of one decides on the next."""
        async with AsyncExitStack() as stack:
            for worker in self.workers:
                await stack.enter_async_context(self.held(worker))
            asking = []
            for count, first in enumerate(firsts, start=1):
                asking.append(asyncio.create_task(self.ask(first)))
                await until(partial(self._are_open, count), f"{count} requests at the workers")
        await asyncio.gather(*asking)
        await self.loads_read()

    async def _are_open(self, count: int) -> bool:
        return sum(worker.counts.open for worker in self.workers) == count

    @asynccontextmanager
    async def held(self, worker: FakeWorker) -> AsyncIterator[None]:
        worker.hold()
        try:
            yield
        finally:
            worker.resume()

    async def loads_read(self) -> None:
        """Until the gateway has read every worker's own count of its work afresh."""
        asked = [worker.probes["/metrics"] for worker in self.workers]

        async def were_read() -> bool:
            return all(
                worker.probes["/metrics"] > before + 1 for worker, before in zip(self.workers, asked, strict=True)
            )

        await until(were_read, "metrics read again")

    def got(self, text: str) -> list[int]:
        """How many requests that mention `text` came to each worker."""
        return [sum(text in str(request.body) for request in worker.requests) for worker in self.workers]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    two = Two()
    async with two.workers[0], two.workers[1]:
        two.gateway = GatewayProcess(tmp_path_factory.mktemp("two"), [model("m", *two.workers)], health=SHORT["health"])
        async with two.gateway:
            await two.gateway.ready(*two.workers)
            yield two


async def test_a_conversation_goes_back_to_its_worker(two: Two) -> None:
    talks = [f"conversation {at}" for at in range(6)]
    await two.at_once(*(f"{talk} {LONG}" for talk in talks))
    assert [sum(counts) for counts in zip(*map(two.got, talks), strict=True)] == [3, 3]
    for turns in (1, 2):
        for talk in talks:
            await two.ask(f"{talk} {LONG}", *["an answer", "a question"] * turns)
    assert [sorted(two.got(talk)) for talk in talks] == [[0, 3]] * 6


async def test_a_popular_prefix_spreads(two: Two) -> None:
    popular = f"popular {LONG}"
    await two.ask(popular)
    await two.loads_read()
    assert sorted(two.got("popular")) == [0, 1]
    await two.at_once(*(f"{popular} {at}" for at in range(16)))
    assert sum(two.got("popular")) == 17
    assert min(two.got("popular")) >= 4


async def test_a_lost_workers_prompts_are_forgotten(two: Two) -> None:
    await two.ask(f"lonely {LONG}")
    home, other = sorted(two.workers, key=lambda worker: -two.got("lonely")[two.workers.index(worker)])
    assert await goes_to(two, home, other, "lonely, again") is home
    home.crash()
    await until(partial(_is, two, home, "lost"), "lost")
    await home.start()
    await two.gateway.ready(home)
    assert await goes_to(two, home, other, "lonely, after all") is other


async def goes_to(two: Two, busier: FakeWorker, idle: FakeWorker, last: str) -> FakeWorker:
    """Where the lonely conversation goes while one worker carries a little more than the other."""
    async with two.held(busier):
        async with two.held(idle):
            load = [asyncio.create_task(two.ask("short")) for _ in two.workers]
            for worker in two.workers:
                await worker.wait_for(open=1)
        await idle.wait_for(open=0)
        await two.loads_read()
        seen = [worker.counts.seen for worker in (busier, idle)]
        asking = asyncio.create_task(two.ask(f"lonely {LONG}", "an answer", last))

        async def arrived() -> bool:
            return [worker.counts.seen for worker in (busier, idle)] != seen

        await until(arrived, "the request at a worker")
        chosen = busier if busier.counts.seen > seen[0] else idle
    await asyncio.gather(asking, *load)
    await two.loads_read()
    return chosen


async def _is(two: Two, worker: FakeWorker, state: str) -> bool:
    return await two.gateway.state_of(worker) == state
