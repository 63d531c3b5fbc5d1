"""What the tests of the fault matrix ask of workers, and how they count what these got."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.inference import InferenceRequest
from tests.fakes.worker import FakeWorker
from tests.integration.house import PATIENCE_S, House, Told

Pool = Awaitable[list[FakeWorker]]
MakePool = Callable[[int], Pool]


def attempts(worker: FakeWorker, content: str = "hi") -> int:
    """How often the worker was asked this; canaries have another prompt."""
    return sum(f'"{content}"'.encode() in received.request.body for received in worker.requests)


def spent(home: House) -> int:
    """Second attempts taken from the pool's retry budget."""
    return sum(home.gateway._relay._budgets["m:v"]._retries)


@dataclass
class Lateness:
    """By how much, at the most, this event loop was too late for anything, in seconds."""

    most_s: float = 0.0

    async def watch(self) -> None:
        """For ever."""
        while True:
            due = time.monotonic() + 0.005
            await asyncio.sleep(0.005)
            self.most_s = max(self.most_s, time.monotonic() - due)


class Client:
    """A request under way."""

    def __init__(self, home: House, asked: InferenceRequest) -> None:
        self.told = Told()
        self._task = asyncio.create_task(home.read(asked, self.told))

    async def parts(self, count: int) -> None:
        """Wait until that many parts of the answer have come."""
        while len(self.told.parts) < count and not self._task.done():
            await asyncio.sleep(0.001)

    async def answered(self, timeout_s: float = PATIENCE_S) -> Told:
        async with asyncio.timeout(timeout_s):
            await self._task
        return self.told

    @property
    def is_done(self) -> bool:
        return self._task.done()

    async def leave(self) -> None:
        """Go away before the answer is whole."""
        self._task.cancel()
        await asyncio.wait([self._task])
