"""`max_concurrency: auto` in front of a real vLLM, under four times the load that its engine takes at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.workers.vllm_metrics import EngineLoad, parse_engine_load
from tests.contract.real_worker import RealWorker, started_worker
from tests.integration.gateway.running import GatewayProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.asyncio(loop_scope="session")]

MODEL, VARIANT = "smollm2", "dense"
TAKES = 8
CLIENTS = 4 * TAKES
CONVERGES_S = 30.0
MEASURED_S = 20.0
SAMPLE_S = 0.25


@pytest.fixture(scope="module")
def worker() -> Iterator[RealWorker]:
    with started_worker(MODEL, max_num_seqs=TAKES) as starting:
        yield starting.proven()


@asynccontextmanager
async def gateway(directory: Path, worker: RealWorker, slots: int | str) -> AsyncIterator[GatewayProcess]:
    listed = [{"url": worker.url, "served_model": MODEL, "max_concurrency": slots, "max_num_seqs": 64}]
    models = [{"name": MODEL, "variants": [{"name": VARIANT, "workers": listed}]}]
    (directory / str(slots)).mkdir()
    health, admission = {"probe_interval_s": 1.0}, {"queue_timeout_s": 300}
    async with GatewayProcess(directory / str(slots), models, health=health, admission=admission) as started:
        await started.ready(worker, timeout_s=120)
        yield started


@asynccontextmanager
async def overloaded(gateway: GatewayProcess) -> AsyncIterator[None]:
    """So many clients, each of which asks again when it was answered; at the end they leave."""

    async def ask(number: int) -> None:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=300) as http:
            while True:
                messages = [{"role": "user", "content": f"Tell a story about {number} bears."}]
                body = {"model": MODEL, "messages": messages, "max_tokens": 40, "ignore_eos": True}
                (await http.post("/v1/chat/completions", json=body)).raise_for_status()

    async with asyncio.TaskGroup() as clients:
        tasks = [clients.create_task(ask(number)) for number in range(CLIENTS)]
        yield
        for task in tasks:
            task.cancel()


@dataclass(frozen=True, slots=True)
class Seen:
    tokens_per_s: float
    waiting: list[int]


async def read(worker: RealWorker, http: httpx.AsyncClient) -> EngineLoad:
    load = parse_engine_load((await http.get(f"{worker.url}/metrics")).text, time.monotonic())
    assert load is not None
    return load


async def watched(worker: RealWorker, for_s: float) -> Seen:
    """What the worker's own metrics tell over some seconds."""
    async with httpx.AsyncClient(timeout=60) as http:
        first = last = await read(worker, http)
        waiting = []
        while last.at - first.at < for_s:
            await asyncio.sleep(SAMPLE_S)
            last = await read(worker, http)
            waiting.append(last.waiting)
    return Seen((last.generated - first.generated) / (last.at - first.at), waiting)


async def test_nobody_waits_inside_the_engine(worker: RealWorker, tmp_path: Path) -> None:
    async with gateway(tmp_path, worker, "auto") as adaptive, overloaded(adaptive):
        await watched(worker, CONVERGES_S)
        seen = await watched(worker, MEASURED_S)
    assert sum(count <= 1 for count in seen.waiting) >= 0.8 * len(seen.waiting)  # without a limit, in none of them
    assert seen.tokens_per_s > 0
