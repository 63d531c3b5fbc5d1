"""Calls to a modelled worker over real connections, under the eyes of a witness."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice

import httpx
import pytest

from app.workers.vllm_metrics import parse_engine_load
from loadtest.client import Address
from loadtest.pacing import Pacer
from loadtest.scenarios.calls import Call, Callers
from loadtest.scenarios.demand import Ask, Sizes, Stream, asks, endless
from loadtest.scenarios.engine import EngineShape
from loadtest.scenarios.modelled_vllm import Connection, Worker
from loadtest.scenarios.witness import Witness

QUICK = EngineShape(max_num_seqs=2, step_s=0.002, step_s_per_sequence=0, step_s_per_prompt_token=0)
SLOW = EngineShape(max_num_seqs=1, step_s=60)
SIZES = Sizes(output_median=4, output_bounds=(2, 8))


def ask(name: str, tokens: int = 3) -> Ask:
    return Ask(name, 0.0, "default", "t", 20, tokens, 5.0)


@asynccontextmanager
async def worker(shape: EngineShape, witness: Witness) -> AsyncIterator[Address]:
    loop = asyncio.get_running_loop()
    async with witness.listening():
        _, told = await asyncio.open_connection("127.0.0.1", witness.port)
        with Pacer(loop) as pacer:
            made = Worker("m", shape, pacer, told)
            async with await loop.create_server(partial(Connection, made), "127.0.0.1", 0) as server:
                address = Address(server.sockets[0].getsockname()[1])
                told.write(f"worker 127.0.0.1:{address.port}\n".encode())
                yield address
        told.close()


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_every_call_is_served_in_full_and_witnessed() -> None:
    witness = Witness()
    async with worker(QUICK, witness) as address:
        with Callers() as callers:
            asked = asks("x", [Stream(200.0)], 0.2, SIZES, 1)
            calls = await callers.play(asked, lambda _: address)
            await callers.settled(10)
        await until(lambda: witness.held == 0)
        assert [call.tokens for call in calls] == [ask.output_tokens for ask in asked]
    assert all(call.is_served and call.due_ns <= call.first_ns <= call.ended_ns for call in calls)
    assert set(witness.arrived_ns) == {ask.name for ask in asked}
    assert set(witness.arrivals.values()) == {1}


async def test_a_closed_loop_keeps_every_seat_taken() -> None:
    witness = Witness()
    async with worker(QUICK, witness) as address:
        with Callers() as callers:
            calls = await callers.saturate(endless("x", SIZES, 1), [address], callers=4, seconds=0.3)
        (record,) = witness.records.values()
    assert all(call.is_served for call in calls)
    assert (record.most_held, record.most_waiting >= 1) == (4, True)


async def test_who_leaves_is_cancelled_and_leaves_the_engine() -> None:
    witness, heard = Witness(), list[str]()
    witness.on_arrival = lambda name, _: heard.append(name)
    async with worker(SLOW, witness) as address:
        with Callers() as callers:
            calls = [callers.place(ask(name), address, time.monotonic_ns()) for name in ("a", "b")]
            await until(lambda: heard == ["a", "b"])
            callers.cancel(calls[1])
            await until(lambda: witness.held == 1)
            assert (calls[1].code, calls[1].was_cancelled, callers.under_way) == ("cancelled", True, 1)


async def test_an_engine_that_dies_takes_what_it_held_along() -> None:
    witness = Witness()
    async with witness.listening():
        _, told = await asyncio.open_connection("127.0.0.1", witness.port)
        told.write(b"worker w\narrived a 1 1 0\narrived b 2 2 0\nended a 3 1 1\n")
        told.close()
        await until(lambda: witness.killed == 1)
    (record,) = witness.records.values()
    assert (record.most_held, record.most_waiting, record.deaths, record.held) == (2, 1, 1, set())


async def test_where_nobody_listens_a_call_ends_at_once() -> None:
    ended: list[Call] = []
    with Callers(on_end=ended.append) as callers:
        call = callers.place(ask("a"), Address(1), time.monotonic_ns())
        await callers.settled(10)
    assert (ended, call.code, call.is_served) == ([call], "no_connection", False)


async def test_it_serves_what_a_monitor_reads() -> None:
    witness = Witness()
    async with worker(SLOW, witness) as address, httpx.AsyncClient(base_url=address.url, timeout=30) as client:
        with Callers() as callers:
            for one in islice(endless("x", SIZES, 1), 3):
                callers.place(one, address, time.monotonic_ns())
            await until(lambda: witness.held == 3)
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "m"
            load = parse_engine_load((await client.get("/metrics")).text)
    assert load is not None
    assert (load.running, load.waiting, load.kv_tokens) == (1, 2, SLOW.kv_tokens)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score"])
async def test_a_canary_passes_and_other_kinds_are_not_found(path: str) -> None:
    async with worker(QUICK, Witness()) as address, httpx.AsyncClient(base_url=address.url, timeout=30) as client:
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "1", "max_tokens": 1})
        assert answer.json()["usage"]["completion_tokens"] == 1
        assert (await client.post(path, json={})).status_code == 404
