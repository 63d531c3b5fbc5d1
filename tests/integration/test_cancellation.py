"""Cancel the life of a request at its k-th await, for every k: whatever it held then is given back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.gateway import Gateway
from app.inference import Band, InferenceRequest, Route
from tests.fakes.engine import Timing
from tests.fakes.worker import FakeWorker
from tests.integration.house import House, house

MOST_AWAITS = 200


class CancelledAt:
    """Runs a coroutine and cancels its task the k-th time that it waits; `reached` tells whether it came to that."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], k: int) -> None:
        self._coroutine = coroutine
        self._left = k
        self.reached = False

    def __await__(self) -> Generator[Any, Any, None]:
        steps: Generator[Any, Any, None] = self._coroutine.__await__()
        thrown: BaseException | None = None
        while True:
            try:
                awaited = next(steps) if thrown is None else steps.throw(thrown)
            except StopIteration:
                return
            if self._left == 0:
                self.reached = True
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            self._left -= 1
            thrown = None
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001 - handed to the coroutine, which decides
                thrown = error


@asynccontextmanager
async def narrow_house() -> AsyncIterator[tuple[House, FakeWorker]]:
    """A gateway on one worker with one slot."""
    # Slow enough that an answer which nobody reads is still under way when the test looks for it.
    async with FakeWorker("m", timing=Timing(decode_s=0.03)) as worker:
        # Looked at rarely: only the life of the request is to move.
        async with house(worker, slots=1, health={"probe_interval_s": 60, "canary_timeout_s": 5}) as home:
            yield home, worker


class Life:
    """One request, from its arrival until the client has read everything."""

    def __init__(self, *, stream: bool) -> None:
        body = b'{"model":"m","messages":[{"role":"user","content":"count to nine"}],"max_tokens":4,"stream":%s}'
        self.request = InferenceRequest.parse(
            body % (b"true" if stream else b"false"), request_id="r", route=Route.CHAT, arrived=time.monotonic()
        )
        self.is_read = False

    async def run(self, gateway: Gateway) -> None:
        with await gateway.serve(self.request) as reply:
            while part := await reply.answer.next():
                self.is_read = self.is_read or b"[DONE]" in part or not self.request.stream
                await asyncio.sleep(0)  # the client's socket takes its time


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("busy", [True, False], ids=["after a wait in the queue", "at once"])
async def test_nothing_leaks_wherever_a_request_is_cancelled(stream: bool, busy: bool) -> None:
    async with narrow_house() as (home, worker):
        for k in range(MOST_AWAITS):
            ended, cancelled = home.ended(), home.cancelled()
            blocker = await home.gateway.serve(blocking_request()) if busy else None
            life, seen = Life(stream=stream), worker.counts.seen
            cancelled_at = CancelledAt(life.run(home.gateway), k)
            task = asyncio.create_task(wait(cancelled_at))
            if blocker is not None:
                while not home.admission.waiting(Band.DEFAULT) and not task.done():
                    await asyncio.sleep(0)
                with blocker:
                    while await blocker.answer.next():
                        pass
            await asyncio.wait([task])
            assert home.is_clean
            assert home.ended() == ended + 1 + busy
            if home.cancelled() != cancelled + cancelled_at.reached:
                assert life.is_read, "only an answer that was read to its end may end well all the same"
            async with asyncio.timeout(5):
                await worker.wait_for(open=0)
            if worker.counts.seen > seen and not life.is_read:
                assert worker.requests[-1].outcome == "aborted"
            if not cancelled_at.reached:
                assert k > 2, "the request never waited: nothing was tested"
                return
        pytest.fail(f"the request waits more than {MOST_AWAITS} times")


async def wait(cancelled_at: CancelledAt) -> None:
    await cancelled_at


def blocking_request() -> InferenceRequest:
    body = b'{"model":"m","messages":[{"role":"user","content":"hold the slot"}],"max_tokens":3,"stream":true}'
    return InferenceRequest.parse(body, request_id="b", route=Route.CHAT, arrived=time.monotonic())
