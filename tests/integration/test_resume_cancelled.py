"""Cancel a request that goes on on another worker, at its k-th await, for every k: nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app import settings
from app.inference import InferenceRequest, Route
from app.runtime import Runtime, open_runtime
from tests.fakes.engine import Timing
from tests.fakes.worker import FakeWorker
from tests.integration.test_cancellation import MOST_AWAITS, CancelledAt, wait

WORDS = "one two three four"


@asynccontextmanager
async def gateway_on(*workers: FakeWorker) -> AsyncIterator[Runtime]:
    """A gateway in this event loop that resumes the model `m`; its workers are ready and know each other's tokens."""
    listed = tuple(settings.Worker(url=worker.url, served_model="m", max_concurrency=1) for worker in workers)
    variant = settings.Variant(name="v", workers=listed)
    # Looked at rarely: only the life of the request is to move.
    configured = settings.Settings(
        models=(settings.Model(name="m", resume=True, variants=(variant,)),),
        health=settings.Health(probe_interval_s=60),
        logs=settings.Logs(level="error", requests="none"),
    )
    async with open_runtime(configured) as runtime:
        ready = asyncio.Event()
        runtime.registry.listen(lambda _: ready.set() if all(w.is_ready for w in runtime.registry) else None)
        async with asyncio.timeout(60):
            await ready.wait()
        yield runtime


def metric(runtime: Runtime, name: str, **labels: str) -> float:
    samples = [sample for family in runtime.metrics._registry.collect() for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


class Life:
    """One stream whose first worker is lost, read to its end."""

    def __init__(self) -> None:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": WORDS}],
            "stream": True,
            "temperature": 0,
            "metadata": {"x_fault": "error_event:3"},
        }
        self.request = InferenceRequest.parse(
            json.dumps(body).encode(), request_id="r", route=Route.CHAT, arrived=time.monotonic()
        )
        self.read = b""

    async def run(self, runtime: Runtime) -> None:
        with await runtime.gateway.serve(self.request) as reply:
            while part := await reply.answer.next():
                self.read += part


async def test_nothing_leaks_wherever_a_resumed_request_is_cancelled() -> None:
    timing = Timing(decode_s=0.005)
    async with FakeWorker("m", timing=timing) as first, FakeWorker("m", timing=timing) as second:
        async with gateway_on(first, second) as runtime:
            resumed = 0
            for k in range(MOST_AWAITS):
                life = Life()
                cancelled_at = CancelledAt(life.run(runtime), k)
                await asyncio.wait([asyncio.create_task(wait(cancelled_at))])
                assert [worker.in_flight for worker in runtime.registry] == [0, 0]
                runtime.gauges.write()
                assert metric(runtime, "sluice_slots_held") == 0
                assert metric(runtime, "sluice_requests_in_flight") == 0
                assert metric(runtime, "sluice_requests_total") == k + 1
                for worker in (first, second):
                    await worker.wait_for(open=0)
                resumed = int(metric(runtime, "sluice_resumes_total", outcome="resumed"))
                if not cancelled_at.reached:
                    break
            assert life.read.endswith(b"data: [DONE]\n\n"), f"the request waits more than {MOST_AWAITS} times"
            assert resumed > 3, "too few were cancelled after they had gone on"
        for worker in (first, second):
            await worker.wait_for(connections=0)
