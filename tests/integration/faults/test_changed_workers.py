"""Rows F17 to F19: workers that come back as another, whose metrics lie, or that are all gone."""

from __future__ import annotations

import asyncio
import time
from math import ceil

import pytest

from app.errors import NoHealthyWorker
from app.inference import Band
from app.workers.worker import State
from tests.fakes.engine import Timing
from tests.integration.faults.asking import Client, MakePool, attempts
from tests.integration.house import PATIENCE_S, house, request


async def test_f17_a_worker_that_serves_another_model_now_is_left(pool: MakePool) -> None:
    first, second = await pool(2)
    async with house(first, second, health={"probe_interval_s": 30}) as home:
        first.model = "another"
        assert (await home.ask()).ok
        assert attempts(second) == 1
        await home.becomes(first, State.UNPROVEN)
        probes = first.probes["/v1/models"]
        while first.probes["/v1/models"] < probes + 2:
            await asyncio.sleep(0.01)
        assert home.known(first).condition.reason == "serves another, not m"
        assert all(received.outcome == "finished" for received in first.requests)
        assert b"another" not in (await home.ask()).body
        first.model = "m"
        await home.becomes(first, State.READY)


async def test_f17_restarted_with_another_model_and_alone_is_no_worker(pool: MakePool) -> None:
    (only,) = await pool(1)
    async with house(only, admission={"no_worker_timeout_s": 0.1}) as home:
        await only.stop()
        await home.becomes(only, State.LOST)
        only.model = "another"
        await only.start()
        await home.becomes(only, State.UNPROVEN)
        assert isinstance((await home.ask()).error, NoHealthyWorker)
        assert attempts(only) == 0


@pytest.mark.parametrize("kind", ["nan", "negative", "500", "huge", "endless", "text"])
async def test_f18_garbage_for_metrics_means_full_unless_all_send_it(pool: MakePool, kind: str) -> None:
    odd, good = await pool(2)
    async with house(odd, good) as home:
        odd.inject(f"metrics_garbage:{kind}")
        await metrics_read(home.known(odd).id, odd.probes)
        assert home.known(odd).load is None
        assert home.known(odd).condition.state is State.READY
        home.known(odd).latency_s = home.known(good).latency_s = 0.0
        await asyncio.gather(*(home.ask("one lies") for _ in range(4)))
        assert (attempts(odd, "one lies"), attempts(good, "one lies")) == (0, 4)
        good.inject(f"metrics_garbage:{kind}")
        await metrics_read(home.known(good).id, good.probes)
        assert home.known(good).load is None
        home.known(odd).latency_s = home.known(good).latency_s = 0.0
        await asyncio.gather(*(home.ask("both lie") for _ in range(8)))
        assert (attempts(odd, "both lie"), attempts(good, "both lie")) == (4, 4)


async def metrics_read(worker_id: str, probes: object) -> None:
    """Wait until a page of the present kind was read: two were asked for, one after the other."""
    assert isinstance(probes, dict)
    before = probes["/metrics"]
    async with asyncio.timeout(PATIENCE_S):
        while probes["/metrics"] < before + 3:
            await asyncio.sleep(0.01)


async def test_f19_all_down_is_said_soon_and_the_return_is_a_ramp(pool: MakePool) -> None:
    (only,) = await pool(1)
    only.timing = Timing(decode_s=0.01)
    async with house(only, slots=8, health={"slow_start_s": 1.0}, admission={"no_worker_timeout_s": 0.3}) as home:
        only.hold()
        holders = [Client(home, request("holding")) for _ in range(8)]
        await only.wait_for(open=8)
        queued = [Client(home, request("queued", max_tokens=20)) for _ in range(16)]
        while home.admission.waiting(Band.DEFAULT) < 16:
            await asyncio.sleep(0)
        await only.stop()
        for holder in holders:
            assert isinstance((await holder.answered()).error, NoHealthyWorker)
        assert isinstance((await Client(home, request()).answered()).error, NoHealthyWorker)
        await only.start()
        only.resume()
        await home.becomes(only, State.READY)
        returned = home.known(only).condition.ready_since
        assert returned is not None
        most: dict[int, int] = {}
        while not all(client.is_done for client in queued):
            tenth = int((time.monotonic() - returned) * 10)
            most[tenth] = max(most.get(tenth, 0), home.known(only).in_flight)
            await asyncio.sleep(0.001)
        assert all([(await client.answered()).ok for client in queued])
        # Of eight slots, ceil(8 t) are open t seconds after the return.
        assert all(count <= ceil(0.8 * (tenth + 1)) for tenth, count in most.items())
        assert max(most.values()) > 1
