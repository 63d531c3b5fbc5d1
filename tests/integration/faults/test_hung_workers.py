"""Rows F4 to F6: workers that keep their connections and say nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from app.errors import UpstreamTimeout
from app.settings import Health, Relay
from app.workers.worker import State
from tests.fakes.engine import Timing
from tests.integration.faults.asking import Client, MakePool, attempts
from tests.integration.house import HASTY, PATIENCE_S, house, request
from tests.processes import FakeWorkerProcess


@pytest.fixture
def stoppable() -> Iterator[FakeWorkerProcess]:
    """A worker in a process of its own, that takes 20 ms for a token."""
    with FakeWorkerProcess("m", "--decode-s", "0.02") as worker:
        yield worker


async def test_f04_a_stopped_worker_loses_what_it_has_not_begun(stoppable: FakeWorkerProcess, pool: MakePool) -> None:
    (other,) = await pool(1)
    async with house(stoppable, other, health=HASTY) as home:
        stoppable.process.pause()
        clients = [Client(home, request()) for _ in range(4)]
        for client in clients:
            assert (await client.answered()).ok  # long before the limit of the first byte, 120 s
        assert home.known(stoppable).condition.state is State.STALLED
        assert home.metric("sluice_retries_total", reason="lost") > 0
        assert (await Client(home, request("later")).answered()).ok
        assert attempts(other, "later") == 1
        stoppable.process.resume()
        await home.becomes(stoppable, State.READY)


async def test_f04_silence_before_the_first_byte_ends_at_its_limit(pool: MakePool) -> None:
    (only,) = await pool(1)
    async with house(only, relay={"first_byte_timeout_s": 0.2}) as home:
        for fault in ("hang_before", "hang_after:0"):  # without and with headers
            only.inject(fault, times=1)
            told = await Client(home, request(stream=True)).answered()
            assert isinstance(told.error, UpstreamTimeout)


async def test_f05_a_stream_of_a_stopped_worker_ends_soon_after(stoppable: FakeWorkerProcess, pool: MakePool) -> None:
    (other,) = await pool(1)
    other.timing = Timing(decode_s=0.02)
    async with house(stoppable, other, health=HASTY, relay={"stalled_gap_timeout_s": 0.3}) as home:
        stopped = Client(home, request(stream=True, max_tokens=500))
        await stopped.parts(5)
        home.known(stoppable).latency_s = 60.0
        untouched = Client(home, request("untouched", stream=True, max_tokens=100))
        await untouched.parts(1)
        assert attempts(other, "untouched") == 1
        stoppable.process.pause()
        told = await stopped.answered()  # long before the gap limit itself, 60 s
        assert (told.code, told.whole) == ("upstream_stalled", False)
        assert b"[DONE]" not in told.body
        assert (await untouched.answered()).ok
        stoppable.process.resume()


def test_f04_f05_the_limits_that_tests_cut_short_are_as_the_matrix_has_them() -> None:
    health, relay = Health(), Relay()
    assert health.probe_misses * (health.probe_interval_s + health.probe_timeout_s) <= 9
    assert relay.first_byte_timeout_s == 120
    assert (relay.gap_timeout_s, relay.stalled_gap_timeout_s) == (60, 10)


async def test_f06_a_dead_engine_behind_a_good_health_route_is_found_out(pool: MakePool) -> None:
    dead, other = await pool(2)
    async with house(dead, other, health={**HASTY, "progress_timeout_s": 0.3}) as home:
        dead.inject("health_ok_engine_dead")
        clients = [Client(home, request()) for _ in range(6)]
        await home.becomes(dead, State.STALLED)
        for client in clients:
            assert (await client.answered()).ok
        assert attempts(dead) > 0
        stuck = attempts(dead)
        probes = dead.probes["/health"]
        while dead.probes["/health"] < probes + 3:  # it answers that it is healthy
            assert not home.known(dead).condition.serves
            assert (await home.ask()).ok
        assert attempts(dead) == stuck
        dead.heal()
        await home.becomes(dead, State.READY)


async def test_f06_an_engine_at_work_is_never_suspected(pool: MakePool) -> None:
    (worker,) = await pool(1)
    worker.timing = Timing(decode_s=0.02)
    async with house(worker, health={"progress_timeout_s": 0.2}) as home:
        canaries = worker.counts.seen
        # Nothing comes of a whole answer before its end, but the engine counts tokens.
        async with asyncio.timeout(PATIENCE_S):
            assert (await home.ask(max_tokens=40)).ok
        assert worker.counts.seen == canaries + 1
