"""Batches while parts fail: gateways that are killed or sleep, Valkey that dies or forgets, a disk that is full.

Rows F23, F29, F36, F39 and F48 of the fault matrix, as they concern batches.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import Batch

from tests.fakes.worker import FakeWorker
from tests.integration.batches.house import FAST, Client, answered_by, check_whole, jsonl, lines, seen_by
from tests.integration.gateway.running import GatewayProcess, model, until
from tests.processes import Valkey

LEASE_S = FAST["lease_s"]


class Fleet:
    """Two gateways that share a Valkey and a directory, in front of one worker."""

    def __init__(self, worker: FakeWorker, valkey: Valkey, gateways: tuple[GatewayProcess, GatewayProcess]) -> None:
        self.worker = worker
        self.valkey = valkey
        self.gateways = gateways
        self.clients: list[Client] = []

    async def running_on_both(self) -> None:
        """Wait until both have lines in flight."""

        async def do() -> bool:
            counts = [(await gateway.scrape()).sum("sluice_batch_lines_in_flight") for gateway in self.gateways]
            return all(counts)

        await until(do, "lines in flight on both gateways")

    async def resting_on_both(self) -> None:
        """Wait until neither has a line left: they have stopped sending, though there is more to send."""

        async def do() -> bool:
            counts = [(await gateway.scrape()).sum("sluice_batch_lines_in_flight") for gateway in self.gateways]
            return not any(counts) and not self.worker.counts.open

        await until(do, "no line in flight on either gateway", 40)


def config(kept: Path, **more: Any) -> dict[str, Any]:
    limits = {"directory": str(kept), "range_lines": 10, **FAST, **more.pop("batches", {})}
    return {"batches": limits, "admission": {"lease_s": LEASE_S, "replicas": more.pop("replicas", 1)}, **more}


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(Valkey(tmp_path))
        worker = await stack.enter_async_context(FakeWorker("m"))
        redis = {"url": valkey.url}
        kept = tmp_path / "kept"
        gateways = []
        for name in ("one", "two"):
            place = tmp_path / name
            place.mkdir()
            gateway = GatewayProcess(
                place, [model("m", worker, max_concurrency=8)], redis=redis, **config(kept, replicas=2)
            )
            gateways.append(await stack.enter_async_context(gateway))
            await gateway.ready(worker)
        fleet = Fleet(worker, valkey, (gateways[0], gateways[1]))
        fleet.clients = [await stack.enter_async_context(Client(gateway)) for gateway in gateways]
        yield fleet


async def check_done(client: Client, requests: list[dict[str, Any]], batch: Batch) -> None:
    done = await client.follow(batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.completed == done.request_counts.total == len(requests)
    check_whole(requests, await client.records(done.output_file_id), [])


async def test_a_killed_gateways_lines_are_run_by_another(fleet: Fleet) -> None:
    requests = lines(400)
    fleet.worker.inject("slow:30")
    batch = await fleet.clients[0].create(jsonl(requests))
    await fleet.running_on_both()
    await fleet.clients[1].reaches(batch, "in_progress", completed=50)
    fleet.gateways[0].process.kill()
    fleet.worker.heal()
    await check_done(fleet.clients[1], requests, batch)
    twice = sum(count - 1 for count in Counter(seen_by(fleet.worker)).values())
    assert twice <= 8 + 2 * 8, "only what was in flight, and what was finished within a commit's interval"


async def test_a_sleeping_gateway_wakes_to_find_its_lines_done(fleet: Fleet) -> None:
    requests = lines(120)
    fleet.worker.inject("slow:30")
    batch = await fleet.clients[0].create(jsonl(requests))
    await fleet.running_on_both()
    fleet.gateways[0].process.pause()
    fleet.worker.heal()
    await check_done(fleet.clients[1], requests, batch)
    output = (await fleet.clients[1].api.batches.retrieve(batch.id)).output_file_id
    before = await fleet.clients[1].records(output)
    fleet.gateways[0].process.resume()
    await fleet.clients[0].follow(batch)
    await fleet.gateways[0].idle()
    assert await fleet.clients[0].records(output) == before


async def test_a_gateway_that_wakes_among_its_lines_adds_what_is_missing(fleet: Fleet) -> None:
    """It was answered while it slept, and stores that beside what another has stored of the same range by then."""
    requests = lines(500)
    fleet.worker.inject("slow:40")
    batch = await fleet.clients[0].create(jsonl(requests))
    await fleet.running_on_both()
    fleet.gateways[0].process.pause()

    async def are_taken_over() -> bool:
        return max(Counter(answered_by(fleet.worker)).values(), default=0) > 1

    await until(are_taken_over, "lines of the sleeping gateway are answered a second time", 40)
    counts = (await fleet.clients[1].api.batches.retrieve(batch.id)).request_counts
    assert counts is not None
    await fleet.clients[1].reaches(batch, "in_progress", completed=counts.completed + 40, timeout_s=40)
    fleet.gateways[0].process.resume()
    fleet.worker.heal()
    await check_done(fleet.clients[1], requests, batch)
    done = await fleet.clients[1].api.batches.retrieve(batch.id)
    await fleet.clients[0].follow(batch)
    records = [await client.records(done.output_file_id) for client in fleet.clients]
    assert records[0] == records[1]


async def test_without_valkey_nothing_is_begun_and_nothing_lost(fleet: Fleet) -> None:
    requests = lines(300)
    fleet.worker.inject("slow:20")
    file = await fleet.clients[0].upload(jsonl(lines(1)))
    batch = await fleet.clients[0].create(jsonl(requests))
    await fleet.running_on_both()
    fleet.valkey.kill()
    with pytest.raises(openai.InternalServerError) as refused:
        await fleet.clients[0].api.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert (refused.value.status_code, refused.value.code) == (503, "dependency_unavailable")
    assert (await fleet.clients[0].api.batches.retrieve(batch.id)).id == batch.id
    fleet.valkey.start()  # empty: it knows of no claim
    fleet.worker.heal()
    await check_done(fleet.clients[0], requests, batch)


async def test_while_valkey_sleeps_claims_end_and_nothing_is_begun(fleet: Fleet) -> None:
    """F24 for batches: who cannot renew stops sending before anybody else could have its lines."""
    requests = lines(1500)
    fleet.worker.inject("slow:20")
    file = await fleet.clients[0].upload(jsonl(lines(1)))
    batch = await fleet.clients[0].create(jsonl(requests))
    await fleet.running_on_both()
    fleet.valkey.pause()
    with pytest.raises(openai.InternalServerError) as refused:
        await fleet.clients[0].api.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert (refused.value.status_code, refused.value.code) == (503, "dependency_unavailable")
    await fleet.resting_on_both()
    seen = fleet.worker.counts.seen
    assert seen < len(requests)
    assert (await fleet.clients[1].api.batches.retrieve(batch.id)).status == "in_progress"
    fleet.valkey.resume()
    fleet.worker.heal()
    await check_done(fleet.clients[0], requests, batch)
    twice = sum(count - 1 for count in Counter(seen_by(fleet.worker)).values())
    assert twice <= 2 * 8, "nothing but what was in flight"


async def test_a_batch_is_cancelled_through_another_gateway(fleet: Fleet) -> None:
    fleet.worker.inject("slow:50")
    batch = await fleet.clients[0].create(jsonl(lines(400)))
    await fleet.running_on_both()
    await fleet.clients[1].api.batches.cancel(batch.id)
    done = await fleet.clients[0].follow(batch)
    assert done.status == "cancelled"
    dispatched = fleet.worker.counts.seen
    assert done.request_counts is not None
    assert len(await fleet.clients[1].records(done.output_file_id)) == done.request_counts.completed
    for gateway in fleet.gateways:
        await gateway.idle()
    assert fleet.worker.counts.seen == dispatched


async def test_what_hangs_is_given_up_when_another_gateway_cancels_it(fleet: Fleet) -> None:
    batch = await fleet.clients[0].create(jsonl(lines(40, x_fault="hang_before")))
    await fleet.running_on_both()
    await fleet.clients[1].api.batches.cancel(batch.id)
    done = await fleet.clients[0].follow(batch)
    assert (done.status, done.output_file_id) == ("cancelled", None)
    await fleet.worker.wait_for(open=0)


@asynccontextmanager
async def alone(tmp_path: Path, worker: FakeWorker, **more: Any) -> AsyncIterator[tuple[GatewayProcess, Client]]:
    """A gateway without Redis."""
    gateway = GatewayProcess(tmp_path, [model("m", worker, max_concurrency=8)], **config(tmp_path / "kept", **more))
    async with gateway, Client(gateway) as client:
        await gateway.ready(worker)
        yield gateway, client


async def test_a_gateway_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    requests = lines(200)
    async with FakeWorker("m") as worker:
        worker.inject("slow:30")
        async with alone(tmp_path, worker) as (gateway, client):
            batch = await client.create(jsonl(requests))
            await client.reaches(batch, "in_progress", completed=20)
            gateway.process.kill()
        worker.heal()
        async with alone(tmp_path, worker) as (gateway, client):
            await check_done(client, requests, batch)


async def test_a_stopped_gateway_stores_what_is_finished(tmp_path: Path) -> None:
    requests = lines(60)
    async with FakeWorker("m") as worker:
        worker.inject("slow:30")
        async with alone(tmp_path, worker, drain_notice_s=0, drain_timeout_s=20) as (gateway, client):
            batch = await client.create(jsonl(requests))
            await client.reaches(batch, "in_progress", completed=5)
            gateway.process.terminate()
            await asyncio.to_thread(gateway.process.wait)
        worker.heal()
        async with alone(tmp_path, worker) as (gateway, client):
            await check_done(client, requests, batch)
        # What was being answered was finished and stored: nothing was asked for twice.
        assert set(Counter(answered_by(worker)).values()) == {1}


async def test_two_gateways_cannot_share_a_directory_without_redis(tmp_path: Path) -> None:
    async with FakeWorker("m") as worker:
        async with alone(tmp_path, worker):
            other = tmp_path / "other"
            other.mkdir()
            second = GatewayProcess(other, [model("m", worker)], **config(tmp_path / "kept"))
            with pytest.raises(RuntimeError, match="another gateway uses it"):
                await second.__aenter__()


async def test_a_batch_waits_for_room_on_the_disk(tmp_path: Path) -> None:
    requests = lines(100)
    async with FakeWorker("m") as worker, alone(tmp_path, worker) as (gateway, client):
        worker.inject("slow:30")
        batch = await client.create(jsonl(requests))
        await client.reaches(batch, "in_progress", completed=10)
        process = psutil.Process(gateway.process.pid)
        process.rlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        with pytest.raises(openai.InternalServerError) as refused:
            await client.upload(jsonl(lines(3)))
        assert (refused.value.status_code, refused.value.code) == (503, "storage_unavailable")
        with pytest.raises(openai.InternalServerError) as refused:
            await client.api.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        assert refused.value.status_code == 503
        await gateway.idle()  # what could not be stored is not computed
        paused = await client.api.batches.retrieve(batch.id)
        assert paused.status == "in_progress"
        assert not list((tmp_path / "kept" / "unfinished").iterdir())
        process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        worker.heal()
        await check_done(client, requests, batch)
    assert len(list((tmp_path / "kept" / "objects" / "active").iterdir())) == 0
