"""The loads against the light worker, over real connections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest

from loadtest.client import Address, ChatRequest
from loadtest.fake_vllm import Connection, Pace, Worker
from loadtest.loads import LoadError, closed_loop, idle_streams, open_loop
from loadtest.pacing import Pacer, jittered_times

WHOLE = ChatRequest(100, 4, stream=False)
STREAM = ChatRequest(100, 4, stream=True)


@asynccontextmanager
async def serving(
    pace: Pace = Pace(),  # noqa: B008
    connection: type[Connection] = Connection,
) -> AsyncIterator[tuple[Worker, Address]]:
    loop = asyncio.get_running_loop()
    with Pacer(loop) as pacer:
        worker = Worker("m", pacer, pace)
        async with await loop.create_server(partial(connection, worker), "127.0.0.1", 0) as server:
            yield worker, Address(server.sockets[0].getsockname()[1])


async def until(condition: object) -> None:
    """Let the loop turn until `condition()` holds; the test's own time limit bounds it."""
    assert callable(condition)
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


async def test_a_closed_loop_counts_answers_and_reuses_its_connections() -> None:
    async with serving() as (worker, address), closed_loop(address, WHOLE, connections=3) as load:
        await until(lambda: load.answers >= 50)
        assert worker.served >= 50
        assert (load.tokens, load.failures) == (0, {})


async def test_a_closed_loop_counts_the_tokens_of_streams() -> None:
    async with serving() as (_, address), closed_loop(address, STREAM, connections=2) as load:
        await until(lambda: load.answers >= 20)
        # Of a stream under way some tokens may be counted already.
        assert 4 * load.answers <= load.tokens <= 4 * (load.answers + 2)


async def test_a_closed_loop_leaves_nothing_running() -> None:
    async with serving(Pace(itl_ms=60_000)) as (worker, address):
        async with closed_loop(address, STREAM, connections=2) as load:
            await until(lambda: load.tokens == 2)
        await until(lambda: worker.aborted == 2)
        assert worker.running == 0
        assert load.failures == {}


async def test_a_closed_loop_ends_at_its_limit() -> None:
    async with serving() as (worker, address), closed_loop(address, STREAM, connections=3, limit=7) as load:
        async with asyncio.timeout(30):
            await load.finished()
        assert (load.answers, load.tokens, worker.served) == (7, 28, 7)


async def test_a_closed_loop_tells_what_failed() -> None:
    broken = ChatRequest(100, tokens="many", stream=False)  # type: ignore[arg-type]
    async with serving() as (_, address), closed_loop(address, broken, connections=1) as load:
        await until(lambda: load.failures["400"] >= 3)
        assert load.answers == 0


async def test_an_open_loop_does_without_an_unused_connection() -> None:
    """As gateways close those on which no request comes."""
    made: list[Connection] = []

    class Choosy(Connection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            made.append(self)
            if len(made) == 1:
                self._transport.close()

    async with serving(connection=Choosy) as (_, address):
        times = jittered_times(rate=200, seconds=0.25, seed=1)
        seen = await open_loop(address, STREAM, times, warmup_s=0, connections=20, grace_s=10)
    assert (len(made), len(seen.ttft_ns), seen.unfinished, seen.failures) == (20, 50, 0, {})


async def test_an_open_loop_tells_of_answers_that_are_cut() -> None:
    cut: list[Connection] = []

    class Cutting(Connection):
        def post(self, body: bytes) -> None:
            if cut:
                return super().post(body)
            cut.append(self)
            return self._transport.abort()

    async with serving(connection=Cutting) as (_, address):
        times = jittered_times(rate=200, seconds=0.25, seed=1)
        seen = await open_loop(address, STREAM, times, warmup_s=0, connections=20, grace_s=10)
    assert (len(seen.ttft_ns), seen.unfinished, seen.failures) == (49, 0, {"lost": 1})


async def test_an_open_loop_samples_every_request_and_chunk() -> None:
    async with serving(Pace(ttft_ms=5, itl_ms=1)) as (_, address):
        times = jittered_times(rate=200, seconds=0.25, seed=1)
        seen = await open_loop(address, STREAM, times, warmup_s=0, connections=50, grace_s=10)
    assert (seen.offered, seen.unfinished, seen.failures) == (50, 0, {})
    assert len(seen.ttft_ns) == 50
    assert min(seen.ttft_ns) >= 5_000_000
    assert min(seen.chunk_delay_ns) >= 0


async def test_an_open_loop_counts_from_the_scheduled_time_when_no_connection_is_free() -> None:
    async with serving(Pace(ttft_ms=20)) as (_, address):
        seen = await open_loop(address, STREAM, [0] * 5, warmup_s=0, connections=1, grace_s=10)
    assert all(ttft >= 20_000_000 * place for place, ttft in enumerate(sorted(seen.ttft_ns), start=1))


async def test_an_open_loop_counts_who_still_waits_at_the_end() -> None:
    async with serving(Pace(ttft_ms=60_000)) as (_, address):
        seen = await open_loop(address, STREAM, [0] * 5, warmup_s=0, connections=2, grace_s=0.05)
    assert seen.unfinished == 5
    assert len(seen.ttft_ns) == 5
    assert min(seen.ttft_ns) >= 50_000_000


async def test_an_open_loop_that_cannot_connect_says_so(unused_tcp_port: int) -> None:
    with pytest.raises(LoadError, match="cannot open"):
        await open_loop(Address(unused_tcp_port), STREAM, [0], warmup_s=0, connections=1, grace_s=1)


async def test_idle_streams_hold_until_the_block_ends() -> None:
    async with serving(Pace(itl_ms=60_000)) as (worker, address):
        async with idle_streams(address, STREAM, count=40, limit_s=10) as load:
            assert worker.running == 40
            assert load.ended == 0
        await until(lambda: worker.running == 0)


async def test_idle_streams_that_do_not_open_in_time_are_an_error() -> None:
    async with serving(Pace(ttft_ms=60_000)) as (_, address):
        with pytest.raises(LoadError, match="could not be opened"):
            async with idle_streams(address, STREAM, count=2, limit_s=0.05):
                pytest.fail("the streams have no first token")


async def test_the_worker_streams_in_the_order_of_vllm() -> None:
    async with serving() as (_, address), httpx.AsyncClient(base_url=address.url, timeout=30) as client:
        body = {"model": "m", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
        events = (await client.post("/v1/chat/completions", json=body)).text.split("\n\n")
    marks = [
        '"role":"assistant"',
        '"content":"tok ',
        '"content":"tok ',
        '"finish_reason":"stop"',
        '"usage"',
        "[DONE]",
    ]
    assert [mark in event for mark, event in zip(marks, events, strict=False)] == [True] * 6
    assert events[6:] == [""]


async def test_the_worker_answers_a_canary() -> None:
    async with serving() as (_, address), httpx.AsyncClient(base_url=address.url, timeout=30) as client:
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "1", "max_tokens": 1})
    assert answer.json()["choices"][0]["text"] == "tok"


async def test_the_worker_answers_unknown_routes_as_vllm_does() -> None:
    async with serving() as (_, address), httpx.AsyncClient(base_url=address.url, timeout=30) as client:
        answer = await client.post("/v1/chat/completions/render", json={})
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
