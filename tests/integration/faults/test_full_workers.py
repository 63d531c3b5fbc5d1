"""Rows F15, F21 and F22: workers that are full, and say so, or only show it."""

from __future__ import annotations

import asyncio
import time

import pytest

from app.inference import Band
from app.workers.worker import State
from tests.fakes.engine import Timing
from tests.integration.faults.asking import Client, MakePool, attempts, spent
from tests.integration.house import PATIENCE_S, house, request


@pytest.mark.parametrize("fault", ["429:3", "busy_503"])
async def test_f15_a_full_worker_rests_and_another_serves(pool: MakePool, fault: str) -> None:
    full, other = await pool(2)
    async with house(full, other, relay={"rest_max_s": 0.4}) as home:
        full.inject(fault, times=1)
        assert (await home.ask()).ok
        condition = home.known(full).condition
        assert (condition.state, condition.failures) == (State.RESTING, 0)
        assert spent(home) == 0
        assert condition.until is not None
        assert condition.until <= time.monotonic() + 0.4  # whatever the worker said
        async with asyncio.timeout(PATIENCE_S):
            while home.known(full).condition.state is State.RESTING:
                assert attempts(full, "meanwhile") == 0
                assert (await home.ask("meanwhile")).ok
        assert home.known(full).condition.state is State.READY


async def test_f15_when_all_are_full_a_request_waits_for_the_first_that_is_not(pool: MakePool) -> None:
    workers = await pool(2)
    async with house(*workers, relay={"rest_max_s": 0.4}, admission={"no_worker_timeout_s": 0.05}) as home:
        for worker in workers:
            worker.inject("429:3", times=1)
        client, began = Client(home, request()), time.monotonic()
        await home.becomes(workers[1], State.RESTING)
        late = Client(home, request("late"))
        assert (await client.answered()).ok
        assert time.monotonic() - began > 0.3
        assert (await late.answered()).ok
        assert sum(map(attempts, workers)) == 3


async def test_f15_waiting_for_full_workers_ends_at_the_queues_limit(pool: MakePool) -> None:
    (only,) = await pool(1)
    async with house(only, relay={"rest_max_s": 0.2}, admission={"queue_timeout_s": 2}) as home:
        only.inject("429:3")
        began = time.monotonic()
        assert (await Client(home, request()).answered()).code == "queue_timeout"
        assert time.monotonic() - began > 1.9
        assert 2 <= attempts(only) <= 11  # one after each rest


async def test_f21_what_a_worker_still_works_on_limits_what_it_gets(pool: MakePool) -> None:
    (only,) = await pool(1)
    only.timing = Timing(decode_s=0.02)
    async with house(only, slots=4) as home:
        only.inject("ignore_abort", times=4)
        clients = [Client(home, request("left", stream=True, max_tokens=400)) for _ in range(4)]
        for client in clients:
            await client.parts(1)
        for client in clients:
            await client.leave()
        assert home.is_clean  # all slots are free, by our own count
        probes = only.probes["/metrics"]
        while only.probes["/metrics"] < probes + 2:
            await asyncio.sleep(0.01)
        assert home.known(only).strangers >= 4
        later = [Client(home, request("later", max_tokens=2)) for _ in range(4)]
        most = 0
        while not all(client.is_done for client in later):
            most = max(most, home.known(only).in_flight)
            await asyncio.sleep(0)
        assert most == 1
        only.timing = Timing()


async def test_f22_a_full_kv_cache_gets_no_new_work_and_keeps_the_order(pool: MakePool) -> None:
    (only,) = await pool(1)
    async with house(only, admission={"no_worker_timeout_s": 0.05}) as home:
        only.inject("kv_full")
        starving = Client(home, request("starving"))
        await only.wait_for(waiting=1)
        while home.admission.slots[home.known(only).id]:
            await asyncio.sleep(0.01)
        waiting = []
        for number, tier in enumerate(["default", "priority"]):
            waiting.append(Client(home, request(tier, service_tier=tier)))
            while sum(home.admission.waiting(band) for band in Band) <= number:
                await asyncio.sleep(0)
        probes = only.probes["/metrics"]
        while only.probes["/metrics"] < probes + 3:
            await asyncio.sleep(0.01)
        assert attempts(only, "default") + attempts(only, "priority") == 0
        assert home.known(only).condition.state is State.READY
        only.heal()
        for client in (starving, *waiting):
            assert (await client.answered()).ok
        tiers = [received.body.get("service_tier") for received in only.requests][-2:]
        assert tiers == ["priority", "default"]
