"""Rows F1 to F3 and F16: workers that are killed, before and after the first byte, and ports that are closed."""

from __future__ import annotations

import pytest

from app.errors import NoHealthyWorker
from app.workers.worker import State
from tests.integration.faults.asking import Client, MakePool, attempts, spent
from tests.integration.house import house, request


@pytest.mark.parametrize("stream", [False, True])
async def test_f01_lost_before_the_first_byte_is_served_by_another(pool: MakePool, stream: bool) -> None:
    first, second = await pool(2)
    async with house(first, second) as home:
        first.inject("die_before_byte", times=1)
        assert (await home.ask(stream=stream)).ok
        assert (attempts(first), attempts(second)) == (1, 1)
        assert spent(home) == 1
        assert not home.gateway._relay._blame._quarantine  # the worker lives: nobody is to blame


async def test_f01_killed_before_the_first_byte_counts_against_the_request(pool: MakePool) -> None:
    first, second = await pool(2)
    async with house(first, second) as home:
        first.hold()
        client = Client(home, request())
        await first.wait_for(open=1)
        first.crash()
        assert (await client.answered()).ok
        assert home.known(first).condition.state is State.LOST
        assert [len(record.deaths) for record in home.gateway._relay._blame._quarantine._records.values()] == [1]
        assert spent(home) == 1


async def test_f01_killed_with_no_other_worker_is_said_soon(pool: MakePool) -> None:
    (only,) = await pool(1)
    async with house(only, admission={"no_worker_timeout_s": 0.3}) as home:
        only.hold()
        client = Client(home, request())
        await only.wait_for(open=1)
        only.crash()
        told = await client.answered()
        assert isinstance(told.error, NoHealthyWorker)
        assert told.error.retry_after_s


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("others", [0, 1])
async def test_f01_lost_twice_with_no_other_worker_is_no_worker(pool: MakePool, stream: bool, others: int) -> None:
    """Its port is open, it only drops what it is sent; the others, if any, are down."""
    only, *down = await pool(1 + others)
    async with house(only, *down, admission={"no_worker_timeout_s": 60}) as home:
        for worker in down:
            await worker.stop()
            await home.becomes(worker, State.LOST)
        only.inject("die_before_byte")
        told = await Client(home, request(stream=stream)).answered()  # and does not wait for others
        assert isinstance(told.error, NoHealthyWorker)
        assert (told.error.status, told.error.retry_after_s, told.parts) == (503, 1, [])
        assert (attempts(only), spent(home)) == (2, 1)


async def test_f01_lost_twice_while_another_worker_serves_is_a_lost_worker(pool: MakePool) -> None:
    workers = await pool(2)
    async with house(*workers) as home:
        for worker in workers:
            worker.inject("die_before_byte")
        told = await home.ask()
        assert told.error is not None
        assert (told.code, told.error.status, told.error.retry_after_s) == ("worker_lost", 502, 1)
        assert [attempts(worker) for worker in workers] == [1, 1]


async def test_f02_killed_in_a_stream_ends_it_honestly(pool: MakePool) -> None:
    first, second = await pool(2)
    async with house(first, second) as home:
        first.inject("die_after:5", times=1)
        told = await home.ask(stream=True, max_tokens=20)
        events = told.body.split(b"\n\n")[:-1]
        assert (len(events), told.code, told.whole) == (6, "worker_lost", False)
        assert b"[DONE]" not in told.body
        assert (attempts(first), attempts(second)) == (1, 0)
        assert home.metric("sluice_generation_tokens_total") == 4  # the first event carries only the role
        assert home.is_clean


async def test_f03_a_whole_answer_cut_short_is_tried_elsewhere(pool: MakePool) -> None:
    first, second = await pool(2)
    async with house(first, second) as home:
        first.inject("die_after:40", times=1)
        assert (await home.ask()).ok
        first.inject("long_cl")
        second.inject("long_cl")
        told = await home.ask("again")
        assert (told.code, told.parts) == ("worker_lost", [])
        assert attempts(first, "again") + attempts(second, "again") == 2


async def test_f16_a_closed_port_costs_the_client_nothing_and_a_worker_comes_back(pool: MakePool) -> None:
    first, second = await pool(2)
    # Looked at rarely, so that a request meets the closed port first.
    async with house(first, second, health={"probe_interval_s": 30}) as home:
        await first.stop()
        told = await home.ask()
        assert told.ok
        assert (attempts(second), spent(home)) == (1, 0)
        assert home.known(first).condition.state is not State.READY
        assert home.metric("sluice_retries_total", reason="refused") == 1
        await first.start()
        await home.becomes(first, State.READY)
        assert (await home.ask()).ok
