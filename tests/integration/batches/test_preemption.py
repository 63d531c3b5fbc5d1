"""A line gives its slot to an interactive request that would wait for it, at once, and is run again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.worker import FakeWorker
from tests.integration.batches.house import FAST, Client, check_whole, jsonl, lines, seen_by
from tests.integration.gateway.running import GatewayProcess, model, until
from tests.processes import Valkey

SLOTS = 3
HELD = "hang_before"
"""Lines take a slot and keep it until they are healed; interactive requests are answered."""


@asynccontextmanager
async def house(place: Path, worker: FakeWorker, **more: Any) -> AsyncIterator[tuple[GatewayProcess, Client]]:
    batches = {"directory": str(place / "kept"), **FAST, **more.pop("batches", {})}
    models = [model("m", worker, max_concurrency=SLOTS)]
    tenants = [{"name": "batcher", "limits": {"requests_per_min": 1000}}]
    admission = {"trust_tenant_header": True, **more.pop("admission", {})}
    gateway = GatewayProcess(place, models, batches=batches, tenants=tenants, admission=admission, **more)
    async with gateway, Client(gateway, "batcher") as client:
        await gateway.ready(worker)
        yield gateway, client


async def ask(gateway: GatewayProcess, tenant: str = "someone") -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "now"}], "max_tokens": 2}
    headers = {"x-sluice-tenant": tenant}
    return await gateway.http.post("/v1/chat/completions", json=body, headers=headers)


def of_lines(worker: FakeWorker) -> Counter[str]:
    return Counter(seen_by(worker))


async def test_a_request_gets_the_slot_of_a_line_which_is_run_again(tmp_path: Path) -> None:
    requests = lines(8, x_fault=HELD)
    async with FakeWorker("m") as worker, house(tmp_path, worker) as (gateway, client):
        batch = await client.create(jsonl(requests))
        await worker.wait_for(open=SLOTS)
        before = set(of_lines(worker))
        answer = await ask(gateway)
        assert answer.status_code == 200
        await worker.aborted()
        await gateway.metric("sluice_batch_preemptions_total", 1)
        await gateway.metric("sluice_requests_total", 1, band="batch", outcome="cancelled", code="preempted")
        worker.heal(for_good=True)
        done = await client.follow(batch)
        assert done.status == "completed"
        check_whole(requests, await client.records(done.output_file_id), [])
        seen = of_lines(worker)
        assert sorted(seen.values()) == [1] * 7 + [2]
        assert before >= {name for name, times in seen.items() if times == 2}
        await gateway.idle()
        # Eight lines and this request: what was given up was not paid for.
        assert (await ask(gateway, "batcher")).headers["x-ratelimit-remaining-requests"] == str(1000 - 8 - 1)


async def test_a_line_that_gave_way_often_keeps_its_slot(tmp_path: Path) -> None:
    requests = lines(SLOTS, x_fault=HELD)
    async with (
        FakeWorker("m") as worker,
        house(tmp_path, worker, batches={"preemptions_per_line": 1}) as (gateway, client),
    ):
        batch = await client.create(jsonl(requests))
        for times in range(1, SLOTS + 1):
            await worker.wait_for(open=SLOTS)
            assert (await ask(gateway)).status_code == 200
            await worker.aborted(times)
        await worker.wait_for(open=SLOTS)
        waiting = asyncio.create_task(ask(gateway))
        await gateway.metric("sluice_queue_depth", 1, band="default")
        assert sorted(of_lines(worker).values()) == [2] * SLOTS
        worker.heal(for_good=True)
        assert (await waiting).status_code == 200
        done = await client.follow(batch)
        assert done.status == "completed"
        check_whole(requests, await client.records(done.output_file_id), [])
        await gateway.metric("sluice_batch_preemptions_total", SLOTS)
        assert worker.counts.aborted == SLOTS


async def test_nothing_is_taken_off_where_that_is_not_wanted(tmp_path: Path) -> None:
    async with (
        FakeWorker("m") as worker,
        house(tmp_path, worker, batches={"preemptions_per_line": 0}) as (gateway, client),
    ):
        batch = await client.create(jsonl(lines(SLOTS, x_fault=HELD)))
        await worker.wait_for(open=SLOTS)
        waiting = asyncio.create_task(ask(gateway))
        await gateway.metric("sluice_queue_depth", 1, band="default")
        worker.heal(for_good=True)
        assert (await waiting).status_code == 200
        await client.follow(batch)
        assert worker.counts.aborted == 0


async def test_a_cancelled_batch_sends_no_line_again(tmp_path: Path) -> None:
    async with FakeWorker("m") as worker, house(tmp_path, worker) as (gateway, client):
        batch = await client.create(jsonl(lines(SLOTS, x_fault=HELD)))
        await worker.wait_for(open=SLOTS)
        answers = await asyncio.gather(ask(gateway), client.api.batches.cancel(batch.id))
        assert answers[0].status_code == 200
        done = await client.follow(batch)
        assert done.status == "cancelled"
        await gateway.idle()
        seen = of_lines(worker)
        assert (await ask(gateway)).status_code == 200
        assert of_lines(worker) == seen


@pytest.fixture
def valkey(tmp_path: Path) -> Any:
    with Valkey(tmp_path) as server:
        yield server


async def test_a_request_of_another_gateway_gets_it_too(tmp_path: Path, valkey: Valkey) -> None:
    shared: dict[str, Any] = {"redis": {"url": valkey.url}, "admission": {"lease_s": 2}}
    (tmp_path / "front").mkdir()
    async with FakeWorker("m") as worker, house(tmp_path, worker, **shared) as (gateway, client):
        # It has no batches of its own, so no line that it could take off.
        front = GatewayProcess(tmp_path / "front", [model("m", worker, max_concurrency=SLOTS)], **shared)
        async with front:
            await front.ready(worker)
            batch = await client.create(jsonl(lines(4, x_fault=HELD)))
            await worker.wait_for(open=SLOTS)
            assert (await ask(front)).status_code == 200
            await worker.aborted()
            worker.heal(for_good=True)
            done = await client.follow(batch)
            assert done.status == "completed"

            async def is_counted() -> bool:
                return (await gateway.scrape()).sum("sluice_batch_preemptions_total") >= 1

            await until(is_counted, "preemptions are counted")
